"""`ConjugateGradient`: steps along a conjugate direction under a metric, as a `torch.optim.Optimizer`.

    u = M^-1 g        d = u + beta d_previous        theta <- theta + lr d

The direction is one vector over all parameters: the inner products behind beta run over every parameter group.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gac_plugin.betas import BETAS, BetaRule, InnerProducts, conjugate_beta
from gac_plugin.errors import UsageError, known_name, resolve
from gac_plugin.metric import METRICS, Metric, Sharp
from gac_plugin.tensors import copy_, inner, inner_parts, total

State = dict[str, Any]


@dataclass
class Block:
    """The tensors of one parameter group that have a gradient, with what the group's settings say of them.

    Attributes:
        points: the parameters, moved in place.
        covectors: their gradients, left as they are.
        states: for each parameter the entries made by `new_state`, updated in place.
        metric: covectors -> directions.
        settings: the parameter group: `lr`, `maximize`, and what the metric reads.
    """

    points: list[Tensor]
    covectors: list[Tensor]
    states: list[State]
    metric: Metric
    settings: dict[str, Any]

    @property
    def rate(self) -> float:
        """The step along the gradient's own sign: up for `maximize`, down for a loss."""
        return self.settings["lr"] if self.settings["maximize"] else -self.settings["lr"]

    def kept(self, entry: str) -> list[Any]:
        return [state[entry] for state in self.states]


def new_state(parameter: Tensor, rule: BetaRule, metric: Metric) -> State:
    """Everything the optimizer remembers of one parameter.

    Returns:
        `step`: number of steps taken, an int. The metric's own tensors. For a rule other than `none`: `direction`, d-,
        of the parameter's shape, and `inner`, this parameter's share of <g-, u->, 0-dimensional, at least float32; for
        a rule that reads y also `covector`, g-. Directions and covectors have the sign of the gradient as it is given.
    """
    state: State = {"step": 0, **metric.init(parameter)}
    if rule.formula is not None:
        state["direction"] = torch.zeros_like(parameter)
        state["inner"] = inner_parts([state["direction"]], [state["direction"]])[0]
        if rule.uses_change:
            state["covector"] = torch.zeros_like(parameter)
    return state


def conjugate_step(blocks: Sequence[Block], rule: BetaRule, beta_max: float) -> Tensor | None:
    """One step of all blocks along their common conjugate direction.

    Every product is bilinear in gradients and directions, so the gradient of a loss (d then points uphill in it, and
    the step goes down) gives the same beta as the gradient of a score: the sign enters once, in `Block.rate`.

    Args:
        blocks: at least one.
        rule: the conjugacy rule.
        beta_max: bound on |beta|.

    Returns:
        beta, 0-dimensional and on the device; None for the rule `none`.
    """
    for block in blocks:
        for state in block.states:
            state["step"] += 1
    sharps = [block.metric.at(block.covectors, block.states, block.settings) for block in blocks]
    if rule.formula is None:
        for block, sharp in zip(blocks, sharps, strict=True):
            sharp.ascend_(block.points, block.covectors, block.rate)
        return None

    directions = [sharp(block.covectors) for block, sharp in zip(blocks, sharps, strict=True)]
    shares = [inner_parts(block.covectors, u) for block, u in zip(blocks, directions, strict=True)]
    products = _inner_products(blocks, sharps, directions, rule)
    products.gu = total([share for block in shares for share in block])
    beta = conjugate_beta(rule, products, beta_max)
    for block, u, share in zip(blocks, directions, shares, strict=True):
        _remember(block, share, rule)
        d = block.kept("direction")
        torch._foreach_mul_(d, beta.to(d[0].device, d[0].dtype))
        torch._foreach_add_(d, u)
        torch._foreach_add_(block.points, d, alpha=block.rate)
    return beta


def _inner_products(
    blocks: Sequence[Block], sharps: Sequence[Sharp], directions: Sequence[list[Tensor]], rule: BetaRule
) -> InnerProducts:
    """The products over all blocks at once: a vector of parameter space is the list of all their tensors."""
    g = [covector for block in blocks for covector in block.covectors]
    u = [tensor for direction in directions for tensor in direction]
    sizes = [len(block.covectors) for block in blocks]

    def sharp(vector: list[Tensor]) -> list[Tensor]:
        rest = iter(vector)
        return [
            tensor
            for size, sharp in zip(sizes, sharps, strict=True)
            for tensor in sharp([next(rest) for _ in range(size)])
        ]

    return InnerProducts(
        inner=inner,
        sharp=sharp,
        g=g,
        u=u,
        y=list(torch._foreach_sub(g, _kept(blocks, "covector"))) if rule.uses_change else None,
        d_previous=_kept(blocks, "direction"),
        gu_previous=total(_kept(blocks, "inner")),
    )


def _kept(blocks: Sequence[Block], entry: str) -> list[Any]:
    return [value for block in blocks for value in block.kept(entry)]


def _remember(block: Block, shares: list[Tensor], rule: BetaRule) -> None:
    copy_(block.kept("inner"), shares)
    if rule.uses_change:
        copy_(block.kept("covector"), block.covectors)


