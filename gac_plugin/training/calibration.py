"""`gac refine --calibrate`: the discriminator of a run, calibrated on the data that the run was trained on."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gac_plugin.calibrate import calibrate
from gac_plugin.errors import UsageError
from gac_plugin.training.config import make_config, read_config
from gac_plugin.training.data import load_data
from gac_plugin.training.data.feed import Batch, Feed
from gac_plugin.training.data.streaming import Stream
from gac_plugin.training.files import CALIBRATED, MARK
from gac_plugin.training.hub import read_recipe, save_network

BATCH = 256
"""Samples in an update, or more where the run has taken more: with fewer it depends on chance what comes of it."""


def calibrated(run: Path, generator: nn.Module, discriminator: nn.Module, updates: int, **refinement: Any) -> nn.Module:
    """Calibrate the discriminator of a run, and leave it in the run's folder `calibrated/discriminator`.

    The same number of updates gives the same weights: batches and latents are those of the run's seed.

    Args:
        run: the run folder.
        generator, discriminator: of the run.
        updates: of the discriminator.
        refinement: of `refine`, as the samples are to be refined later.

    Raises:
        UsageError: the folder is no run, or its data cannot be loaded; see also `calibrate`.
    """
    if not ((run / MARK).is_file() and (run / "generator").is_dir()):
        raise UsageError(f"{str(run)!r} is no run folder and does not tell its data; --calibrate needs one")
    config, recipe = make_config({"cpu": True}, earlier=read_config(run / MARK)), read_recipe(run / "generator")
    data = load_data(config)
    most = BATCH if isinstance(data.train, Stream) else min(BATCH, len(data.train))
    config = replace(config, batch_size=max(config.batch_size, most))
    draw = torch.Generator().manual_seed(config.seed)

    def with_latents(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        progress.update()
        real, labels = batch
        z = torch.randn(len(real), recipe.latent_size, generator=draw)
        return real, z, {"labels": labels} if recipe.classes and labels is not None else {}

    stream: Generator[Batch] = Feed(config, data, 0, 1, torch.device("cpu")).batches()
    with closing(stream), tqdm(total=updates, desc="calibrating D", unit="update", disable=None) as progress:
        network = calibrate(generator, discriminator, map(with_latents, stream), updates, **refinement)
    save_network(run / CALIBRATED / "discriminator", network, read_recipe(run / "discriminator"))
    return network
