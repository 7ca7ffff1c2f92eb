"""The main job: train a generator on a data set with GAC, and leave a run folder behind.

config.json  metrics.jsonl  samples/step-N.png  maps/step-N.png  checkpoints/step-N/  generator/  discriminator/
environment.json  evaluation.json  report.html
"""

import sys
import time
import zlib
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from gac_plugin.errors import UsageError
from gac_plugin.strategy import Stats
from gac_plugin.training.card import kind_of, write_card
from gac_plugin.training.checkpoint import Checkpoint, Checkpoints, Stateful, newest_intact, read_checkpoint
from gac_plugin.training.config import FEWEST_TO_EVALUATE, Config
from gac_plugin.training.data import Data, load_data
from gac_plugin.training.data.feed import Batch, Feed
from gac_plugin.training.data.source import Decoded, sample
from gac_plugin.training.files import next_run, run_folder, write_json
from gac_plugin.training.game import Game
from gac_plugin.training.health import Health
from gac_plugin.training.hub import save_network
from gac_plugin.training.journal import GRID, METRICS, Journal, tracker_names
from gac_plugin.training.judging.evaluate import Evaluation, Features, evaluate, generated_samples, make_features
from gac_plugin.training.judging.maps import STRIPS, write_stage
from gac_plugin.training.judging.memorisation import discriminator_gap
from gac_plugin.training.networks import Recipe, choose_recipe
from gac_plugin.training.processes import everyones, from_main, main_only, require_one_run, together
from gac_plugin.training.random_states import RandomStates
from gac_plugin.training.report import LiveReport
from gac_plugin.training.stopping import Goal, Signals, Stop

