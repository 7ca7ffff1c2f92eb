"""Does `ConjugateGradient` behave as theory says on quadratics and on two-dimensional games?

    python benchmarks/games.py        writes results/games.json and plots/{quadratic,bilinear,saddle}.png

1. Quadratic: n exact line searches along conjugate directions reach the optimum, for every rule and fixed metric.
2. Bilinear game: plain simultaneous steps spiral out, alternating ones keep to an ellipse, and negative momentum
   spirals in (Gidel et al. 2019). The same game with 20 coordinates for each player is the control.
3. Saddle: plain steps converge at the spectral radius of their step matrix.

No theory says what the conjugate rules do in games; it is measured. Where each player has one coordinate they reduce to
something simple: with d- near g-, PR gives d = g + (g - g-), the optimistic step (Daskalakis et al. 2018); HS gives
beta = -g/d-, so d = 0 unless capped, and then negative momentum; HZ gives beta = g/d-, that is d = 2g; DY has PR's
pattern with the sign turned, because kappa measures the opponent's move instead of a curvature.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from gac_plugin import BETAS, BetaRule, ConjugateGradient, Diagonal, Metric

Curve = NDArray[np.float64]
Figures = dict[str, Any]

N, CONDITION, SEED = 20, 1e3, 0
CASES = ("identity", "stretched, metric S^2", "stretched, identity", "log-spaced spectrum")
LR, CAP, STEPS, STARTS, PULL, SAME_RATE = 0.2, 0.5, 400, 3, 0.2, 1e-4
CONSTANT = -0.3
NEGATIVE = BetaRule("constant", lambda p: torch.full_like(p.gu, CONSTANT), "negative momentum", uses_change=False)
NAMES = {"simultaneous": "plain, simultaneous", "none": "plain, alternating", "constant": f"constant {CONSTANT}"}
PLAIN, FASTER, SLOWER, DIVERGES = "like plain alternating", "converges faster", "converges slower", "diverges"
COLOURS = {DIVERGES: "#D55E00", SLOWER: "#A0447E", PLAIN: "#444444", FASTER: "#0072B2"}


class Quadratic(NamedTuple):
    """f(t) = -1/2 <t - t*, A (t - t*)>, ascended from t = 0."""

    a: Tensor
    optimum: Tensor

    def error(self, point: Tensor) -> float:
        """|t - t*|_A, 1 at the start"""
        gap = self.optimum - point
        return float(((gap @ self.a @ gap) / (self.optimum @ self.a @ self.optimum)).sqrt())


def random_quadratic(eigenvalues: Tensor, generator: torch.Generator) -> Quadratic:
    axes, _ = torch.linalg.qr(torch.randn(N, N, generator=generator))
    a = axes * eigenvalues @ axes.T
    return Quadratic((a + a.T) / 2, torch.randn(N, generator=generator))


def climb(problem: Quadratic, metric: str | Metric, rule: BetaRule) -> Curve:
    """Errors of t <- t + alpha d with the exact alpha = <g, d> / <d, A d>; d is what a unit step moves a probe at 0."""
    probe, point = torch.zeros(N, requires_grad=True), torch.zeros(N)
    optimizer = ConjugateGradient([probe], 1.0, rule, metric, beta_max=math.inf, maximize=True)
    errors = [1.0]
    for _ in range(N + 5):
        g = problem.a @ (problem.optimum - point)
        probe.grad = g
        torch.nn.init.zeros_(probe)
        optimizer.step()
        d = probe.detach()
        point = point + (g @ d) / (d @ problem.a @ d) * d
        errors.append(problem.error(point))
    return np.array(errors)


def textbook_error(problem: Quadratic, number: Callable[[float], Any]) -> float:
    """Error after n steps of textbook conjugate gradients in the arithmetic of `number`: rounding or mistake?"""
    a, optimum = (np.vectorize(number, otypes=[object])(part.numpy()) for part in problem)
    point, r = optimum * 0, a @ optimum
    d = r
    for _ in range(N):
        alpha = (r @ r) / (d @ a @ d)
        point, r_new = point + alpha * d, r - alpha * (a @ d)
        d, r = r_new + (r_new @ r_new) / (r @ r) * d, r_new
    gap = optimum - point
    return math.sqrt(float(gap @ a @ gap) / float(optimum @ a @ optimum))


def measure_quadratic() -> tuple[Figures, dict[str, dict[str, Curve]]]:
    """Errors at step n, and all curves. A -> S A S stretches the coordinates, and the metric M = S^2 must undo that."""
    generator = torch.Generator().manual_seed(SEED)
    even = random_quadratic(torch.linspace(1, CONDITION, N), generator)
    crowded = random_quadratic(torch.logspace(0, math.log10(CONDITION), N), generator)
    s = torch.logspace(-0.5, 0.5, N)[torch.randperm(N, generator=generator)]
    stretched = Quadratic(s[:, None] * even.a * s, even.optimum / s)
    square = Metric("fixed", lambda _: {}, lambda *_: Diagonal([s.square()]), "M = S^2, the same at every step")
    settings = [(even, "identity"), (stretched, square), (stretched, "identity"), (crowded, "identity")]
    curves = {
        case: {name: climb(*setting, rule) for name, rule in BETAS.items()}
        for case, setting in zip(CASES, settings, strict=True)
    }
    with localcontext(prec=60):
        exact = textbook_error(crowded, Decimal)
    figures: Figures = {
        "theory": f"in exact arithmetic: error 0 at step {N} for every rule but none, under any fixed metric",
        "error at step n": {case: {name: e[N] for name, e in rules.items()} for case, rules in curves.items()},
        "textbook CG on the log-spaced spectrum": {"float64": textbook_error(crowded, float), "60 digits": exact},
        "reading": "where eigenvalues crowd, float64 loses conjugacy: that delay is rounding and not the rules",
    }
    return figures, curves


class Game(NamedTuple):
    """min_x max_y  a/2 |x|^2 + <x, B y> - a/2 |y|^2,  with its equilibrium at 0."""

    a: float
    b: Tensor

    def x_slope(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a * x + self.b @ y

    def y_slope(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b.T @ x - self.a * y


def play(game: Game, start: Tensor, rule: BetaRule, alternating: bool = True) -> tuple[Tensor, float]:
    """Both players step with `ConjugateGradient`: the points (steps + 1, 2n), and the share of steps with beta = 0."""
    x, y = (part.clone().requires_grad_() for part in start.chunk(2))
    down = ConjugateGradient([x], LR, rule, "identity", beta_max=CAP)
    up = ConjugateGradient([y], LR, rule, "identity", beta_max=CAP, maximize=True)
    points, zeros = [start], 0
    for _ in range(STEPS):
        with torch.no_grad():
            x.grad, y.grad = game.x_slope(x, y), game.y_slope(x, y)
            down.step()
            if alternating:
                y.grad = game.y_slope(x, y)
            up.step()
        points.append(torch.cat([x, y]).detach())
        zeros += sum(player.beta is None or float(player.beta) == 0 for player in (down, up))
    return torch.stack(points), zeros / (2 * STEPS)


def spectral_radius(game: Game, beta: float = 0.0, extrapolation: float = 0.0, alternating: bool = True) -> float:
    """Largest |eigenvalue| of one step along d = g + extrapolation (g - g-) + beta d-, without safeguards."""

    def step(state: Tensor) -> Tensor:
        x, y, gx_old, gy_old, dx, dy = state.chunk(6)
        gx = game.x_slope(x, y)
        dx = gx + extrapolation * (gx - gx_old) + beta * dx
        x_new = x - LR * dx
        gy = game.y_slope(x_new if alternating else x, y)
        dy = gy + extrapolation * (gy - gy_old) + beta * dy
        return torch.cat([x_new, y + LR * dy, gx, gy, dx, dy])

    matrix = torch.stack([step(unit) for unit in torch.eye(6 * len(game.b))], dim=1)
    return float(np.abs(np.linalg.eigvals(matrix.numpy())).max())


def measure_game(game: Game) -> tuple[Figures, dict[str, Tensor]]:
    """Figures of every way to play, over random starts, and the points of the first start."""
    n, generator = len(game.b), torch.Generator().manual_seed(SEED)
    starts = torch.nn.functional.normalize(torch.randn(STARTS, 2 * n, generator=generator))
    ways = {"simultaneous": (BETAS["none"], False)} | {rule.name: (rule, True) for rule in (*BETAS.values(), NEGATIVE)}
    plays = {name: [play(game, start, *way) for start in starts] for name, way in ways.items()}
    rates = {name: [growth(points) for points, _ in runs] for name, runs in plays.items()}
    theory = theory_of(game) if n == 1 else {}
    figures: Figures = {
        name: {
            "rate": np.mean(rates[name]),
            "rate of each start": rates[name],
            "theory": theory.get(name),
            "outcome": outcome(np.mean(rates[name]), np.mean(rates["none"])),
            "share of beta = 0": np.mean([zeros for _, zeros in runs]),
        }
        for name, runs in plays.items()
    }
    figures |= {name: value for name, value in theory.items() if name not in plays}
    return figures, {name: runs[0][0] for name, runs in plays.items()}


def theory_of(game: Game) -> dict[str, float]:
    """Growth of the distance per step: largest eigenvalues, and for plain steps with B = 1 the closed forms."""
    return {
        "simultaneous": spectral_radius(game, alternating=False),
        "none": spectral_radius(game),
        "constant": spectral_radius(game, beta=CONSTANT),
        "closed form, simultaneous: sqrt((1 - lr a)^2 + lr^2)": math.hypot(1 - LR * game.a, LR),
        "closed form, alternating: 1 - lr a": 1 - LR * game.a,
        "reference, constant beta at the cap": spectral_radius(game, beta=CAP),
        "reference, constant beta at minus the cap": spectral_radius(game, beta=-CAP),
        "reference, optimistic steps d = 2g - g-": spectral_radius(game, extrapolation=1.0),
    }


def growth(points: Tensor) -> float:
    """Growth of |(x, y)| per step: slope of its logarithm over the last two thirds."""
    log_distance = points.norm(dim=1).log().numpy()[STEPS // 3 :]
    return math.exp(np.polyfit(np.arange(len(log_distance)), log_distance, 1)[0])


def outcome(rate: float, plain: float) -> str:
    if rate > 1 + SAME_RATE:
        return DIVERGES
    if abs(rate - plain) <= SAME_RATE:
        return PLAIN
    return FASTER if rate < plain else SLOWER


def exact_orbits(points: dict[str, Tensor]) -> Figures:
    """Bilinear: |(x, y)| = sqrt(1 + lr^2)^t simultaneous; x^2 + y^2 - lr x y is conserved alternating."""
    spiral = math.hypot(1, LR) ** torch.arange(STEPS + 1)
    x, y = points["none"].T
    kept = x.square() + y.square() - LR * x * y
    return {
        "simultaneous, largest relative error": float((points["simultaneous"].norm(dim=1) / spiral - 1).abs().max()),
        "alternating, largest relative drift": float((kept / kept[0] - 1).abs().max()),
    }


def plot_quadratic(curves: dict[str, dict[str, Curve]]) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 4.2), sharey=True)
    titles = ("identity metric", "coordinates stretched up to 10:1, fixed metric")
    for axes, case, title in zip(panels, CASES[:2], titles, strict=True):
        for name, errors in curves[case].items():
            axes.semilogy(errors, "o-", ms=3, lw=1, color=COLOURS[DIVERGES if name == "none" else FASTER])
        axes.axvline(N, color="#444444", lw=0.8, ls=":")
        axes.text(N - 0.4, 3e-16, f"step n = {N}", ha="right", color="#444444")
        axes.text(1, 1e-5, "all 7 conjugate rules\n(on top of each other)", color=COLOURS[FASTER])
        axes.text(25.5, 0.045, "steepest ascent", color=COLOURS[DIVERGES], ha="right")
        axes.set(title=title, xlabel="step (one exact line search each)", ylim=(1e-16, 30), xticks=range(0, N + 6, 5))
    panels[1].semilogy(curves["stretched, identity"]["pr+"], "--", lw=1, color="#444444")
    panels[1].text(4, 1, "PR+ without the metric", color="#444444")
    panels[0].set_ylabel("error in the A norm, relative to the start")
    figure.suptitle(f"Every conjugate rule solves a {N}-dimensional quadratic in {N} steps; steepest ascent does not")
    return figure


def plot_distances(axes: Axes, figures: Figures, plays: dict[str, Tensor], steps: int, gap: float) -> None:
    """Distance from the equilibrium against the step, coloured by outcome; dashed where theory gives the rate."""
    ends = []
    for name, points in plays.items():
        distance, colour = points.norm(dim=1).numpy()[: steps + 1], COLOURS[figures[name]["outcome"]]
        axes.semilogy(distance, lw=1.2, color=colour)
        ends.append((math.log10(distance[-1]), NAMES.get(name, name.upper()), colour))
        if figures[name]["theory"]:
            axes.semilogy(figures[name]["theory"] ** np.arange(steps + 1), "k--", lw=0.9, zorder=3)
    for text in [text for text in COLOURS if any(figures[name]["outcome"] == text for name in plays)]:
        axes.plot([], color=COLOURS[text], label=text)
    axes.plot([], "k--", lw=0.9, label="theory (plain, constant)")
    axes.set(xlabel="step (each player moves once)", xlim=(0, steps))
    label_ends(axes, sorted(ends), gap)


def label_ends(axes: Axes, ends: list[tuple[float, str, str]], gap: float) -> None:
    """Write each (log10 height, text, colour), in rising order, right of the axes, at least `gap` decades apart."""
    heights = np.array([height for height, _, _ in ends])
    for _ in range(200):
        push = np.clip(gap - np.diff(heights), 0, None) / 2
        heights[:-1] -= push
        heights[1:] += push
    for height, (_, text, colour) in zip(heights, ends, strict=True):
        where = (1.02, 10**height)
        axes.annotate(text, where, xycoords=("axes fraction", "data"), color=colour, va="center", fontsize=9)


def plot_bilinear(games: dict[str, tuple[Figures, dict[str, Tensor]]]) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 4.8), sharey=True)
    for axes, (title, (figures, plays)) in zip(panels, games.items(), strict=True):
        plot_distances(axes, figures, plays, steps=300, gap=0.62)
        axes.set(title=title, ylim=(1e-4, 1e12))
    panels[0].set_ylabel("distance from the equilibrium (start = 1)")
    panels[0].legend(frameon=False, loc="upper left", fontsize=9)
    figure.suptitle(
        "Bilinear game: FR-PR and PR+ damp the cycle, FR, DY, HZ blow it up; in 20-D little damping is left"
    )
    return figure


def plot_saddle(figures: Figures, plays: dict[str, Tensor]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.8))
    for name, style in (("simultaneous", ":"), ("none", "-"), ("fr-pr", "-"), ("dy", "-")):
        colour, label = COLOURS[figures[name]["outcome"]], NAMES.get(name, name.upper())
        left.plot(*plays[name][:41].T, style, marker=".", ms=3, lw=1, color=colour, label=label)
    left.plot(0, 0, "k+", ms=10)
    left.set(title="paths of the first 40 steps", xlabel="x (minimises)", ylabel="y (maximises)")
    left.set_aspect("equal", adjustable="datalim")
    left.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    plot_distances(right, figures, plays, steps=150, gap=0.5)
    right.set(title="all rules", ylabel="distance from the equilibrium (start = 1)", ylim=(1e-5, 1e5))
    right.legend(frameon=False, loc="upper left", fontsize=9)
    figure.suptitle("Saddle: plain steps converge at the rate of theory; FR-PR and PR+ are faster, DY diverges")
    return figure


def save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_table(report: Figures) -> None:
    print(f"quadratic: error at step n = {N} | " + " | ".join(CASES))
    for name in BETAS:
        print(f"  {name:14}" + "".join(f"{report['quadratic']['error at step n'][case][name]:10.1e}" for case in CASES))
    for game in ("bilinear", "bilinear, 20 coordinates", "saddle"):
        print(f"{game}: growth of the distance per step | theory | outcome")
        for name in ("simultaneous", *BETAS, "constant"):
            figures = report[game][name]
            theory = f"{figures['theory']:.5f}" if figures["theory"] else "-"
            print(f"  {name:14}{figures['rate']:10.5f}{theory:>10}  {figures['outcome']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Check ConjugateGradient against theory on quadratics, bilinear games and saddles (about 25 s)."
    )
    help_out = "folder that gets results/games.json and plots/*.png (default: the folder of this script)"
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help=help_out)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    mpl.use("Agg")
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5})

    quadratic, curves = measure_quadratic()
    bilinear, bilinear_plays = measure_game(Game(0.0, torch.eye(1)))
    wide, wide_plays = measure_game(Game(0.0, torch.diag(torch.linspace(0.1, 1, N))))
    saddle, saddle_plays = measure_game(Game(PULL, torch.eye(1)))
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "command": "python benchmarks/games.py",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "settings": {
            "quadratic": f"n {N}, condition number {CONDITION:g}, seed {SEED}, beta_max inf, exact line search",
            "games": f"lr {LR}, beta_max {CAP}, identity metric, {STEPS} steps, {STARTS} random starts, seed {SEED}",
            "saddle": f"a {PULL}, b 1",
            "bilinear, 20 coordinates": "B = diag(0.1 to 1, evenly); rotations change nothing",
            "rate": "growth of |(x, y)| per step over the last two thirds; alternating steps unless named otherwise",
            "outcome": f"of the mean rate, against plain alternating steps, with a tolerance of {SAME_RATE}",
        },
        "quadratic": quadratic,
        "bilinear": bilinear | {"exact orbits": exact_orbits(bilinear_plays)},
        "bilinear, 20 coordinates": wide,
        "saddle": saddle,
    }
    panels = {"one coordinate per player": (bilinear, bilinear_plays), "20 coordinates per player": (wide, wide_plays)}
    for folder in ("results", "plots"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "results" / "games.json").write_text(json.dumps(report, indent=2) + "\n")
    save(plot_quadratic(curves), out / "plots" / "quadratic.png")
    save(plot_bilinear(panels), out / "plots" / "bilinear.png")
    save(plot_saddle(saddle, saddle_plays), out / "plots" / "saddle.png")
    print_table(report)


if __name__ == "__main__":
    main()
