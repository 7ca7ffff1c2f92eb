"""What do the diagnostics of a step cost? The step with and without them, interleaved, on one thread.

    python benchmarks/diagnostics.py

For each pair of networks three copies of one run take turns, a block of steps each: without diagnostics, with them
every 100 steps (the default of `--log-every`), and with them in every step. A cost is the median over the rounds of a
block's CPU time by that of the block without, of the same round, less 1. A measurement looks at 2 steps, so that one in
100 must cost 0.02 of what they cost in every step; the last column is that, where the measured one is within the noise.
"""

import argparse
import statistics
import time

import torch
from accelerate import Accelerator

from gac_plugin.training.config import Config
from gac_plugin.training.game import Game
from gac_plugin.training.networks import find_adapter

EVERY = (0, 100, 1)
CASES = {
    "mlp, 8 x 8": ("mlp", (1, 8, 8), 100),
    "mlp, 28 x 28": ("mlp", (1, 28, 28), 100),
    "dcgan, 3 x 32 x 32, width 16": ("dcgan", (3, 32, 32), 5),
}
"""Adapter, sample shape, steps in a block."""


def make_game(adapter: str, shape: tuple[int, ...], every: int, accelerator: Accelerator) -> Game:
    """A run's networks and optimizers by the default recipe, but metric `adam`."""
    config = Config(adapter=adapter, width=16 if adapter == "dcgan" else 256, metric="adam", cpu=True)
    torch.manual_seed(config.seed)
    arguments = {"sample_shape": shape, "latent_size": 64, "width": config.width, "depth": 2, "output": "tanh"}
    kind = find_adapter(adapter)
    game = Game(config, kind.generator(**arguments), kind.discriminator(**arguments), accelerator)
    game.gac.diagnose_every = every
    return game


def block(game: Game, shape: tuple[int, ...], first: int, steps: int) -> float:
    """CPU seconds of a block of steps."""
    batches = [(torch.rand(64, *shape) * 2 - 1, torch.randn(64, 64), {}) for _ in range(steps)]
    start = time.process_time()
    for number, batch in enumerate(batches, first):
        game.step(number, [batch])
    return time.process_time() - start


def main() -> None:
    """Print a table of milliseconds and costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, metavar="N")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    print("| networks | ms a step | every 100 steps | in every step | 0.02 of that |\n|---|---|---|---|---|")
    for name, (adapter, shape, steps) in CASES.items():
        games = {every: make_game(adapter, shape, every, accelerator) for every in EVERY}
        rounds = []
        for number in range(arguments.rounds + 1):
            turn = EVERY[number % 3 :] + EVERY[: number % 3]
            rounds.append({every: block(games[every], shape, number * steps + 1, steps) for every in turn})
        plain = statistics.median(times[0] for times in rounds[1:])
        rare, always = (statistics.median(times[every] / times[0] for times in rounds[1:]) - 1 for every in EVERY[1:])
        print(f"| {name} | {1000 * plain / steps:.2f} | {rare:+.2%} | {always:+.2%} | {0.02 * always:+.2%} |")


if __name__ == "__main__":
    main()
