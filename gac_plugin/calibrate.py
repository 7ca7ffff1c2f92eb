"""Calibration: a discriminator is trained on until `refine` takes generated samples to where the real ones are.

    min_D  E_z h*(z) - E_x l(x) + R1        h*(z) = max_z' l(D(G(z'))) - proximity/2 ||z' - z||^2

G is held. `refine` climbs to the inner maximum at z*, where the derivative of h* with respect to D's parameters is that
of l(D(G(z*))) with z* held. So D compares real samples with refined ones, and no longer with those that G makes: where
refinement goes too far, l falls. It is the semi-dual of optimal transport from generated to real samples, with the cost
proximity/2 ||z* - z||^2 (Rout et al. 2022, "Generative modeling with optimal transport maps"); the samples move as in
Tanaka 2019, "Discriminator optimal transport". A discriminator as training leaves it tells where to go and not how far,
and has met the generator's latest weights rather than their average.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gac_plugin.cotangent import evaluating
from gac_plugin.errors import UsageError
from gac_plugin.penalties import GradientPenalty, logit_gradient
from gac_plugin.protocols import Logits
from gac_plugin.refine import refine

PENALTY = GradientPenalty(r1=0.1, r2=0.1, interval=4)


def calibrate(
    generator: nn.Module,
    discriminator: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Mapping[str, Any]]],
    updates: int = 800,
    steps: int = 3,
    learning_rate: float = 2e-3,
    decay: float = 0.99,
    penalty: GradientPenalty = PENALTY,
    output: str = "logit",
    logits: Callable[[Any], Tensor] | None = None,
    **refinement: Any,
) -> nn.Module:
    """A discriminator to refine with, once for a trained pair: some hundred updates are enough.

    Both networks stay as they are. Nothing is drawn at random but by the networks themselves and by methods with noise,
    so equal batches give equal weights.

    Args:
        generator: latents (and conditions) -> samples; in evaluation mode.
        discriminator: where to start from. Parameters that require no gradient stay as they are.
        batches: for each update real samples, latents (B, ...) and the conditions of both, {} for none. Large ones, of
            256 say, tell better where the refined samples are in the mean.
        updates: of D, at least 1; as many batches are taken.
        steps: of `refine` in each update: few, since h has its maximum near the start.
        learning_rate: of Adam, with betas (0, 0.99). It falls linearly to 0.
        decay: of the running average of D's weights, in [0, 1). D is noisy from one update to the next.
        penalty: keeps the logits smooth, with r1 at real and with r2 at refined samples.
        output, logits: see `refine`.
        refinement: other arguments of `refine`; pass the same afterwards.

    Returns:
        The average: another network, in evaluation mode, whose logit is no log-ratio of densities any more.

    Raises:
        UsageError: an argument is out of range, there are too few batches, or D's weights are not finite any more.
    """
    if not (updates >= 1 and 0 < learning_rate < math.inf and 0 <= decay < 1):
        raise UsageError(
            "calibrate needs updates of at least 1, a positive learning_rate and a decay in [0, 1), got "
            f"updates={updates}, learning_rate={learning_rate}, decay={decay}"
        )
    learner = deepcopy(discriminator)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    if not trained:
        raise UsageError("no parameter of the discriminator requires a gradient: call requires_grad_(True) before")
    average = AveragedModel(learner, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    optimizer = torch.optim.Adam(trained, learning_rate, betas=(0.0, 0.99))
    schedule = LinearLR(optimizer, 1.0, 0.0, updates)
    judge = Logits(learner, output, logits)
    taken = 0
    for real, z, conditions in islice(batches, updates):
        refined = refine(generator, learner, z, steps, output=output, logits=logits, **refinement, **conditions)
        with evaluating(generator), torch.no_grad():
            moved = generator(refined, **conditions)
        learner.train()
        with torch.enable_grad():
            loss = _transport_loss(judge, real, moved, conditions, penalty if penalty.is_due(taken) else None)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(learner)
        taken += 1
    if taken < updates:
        raise UsageError(f"there are {taken} batches for {updates} updates: pass more, or lower updates")
    network = average.module
    if not all(parameter.isfinite().all() for parameter in network.parameters()):
        raise UsageError(
            f"the discriminator's weights are not finite any more: lower the learning_rate, which is {learning_rate}"
        )
    return network.eval()


def _transport_loss(
    judge: Logits, real: Tensor, moved: Tensor, conditions: Mapping[str, Any], penalty: GradientPenalty | None
) -> Tensor:
    # E l(moved) - E l(real), and the penalty where it is due
    real, moved = (samples.detach().requires_grad_(penalty is not None) for samples in (real, moved))
    l_real, l_moved = judge(real, conditions), judge(moved, conditions)
    loss = l_moved.mean() - l_real.mean()
    if penalty is None:
        return loss
    return loss + penalty.of(
        logit_gradient(l_real, real) if penalty.r1 > 0 else None,
        logit_gradient(l_moved, moved) if penalty.r2 > 0 else None,
    )