WATCHED = 128
"""Training samples, and held-out ones, of which D's logits are compared whenever figures are written."""
AGREE_EVERY = 10
"""Steps from one look at what the other processes know of stopping to the next; a process alone looks at each."""


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        folder: the run folder.
        generator: the trained generator, the running average where there is one, in evaluation mode.
        recipe: how its networks were built.
        evaluation: None where none was asked for.
        seconds: of training, without loading data and evaluating, since the run began or was resumed.
        samples_per_second: real samples seen in a second, over all processes.
        step: the last step taken.
        stopped: why it ended before its last step, `Stop.NO` if it did not.
    """

    folder: Path
    generator: nn.Module
    recipe: Recipe
    evaluation: Evaluation | None
    seconds: float
    samples_per_second: float
    step: int
    stopped: Stop


def train(config: Config) -> Result:
    """Train by a configuration; in several processes, call it in each.

    Raises:
        UsageError: see `load_data`, `run_folder`, `newest_intact` and `GAC`; training diverged; or a checkpoint
            cannot be written.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
    """
    process = PartialState(cpu=config.cpu)
    require_one_run()
    wanted = from_main(config.output_dir or str(next_run(Path(config.dataset).name)))
    with ExitStack() as stack:
        with together():
            _require_half_precision(config, process.device)
            folder, trackers = Path(wanted), tracker_names(config.tracker)
            if process.is_main_process:
                stack.enter_context(run_folder(folder, config.overwrite or config.resume is not None))
        with together():
            data = load_data(config, process.device)
            recipe = choose_recipe(config, data.codec, data.adapter, data.classes)
            set_seed(config.seed)
            generator, discriminator = recipe.generator(), recipe.discriminator()
            _require_enough(config, data.test)
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=config.cpu,
            gradient_accumulation_steps=config.accumulation,
            log_with=trackers or None,
            project_dir=folder / "logs",
        )
        with together():
            run = _Run(config, folder, accelerator, recipe, (generator, discriminator), data)
        run.resume()
        try:
            return run.go()
        finally:
            run.leave_report()


class _Run:
    """One run of `train` in one process: what it is made of, and the loop over its steps."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        accelerator: Accelerator,
        recipe: Recipe,
        networks: tuple[nn.Module, nn.Module],
        data: Data,
    ) -> None:
        self.config, self.folder, self.accelerator, self.recipe = config, folder, accelerator, recipe
        self.data, self.codec = data, data.codec
        self.feed = Feed(config, data, accelerator.process_index, accelerator.num_processes, accelerator.device)
        self.main = accelerator.is_main_process
        self.game = Game(config, *networks, accelerator)
        self.game.gac.diagnose_every = config.log_every
        self.random = RandomStates()
        self.health = Health(self.game.gac.loss, _say)
        self.watched = self.feed.known(WATCHED), sample(data.test, WATCHED)
        few = self.codec.to_samples(sample(self.watched[0], GRID).values.to(accelerator.device))
        self.journal = Journal(config, self.codec, recipe.classes, folder, accelerator, self.health, few)
        self.report = LiveReport(folder, _say)
        self.checkpoints: Checkpoints | None = None
        self.features: Features | None = None
        self.evaluation: tuple[int, Evaluation] | None = None
        self.goal = Goal.parse(config.until) if config.until else None
        self.best: dict[str, float] = {}
        self.step = self.saved = self.first_step = 0
        self.seconds_before = 0.0
        self.mistake: UsageError | None = None
        # for networks that draw numbers of their own
        set_seed((config.seed + accelerator.process_index) % 2**32)

    @property
    def parts(self) -> dict[str, Stateful]:
        """Everything with a state of its own."""
        return {**self.game.parts, "random": self.random, "journal": self.journal, "health": self.health}

    def resume(self) -> None:
        """Go on from a checkpoint, if the configuration asks for it and there is one."""
        found: Checkpoint | None = None
        with together():
            if self.main and self.config.resume == "auto":
                found = newest_intact(self.folder / "checkpoints", _say)
            elif self.main and self.config.resume is not None:
                found = read_checkpoint(Path(self.config.resume))
        place = from_main(str(found.folder) if found else "")
        if not place:
            return
        with together():
            checkpoint = found or read_checkpoint(Path(place))
            self.config.require_same_run(checkpoint.facts["config"])
            self.feed.restore(checkpoint.facts)
            checkpoint.restore(self.parts)
        facts = checkpoint.facts
        self.step = self.saved = self.first_step = checkpoint.step
        self.game.skipped_in_a_row = facts["skipped"]
        self.seconds_before, self.best = facts["seconds"], facts["best"]
        if self.main:
            self._begin(checkpoint.texts[METRICS])
            _say(f"going on from {checkpoint.folder}, step {self.step}")
            if facts["processes"] != self.accelerator.num_processes:
                _say(f"with {self.accelerator.num_processes} processes instead of {facts['processes']}: other batches")

    def go(self) -> Result:
        """Train to the end, or until something stops it, and close the run."""
        stream, start, stop = self._stream(self.feed.batches()), time.perf_counter(), Stop.NO
        progress = tqdm(
            initial=self.step,
            total=self.config.steps,
            desc=str(self.folder),
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file wants a line now and then
            disable=not self.main,
        )
        try:
            with progress, closing(stream), Signals() as signals:
                while self.step < self.config.steps:
                    self.step += 1
                    stats = self._take_step(stream)
                    seconds = time.perf_counter() - start
                    try:
                        shown = self._write(stats, self.seconds_before + seconds)
                    except UsageError as error:  # all processes are to learn of it
                        shown, self.mistake = None, error
                    progress.update()
                    if shown:
                        progress.set_postfix_str(shown, refresh=False)
                    stop = self._agreed_stop(signals.stop, seconds)
                    if stop is Stop.FAILED:
                        raise main_only(self.mistake or UsageError("the main process tells what could not be written"))
                    if stop is not Stop.NO or self._checkpoint_due:
                        self._save(self.seconds_before + seconds)
                    if stop is not Stop.NO:
                        break
                seconds = time.perf_counter() - start
                if self.checkpoints is not None:
                    self.checkpoints.wait()
        finally:
            if self.checkpoints is not None:
                self.checkpoints.wait()
        return self._close(stop, seconds)

    def _stream(self, real: Generator[Batch]) -> Generator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Real samples, latents and conditions of the batches to come, each process's share of them."""
        with closing(real):
            for number, (samples, labels) in enumerate(real, self.step * self.config.accumulation):
                conditions = {"labels": labels} if self.recipe.classes and labels is not None else {}
                yield samples, self._latents(number), conditions

    def _latents(self, number: int) -> Tensor:
        """Latents of a batch of the run, shape (batch_size, latent_size): this process's rows of what all draw alike.

        So a run does not depend on the number of processes that share it, nor on what was drawn before.
        """
        config, device, rank = self.config, self.accelerator.device, self.accelerator.process_index
        draw = torch.Generator(device).manual_seed(zlib.crc32(f"latents {config.seed} {number}".encode()))
        z = torch.randn(self._taken, config.latent_size, generator=draw, device=device)
        return z[rank * config.batch_size : (rank + 1) * config.batch_size]

    def _take_step(self, stream: Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]) -> Stats:
        stats = self.game.step(self.step, islice(stream, self.config.accumulation))
        skipped = self.game.skipped_in_a_row
        if self.config.max_skipped and skipped >= self.config.max_skipped:
            kept = f"; the checkpoint of step {self.saved} is kept" if self.saved else ""
            raise main_only(
                UsageError(
                    f"training diverged: a loss or gradient was not finite in {skipped} steps in a row, "
                    f"up to step {self.step}{kept}; lower --lr-generator and --lr-discriminator, or raise --r1 and --r2"
                )
            )
        return stats

    def _write(self, stats: Stats, seconds: float) -> str | None:
        """The main process's part of a step: evaluation, figures, pictures; returns what to show."""
        if not self.main or self.mistake is not None:
            return None
        config, step = self.config, self.step
        if self.checkpoints is None:  # nothing is written before a first step has gone through
            self._begin(None)
        last = step == config.steps
        if step % config.sample_every == 0 or last:
            self.journal.draw(step, self.game.average.network)
            if config.report:
                self._draw_maps()
        extra: dict[str, Any] = {"skipped": self.game.gac.skipped} if self.game.gac.skipped else {}
        if self._evaluation_due:
            extra |= self._evaluate().scores
            if not self.best or extra["frechet"] < self.best["frechet"]:
                self.best = {"step": step, "frechet": extra["frechet"]}
        if step == 1 or step % config.log_every == 0 or last or extra.keys() & {"frechet"}:
            if "d_gap" not in extra and (gap := self._gap(*self.watched)) is not None:
                extra["d_gap"] = gap
            shown = self.journal.note(step, stats, seconds, self.game.generator, extra)
            if config.report:
                self.report.refresh()
            return shown
        self.journal.take(stats)
        return None

    def _draw_maps(self) -> None:
        """What D wants changed in a few of the samples from the fixed latents."""
        labels = self.journal.labels
        write_stage(
            self.folder / "maps" / f"step-{self.step:07d}.png",
            self.game.average.network,
            self.game.discriminator,
            self.codec,
            self.journal.latents[:STRIPS],
            {} if labels is None else {"labels": labels[:STRIPS]},
        )

    def leave_report(self) -> None:
        """The last report, however the run has ended; of one that has written nothing there is none."""
        if self.config.report and self.main and self.checkpoints is not None:
            self.report.close()

    @property
    def _evaluation_due(self) -> bool:
        every = self.config.evaluation_interval
        return bool(every) and self.step % every == 0

    @property
    def _checkpoint_due(self) -> bool:
        every = self.config.checkpoint_every
        return bool(every) and (self.step % every == 0 or self._evaluation_due or self.step == self.config.steps)

    @property
    def _taken(self) -> int:
        return self.config.batch_size * self.accelerator.num_processes

    def _agreed_stop(self, asked: Stop, seconds: float) -> Stop:
        """Why to stop now, the same in all processes."""
        own = asked
        if self.config.max_hours is not None and seconds >= 3600 * self.config.max_hours:
            own = max(own, Stop.TIME)
        if self.goal and self.evaluation and self.evaluation[0] == self.step:
            own = max(own, Stop.GOAL if self.goal.is_met(self.evaluation[1].to_json()) else Stop.NO)
        if self.checkpoints is not None:
            try:
                self.checkpoints.check()
            except UsageError as error:
                self.mistake = error
        if self.mistake is not None:
            own = Stop.FAILED
        alone = self.accelerator.num_processes == 1
        if alone or self.step % AGREE_EVERY == 0 or self._checkpoint_due or self._evaluation_due:
            return Stop(max(everyones(own)))
        return Stop.NO

    def _save(self, seconds: float) -> None:
        self.random.collect()
        self.saved = self.step
        place = self.feed.facts()
        if self.checkpoints is None:
            return
        facts = {
            "config": self.config.to_json(),
            **place,
            "processes": self.accelerator.num_processes,
            "seconds": seconds,
            "skipped": self.game.skipped_in_a_row,
            "best": self.best,
        }
        keep = [int(self.best["step"])] if self.best else []
        self.checkpoints.save(self.step, self.parts, facts, {METRICS: self.journal.text()}, keep)

    def _begin(self, metrics: str | None) -> None:
        self.journal.begin(metrics)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.config.keep_checkpoints)
        self.checkpoints.forget_after(self.saved)

    def _evaluate(self) -> Evaluation:
        """The average generator's evaluation at this step."""
        if self.evaluation is None or self.evaluation[0] != self.step:
            config, device = self.config, self.accelerator.device
            train, test = self.feed.known(), self.data.test
            pictures = self._pictures(test)
            if self.features is None:
                samples = kind_of(self.recipe).samples
                self.features = make_features(self._pictures(train), pictures, config.seed, device, samples=samples)
            network = self.game.average.network
            stored, labels = generated_samples(
                network, self.recipe, self.feed.labels, config.evaluation_samples, config.seed, device
            )
            seen = self.data.train.values if isinstance(self.data.train, Decoded) else train.values
            figures = self.codec.figures(seen.cpu(), test.values.cpu(), stored.cpu())
            real, generated = pictures.values.to(device), self.codec.pictures(stored)
            found = evaluate(self.features, real, generated, labels, figures, test.split)
            self.evaluation = self.step, replace(found, d_gap=self._gap(train, test))
        return self.evaluation[1]

    def _gap(self, train: Decoded, held_out: Decoded) -> float | None:
        device, conditional = self.accelerator.device, bool(self.recipe.classes)
        return discriminator_gap(self.game.discriminator, self.codec, train, held_out, device, conditional)

    def _pictures(self, stored: Decoded) -> Decoded:
        return replace(stored, values=self.codec.pictures(stored.values))

    def _close(self, stop: Stop, seconds: float) -> Result:
        asked = stop in (Stop.TERMINATED, Stop.INTERRUPTED)
        if asked and self.main:
            how = "SIGTERM" if stop is Stop.TERMINATED else "Ctrl-C"
            _say(f"{how}: step {self.step} saved; go on with --resume auto --output-dir {self.folder}")
        if stop is Stop.INTERRUPTED:
            raise KeyboardInterrupt
        evaluation = None
        if self.main and not asked:
            save_network(self.folder / "generator", self.game.average.network, self.recipe)
            save_network(self.folder / "discriminator", self.game.discriminator, self.recipe)
            if self.config.evaluation_samples:
                evaluation = self._evaluate()
                write_json(self.folder / "evaluation.json", evaluation.to_json())
            write_card(self.folder, self.game.average.network, self.recipe, self.accelerator.device)
        self.accelerator.end_training()
        seen = (self.step - self.first_step) * self._taken * self.config.accumulation
        network = self.game.average.network.eval()
        return Result(self.folder, network, self.recipe, evaluation, seconds, seen / seconds, self.step, stop)


def _require_half_precision(config: Config, device: torch.device) -> None:
    if config.mixed_precision == "fp16" and device.type == "cpu":  # accelerate would train in float32 without a word
        raise UsageError("--mixed-precision fp16 needs a GPU, and this run is on the CPU; pass bf16 or no")


def _require_enough(config: Config, test: Decoded) -> None:
    if config.evaluation_samples and len(test) < FEWEST_TO_EVALUATE:
        raise UsageError(
            f"{len(test)} samples in split {test.split!r} are too few to evaluate against; "
            "pass --evaluation-samples 0, or another --test-split"
        )


def _say(text: str) -> None:
    tqdm.write(f"gac: {text}", file=sys.stderr)