class ConjugateGradient(torch.optim.Optimizer):
    """Conjugate gradient steps without line search, for any model and loss; no closure.

    With `rule="none"` and `metric="adam"` it is `torch.optim.Adam(betas=(0, beta2))`, bit for bit and without Adam's
    first moment. Nothing in `step` waits for the device.

    Args:
        params: parameters or parameter groups. `lr`, `metric`, `beta2`, `eps` and `maximize` may differ between groups;
            `rule` and `beta_max` may not, since the conjugate direction is one vector over all groups.
        lr: step length along d, at least 0.
        rule: a name in `BETAS` or a `BetaRule`.
        metric: a name in `METRICS` or a `Metric`.
        beta_max: bound on |beta|, at least 0; `math.inf` for none.
        beta2: decay of the second moments of `adam` and `kronecker`, in [0, 1).
        eps: added to the diagonal of `adam` and `kronecker`, at least 0.
        maximize: ascend along the gradient instead of descending.

    Attributes:
        beta: the last step's beta, 0-dimensional and on the device; None before the first step and for rule `none`. It
            is for display and not part of the state.

    Raises:
        UsageError: an argument is out of range, unknown, or differs between groups where it may not; a parameter is
            complex; at `step`, a gradient is sparse.
    """

    beta: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        rule: str | BetaRule = "none",
        metric: str | Metric = "kronecker",
        beta_max: float = 0.5,
        beta2: float = 0.99,
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "rule": known_name(rule, BETAS),
                "metric": known_name(metric, METRICS),
                "beta_max": beta_max,
                "beta2": beta2,
                "eps": eps,
                "maximize": maximize,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, its settings checked.

        Raises:
            UsageError: see the class.
        """
        super().add_param_group(param_group)
        added, first = self.param_groups[-1], self.param_groups[0]
        try:
            _check_settings(added)
            for shared in ("rule", "beta_max"):
                if added[shared] != first[shared]:
                    raise UsageError(
                        f"{shared} must be the same in all parameter groups, because the conjugate direction is one "
                        f"vector over all of them; got {first[shared]!r} and {added[shared]!r}"
                    )
        except UsageError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, exactly, also for parameters of 16 bits.

        `torch.optim.Optimizer` casts what it loads to the parameter's type, and what has that type already stays in the
        memory that it was read into, where products of matrices may round in another way. Here each tensor is copied,
        in the type that a new state has.
        """
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        for index, (parameter, group) in zip(saved, parameters, strict=True):
            kept = state_dict["state"].get(index)
            if kept:
                new = new_state(parameter, resolve(group["rule"], BETAS, "rule"), _metric_of(group))
                for entry in kept.keys() & new.keys() - {"step"}:
                    self.state[parameter][entry] = new[entry].copy_(kept[entry])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: evaluated once with gradients enabled, for code that passes one; not needed.

        Returns:
            What the closure returned, or None.

        Raises:
            UsageError: a gradient is sparse, or a CUDA graph is being captured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rule = resolve(self.param_groups[0]["rule"], BETAS, "rule")
        blocks = [self._block(group, rule) for group in self.param_groups]
        blocks = [block for block in blocks if block.points]
        if blocks:
            _refuse_capture(blocks[0].points[0])
            self.beta = conjugate_step(blocks, rule, self.param_groups[0]["beta_max"])
        return loss

    def _block(self, group: dict[str, Any], rule: BetaRule) -> Block:
        metric = _metric_of(group)
        points = [parameter for parameter in group["params"] if parameter.grad is not None]
        covectors = [parameter.grad for parameter in points]
        for parameter, covector in zip(points, covectors, strict=True):
            if covector.layout != torch.strided:
                raise UsageError(
                    f"ConjugateGradient needs dense gradients, got a {covector.layout} gradient for a parameter of "
                    f"shape {tuple(parameter.shape)}; build embeddings with sparse=False"
                )
            if not self.state[parameter]:
                self.state[parameter] = new_state(parameter, rule, metric)
        return Block(points, covectors, [self.state[parameter] for parameter in points], metric, group)


def _refuse_capture(parameter: Tensor) -> None:
    """A graph would repeat for ever what the metrics do in one step, whose number they count on the CPU."""
    if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UsageError(
            "ConjugateGradient cannot be captured as a CUDA graph, since its metrics go by the number of the step; "
            "capture with torch.optim.Adam(..., capturable=True), or step without a graph"
        )


def _metric_of(group: dict[str, Any]) -> Metric:
    return resolve(group["metric"], METRICS, "metric")


def _check_settings(group: dict[str, Any]) -> None:
    resolve(group["rule"], BETAS, "rule")
    resolve(group["metric"], METRICS, "metric")
    for name, least, limit in (("lr", 0, math.inf), ("beta_max", 0, None), ("beta2", 0, 1), ("eps", 0, math.inf)):
        value = group[name]
        in_range = isinstance(value, (int, float)) and value >= least and (limit is None or value < limit)
        if not in_range:
            bound = "" if limit in (None, math.inf) else f" and below {limit}"
            raise UsageError(f"{name} must be a number of at least {least}{bound}, got {value!r}")
    for parameter in group["params"]:
        if parameter.is_complex():
            raise UsageError(
                f"ConjugateGradient needs real parameters, got {parameter.dtype} of shape {tuple(parameter.shape)}; "
                "pass torch.view_as_real(parameter) instead"
            )
