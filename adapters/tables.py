"""Tables: CTGAN (Xu et al. 2019, the package `ctgan`) with GAC's step in place of the loop inside its `fit`.

The package's column transformers, conditional sampler, networks, `sample`, `save` and `load` stay. One step:

    ctgan   draw rows, update the critic with WGAN-GP; draw rows again, update the generator
    here    draw rows once, update the critic; covectors of the updated critic at those rows, pulled back
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gac_plugin.conjugate import ConjugateGradient
from gac_plugin.errors import UsageError
from gac_plugin.losses import Loss, Score
from gac_plugin.penalties import GradientPenalty
from gac_plugin.strategy import GAC, Stats

try:
    from ctgan import CTGAN
    from ctgan.synthesizers.base import random_state
    from ctgan.synthesizers.ctgan import Discriminator
except ImportError as error:
    raise ImportError('gac_plugin.adapters.tables wraps ctgan; pip install "gac-plugin[ctgan]"') from error

FEWEST_ROWS = 2
"""A mixture of Gaussians, ctgan's model of a numeric column, needs two values."""

SLOPE = GradientPenalty(r1=0.1, r2=0.1)
"""A pack's logit depends on `pac` rows at once, so a weaker penalty than for single samples is enough."""


class GACCTGAN(CTGAN):
    """`ctgan.CTGAN`, trained by GAC; used in its place, with its arguments by keyword.

    The critic judges packs of `pac` rows with their conditions, so a sample here is a pack, and the penalty is on the
    slope of a pack's logit. The generator's own extra loss, the cross entropy between a row's discrete column and the
    value that was asked for, is minimised beside the score:

        g = (1/P) sum_i J_i^T c_i - d cross_entropy / d theta          P = batch_size / pac packs

    Args:
        loss, score, penalty: see `GAC`.
        rule, metric: of the generator's `ConjugateGradient`; its rate is `generator_lr`, its beta2 .9 as in ctgan.
        options: ctgan's own. `generator_decay` must stay 0.

    Raises:
        UsageError: `batch_size` is not a multiple of `pac`, or `generator_decay` is not 0.
    """

    _epochs: int
    _verbose: bool

    def __init__(
        self,
        *,
        loss: str | Loss = "bce",
        score: str | Score | None = None,
        penalty: str | GradientPenalty | None = SLOPE,
        rule: str = "none",
        metric: str = "adam",
        **options: Any,
    ) -> None:
        super().__init__(**{"generator_decay": 0.0} | options)
        if self._batch_size % self.pac:
            raise UsageError(
                f"batch_size={self._batch_size} is not a multiple of pac={self.pac}; the critic judges packs of "
                f"{self.pac} rows"
            )
        if self._generator_decay:
            raise UsageError(
                f"generator_decay={self._generator_decay}: ConjugateGradient has no weight decay; leave it out"
            )
        self._game: dict[str, Any] = {"loss": loss, "score": score, "penalty": penalty}
        self._conjugacy: dict[str, Any] = {"rule": rule, "metric": metric}

    def fit(self, train_data: pd.DataFrame | np.ndarray, discrete_columns: Iterable[Any] = ()) -> None:
        """Train on a table.

        Args:
            train_data: rows by columns, at least two rows; numbers, but for the discrete columns.
            discrete_columns: names of the columns that hold categories; their numbers, for an array.

        Raises:
            UsageError: the table cannot be learned; see `require_table`.
        """
        discrete_columns = list(discrete_columns)
        require_table(train_data, discrete_columns)
        epochs, verbose = self._epochs, self._verbose
        self._epochs, self._verbose = 0, False  # so that it prepares transformers, sampler and generator, and no more
        try:
            super().fit(train_data, discrete_columns)
        finally:
            self._epochs, self._verbose = epochs, verbose
        self._train(self._transformer.transform(train_data).astype("float32"))

    @random_state
    def _train(self, rows: np.ndarray) -> None:
        """Train the generator on the transformed rows, (rows, width)."""
        width = rows.shape[1] + self._data_sampler.dim_cond_vec()
        critic = PackCritic(Discriminator(width, self._discriminator_dim, pac=self.pac)).to(self._device)
        optimizer = ConjugateGradient(self._generator.parameters(), self._generator_lr, beta2=0.9, **self._conjugacy)
        critic_optimizer = torch.optim.Adam(
            critic.parameters(), self._discriminator_lr, betas=(0.5, 0.9), weight_decay=self._discriminator_decay
        )
        gac = GAC(self._generator, critic, optimizer, critic_optimizer, **self._game)
        steps = max(len(rows) // self._batch_size, 1)
        history = []
        for epoch in range(self._epochs):
            for _ in range(steps):
                stats = self._step(gac, rows)
            history.append((epoch, float(stats["loss_g"]), float(stats["loss_d"])))
            if self._verbose:
                print("epoch {}: generator {:.3f}, critic {:.3f}".format(*history[-1]))  # noqa: T201
        self.loss_values = pd.DataFrame(history, columns=["Epoch", "Generator Loss", "Discriminator Loss"])

    def _step(self, gac: GAC, rows: np.ndarray) -> Stats:
        """`discriminator_steps` updates of the critic, then one of the generator at the last samples."""
        for _ in range(self._discriminator_steps):
            real, condition, mask = self._draw(rows)
            z = torch.randn(self._batch_size, self._embedding_dim, device=self._device)
            raw = self._generator(torch.cat([z, condition], dim=1))
            fake, conditions = self._packs(self._apply_activate(raw)), self._packs(condition)
            stats = gac.discriminator_step(self._packs(real), fake, condition=conditions)
        missed = fake.new_zeros(()) if mask is None else self._cond_loss(raw, condition, mask)
        stats |= gac.generator_step(_Beside.apply(fake, missed), self._packs(real), condition=conditions)
        return stats | {"loss_g": stats["loss_g"] + missed.detach()}

    def _draw(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
        """Real rows with a condition that each of them meets: rows (B, width), conditions (B, C), mask (B, columns).

        Without discrete columns C is 0 and there is no mask.
        """
        drawn = self._data_sampler.sample_condvec(self._batch_size)
        if drawn is None:
            real = self._data_sampler.sample_data(rows, self._batch_size, None, None)
            return self._tensor(real), self._tensor(real[:, :0]), None
        condition, mask, columns, values = drawn
        real = self._data_sampler.sample_data(rows, self._batch_size, columns, values)
        return self._tensor(real), self._tensor(condition), self._tensor(mask)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _packs(self, rows: Tensor) -> Tensor:
        """(B, width) -> (B / pac, pac, width)"""
        return rows.unflatten(0, (-1, self.pac))


class _Beside(torch.autograd.Function):
    """(samples, loss) -> samples; whatever gradient is pulled back through them, the loss's own goes with it."""

    @staticmethod
    def forward(ctx: Any, samples: Tensor, loss: Tensor) -> Tensor:
        return samples.view_as(samples)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


class PackCritic(nn.Module):
    """ctgan's critic on packs: rows (P, pac, width) with conditions (P, pac, C) -> logits (P, 1)."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, rows: Tensor, condition: Tensor) -> Tensor:
        return self.critic(torch.cat([rows, condition], dim=2).flatten(0, 1))


def require_table(table: pd.DataFrame | np.ndarray, discrete_columns: list[Any]) -> None:
    """Refuse a table that no model of its columns can be fitted to.

    Raises:
        UsageError: no table, too few rows, no columns, unknown columns, text, or numbers that are not finite.
    """
    if isinstance(table, np.ndarray) and table.ndim == 2:
        table = pd.DataFrame(table).infer_objects()
    if not isinstance(table, pd.DataFrame):
        raise UsageError(f"a table is a pandas.DataFrame or an array of two dimensions, got {type(table).__name__}")
    rows, columns = table.shape
    if rows < FEWEST_ROWS or columns == 0:
        raise UsageError(
            f"the table has {rows} rows and {columns} columns; at least {FEWEST_ROWS} rows and one column are needed"
        )
    unknown = [column for column in discrete_columns if column not in table.columns]
    if unknown:
        raise UsageError(f"discrete columns {unknown} are not in the table; its columns are {list(table.columns)}")
    numbers = table.drop(columns=discrete_columns)
    text = list(numbers.select_dtypes(exclude="number").columns)
    if text:
        raise UsageError(f"columns {text} do not hold numbers; name them in discrete_columns, or leave them out")
    bad = numbers.columns[~np.isfinite(numbers.to_numpy(dtype="float64", na_value=np.nan)).all(axis=0)]
    if len(bad):
        raise UsageError(f"columns {list(bad)} have missing or infinite numbers; fill them in, or drop those rows")
