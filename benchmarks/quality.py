"""How long until a GAN is good, and over which learning rates does it become good at all? GAC beside its peers.

    python -m benchmarks.quality MNIST_FOLDER CIFAR_FOLDER --work FOLDER

writes results/quality.json, QUALITY.md and a plot, anew after each method.

Every method of benchmarks/peers.py is tried at the same number of learning rates for both networks, 5 x 5, briefly and
on a seed of its own. That grid answers the question of robustness. The best cell is then trained longer on other seeds,
with evaluations along the way: from these comes the time to the quality that the textbook loop ends with.

Time is steps times the CPU seconds of a step, which are measured for all methods in turn within one process: the
seconds of runs made at different hours on a shared machine cannot be compared.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.cells import Cells, add_device, new_figure, new_parser, save_plot, table, workers, write_report
from benchmarks.peers import METHODS, OURS, TEXTBOOK
from benchmarks.quality_runs import BATCH, EMA, SIZES, STUDIES, Bench

COMMAND = "python -m benchmarks.quality MNIST_FOLDER CIFAR_FOLDER --work FOLDER"
NEAR, TEN = 1.5, 10
GOALS = {TEXTBOOK: 1 / 4, "r3gan": 1 / 2, "r3gan-falling": 1 / 2, "recipe": 3 / 4, "recipe-falling": 3 / 4}
"""GAC's time to the target as a share of that of each of these, at most."""


# ---- what the figures say


def last(run: Mapping[str, Any], steps: int) -> float:
    """The Frechet distance at the end of a run; infinite if it did not get there."""
    curve = run["curve"]
    return curve[-1]["frechet"] if curve and curve[-1]["step"] == steps else math.inf


def finals(method: Mapping[str, Any]) -> list[float]:
    return [last(run, method["steps"]) for run in method["runs"]]


def end_of(method: Mapping[str, Any], what: str) -> str:
    """Precision or recall at the end, the median over the seeds that came to it."""
    values = [run[what] for run in method["runs"] if what in run]
    return f"{statistics.median(values):.2f}" if values else "-"


def reached_at(run: Mapping[str, Any], target: float) -> float:
    """The step at which the distance first falls to the target, its logarithm taken as linear between evaluations."""
    before = None
    for point in run["curve"]:
        if point["frechet"] <= target:
            if before is None or before["frechet"] <= point["frechet"]:
                return float(point["step"])
            way = math.log(before["frechet"] / target) / math.log(before["frechet"] / point["frechet"])
            return before["step"] + way * (point["step"] - before["step"])
        before = point
    return math.inf


def seconds_to(report: Mapping[str, Any], name: str, target: float) -> list[float]:
    """CPU seconds to the target, of every seed; infinite where it was not reached."""
    return [report["pace"][name] * reached_at(run, target) for run in report["methods"][name]["runs"]]


def gradients_per_step(method: Mapping[str, Any]) -> float:
    points = [run["curve"][-1] for run in method["runs"] if run["curve"]]
    return statistics.median(point["gradients"] / point["step"] for point in points) if points else math.nan


def target_of(report: Mapping[str, Any]) -> float:
    """The quality that the tuned textbook loop ends with: the median over seeds."""
    return statistics.median(finals(report["methods"][TEXTBOOK]))


def share_near(report: Mapping[str, Any], name: str, own: bool = False) -> float:
    """The share of cells within `NEAR` of the best cell of all methods, or of the method's own best."""
    ends = grid_ends(report["methods"][name])
    best = min(end for method in report["methods"].values() for end in grid_ends(method))
    return sum(end <= NEAR * (ends[0] if own else best) for end in ends) / len(ends)


def grid_ends(method: Mapping[str, Any]) -> list[float]:
    """The cells of a grid, best first; infinite where they diverged."""
    return sorted(math.inf if cell["frechet"] is None else cell["frechet"] for cell in method["grid"])


# ---- the page


def number(value: float, form: str = ".1f") -> str:
    return f"{value:{form}}" if math.isfinite(value) else "-"


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Median, and in brackets the best; a dash where it does not exist."""
    return f"{number(statistics.median(values), form)} ({number(min(values), form)})"


def speed_rows(report: Mapping[str, Any]) -> list[list[str]]:
    target = target_of(report)
    ours = statistics.median(seconds_to(report, OURS, target))
    rows = []
    for name, method in report["methods"].items():
        seconds, pace = seconds_to(report, name, target), report["pace"][name]
        steps = [reached_at(run, target) for run in method["runs"]]
        reached = sum(math.isfinite(one) for one in seconds)
        gradients = statistics.median(steps) * gradients_per_step(method)
        rows.append(
            [
                METHODS[name].title,
                f"{method['best'][0]:g}, {method['best'][1]:g}" + (" *" if at_the_edge(name, method["best"]) else ""),
                spread(finals(method)),
                ", ".join(end_of(method, what) for what in ("precision", "recall")),
                f"{reached}/{len(seconds)}",
                spread(seconds),
                number(ours / statistics.median(seconds) or math.inf, ".2f"),
                number(gradients, ",.0f"),
                f"{1000 * pace:.1f}",
            ]
        )
    return rows


def at_the_edge(name: str, best: Sequence[float]) -> bool:
    tried = METHODS[name].rates, METHODS[name].rates_d
    return any(rate in (rates[0], rates[-1]) for rate, rates in zip(best, tried, strict=True))


def robustness_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, method in report["methods"].items():
        ends = grid_ends(method)
        whole = [end for end in ends[:TEN] if math.isfinite(end)]
        deviation = statistics.stdev(whole) if len(whole) > 1 else 0.0
        rows.append(
            [
                METHODS[name].title,
                f"{share_near(report, name):.0%}",
                f"{share_near(report, name, own=True):.0%}",
                number(ends[0]),
                f"{statistics.mean(whole):.1f} +- {deviation:.1f}" if whole else "-",
                f"{sum(map(math.isinf, ends))}/{len(ends)}",
            ]
        )
    return rows


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Each goal and whether it was reached, as far as it has been measured."""
    methods, target = report["methods"], target_of(report)
    ours = statistics.median(seconds_to(report, OURS, target))
    lines = []
    for name, goal in GOALS.items():
        if name in methods:
            seconds = seconds_to(report, name, target)
            ratio = ours / statistics.median(seconds)
            arrived = sum(map(math.isfinite, seconds))
            told = f"{ratio:.2f}" if ratio else f"that one gets there in {arrived} of {len(seconds)} runs alone"
            lines.append(
                f"- GAC's time against {METHODS[name].title}: {told}, goal at most {goal:g}: "
                f"{'reached' if ratio <= goal else 'not reached'}."
            )
    faster = [
        METHODS[name].title
        for name in methods
        if name != OURS and statistics.median(seconds_to(report, name, target)) < ours
    ]
    lines.append(f"- Faster to the target than GAC: {'; '.join(faster) or 'none'}.")
    end = statistics.median(finals(methods[OURS]))
    better = [METHODS[name].title for name in methods if statistics.median(finals(methods[name])) < end]
    lines.append(f"- Better at the end than GAC: {'; '.join(better) or 'none'}.")
    share, theirs = share_near(report, OURS), share_near(report, TEXTBOOK)
    lines.append(
        f"- Robustness: GAC {share:.0%} of the cells, textbook Adam {theirs:.0%}, goal at least twice as many: "
        f"{'reached' if share >= 2 * theirs and share > 0 else 'not reached'}."
    )
    return lines


def study_lines(study: str, report: Mapping[str, Any]) -> list[str]:
    some = report["methods"][OURS]
    missing = [METHODS[name].title for name in METHODS if name not in report["methods"]]
    return [
        f"## {STUDIES[study].title}",
        "",
        f"{STUDIES[study].networks}; batch {BATCH}; {len(report['seeds'])} seeds of {some['steps']:,} steps; Frechet "
        f"distance of {report['samples']:,} samples against {report['real samples']:,} in {report['features']}; two "
        f"halves of the real ones are {report['floor']:.2f} apart. Target: {target_of(report):.1f}, the median "
        "that the tuned textbook loop ends with." + (f" Not measured yet: {'; '.join(missing)}." if missing else ""),
        "",
        *trained_elsewhere(report),
        *verdict(report),
        "",
        "### Time to the target",
        "",
        *table(
            (
                "method",
                "rates of G, D",
                "Frechet at the end",
                "precision, recall",
                "reached",
                "CPU s to the target",
                "GAC / method",
                "gradients of D to it",
                "ms a step",
            ),
            speed_rows(report),
        ),
        "",
        "### Robustness",
        "",
        *table(
            (
                "method",
                f"cells within {NEAR} x the best of all",
                f"within {NEAR} x its own best",
                "its best cell",
                "its best ten",
                "diverged",
            ),
            robustness_rows(report),
        ),
        "",
        "### The grids",
        "",
        *(line for name in report["methods"] for line in grid_lines(report, name)),
    ]


def trained_elsewhere(report: Mapping[str, Any]) -> list[str]:
    """Which methods were trained on another device than the CPU."""
    titles: dict[str, list[str]] = {}
    for name, method in report["methods"].items():
        if "device" in method:
            titles.setdefault(method["device"], []).append(METHODS[name].title)
    lines = [
        f"Trained with `--device cuda` on one {device}, from the same initial weights and on the same batches, but "
        f"with other latents; the seconds of a step are those of the CPU for them as well: {'; '.join(them)}."
        for device, them in titles.items()
    ]
    return [*lines, ""] if lines else []


def grid_lines(report: Mapping[str, Any], name: str) -> list[str]:
    cells = {(cell["lr_g"], cell["lr_d"]): cell["frechet"] for cell in report["methods"][name]["grid"]}
    rates_g, rates_d = (sorted(set(rates)) for rates in zip(*cells, strict=True))
    rows = [
        [f"{g:g}", *("diverged" if cells[g, d] is None else f"{cells[g, d]:.1f}" for d in rates_d)] for g in rates_g
    ]
    return [f"{METHODS[name].title}:", "", *table(("G \\ D", *(f"{d:g}" for d in rates_d)), rows), ""]


def page(studies: Mapping[str, Any]) -> str:
    """QUALITY.md."""
    lines = [
        "# Time to quality, and robustness",
        "",
        "```bash",
        COMMAND,
        "```",
        "",
        "Every method was tried at 5 x 5 learning rates on one seed that is not reported again, and its best cell then "
        "trained longer on other seeds; a star marks a best cell at the edge of its grid. Cells are chosen by the same "
        "test samples that long runs are judged by. All have the same networks and batches (extragradient takes two a "
        f"step) and running average of the generator (decay {EMA}, that of `gac train`, tuned for none). Medians over "
        "seeds, in brackets the best. CPU seconds are steps times the seconds of a step on one thread, which were "
        "measured for all methods in turn. A gradient of D is one backward pass through it over one batch. The "
        "classifiers whose features these are lie in [results/features/](results/features): trained again on another "
        "processor they come out different.",
        "",
        "Cells are short runs, so that of a slower method fewer are near the best of all; how many are near its own "
        "best stands beside it.",
        "",
        "That GAC's rates fall was decided after a measurement with the same seeds and test samples. The settings "
        "inside the metric `kronecker` (which sides turn, how often, how fast it forgets) were found in about 40 short "
        "runs on a further seed of these studies, judged by the same test samples; no other method had such runs "
        "beside its grid.",
        "",
        "![Frechet distance against CPU seconds, and the cells of the grids](plots/quality.png)",
        "",
    ]
    for study, report in studies.items():
        lines += study_lines(study, report)
    for study in STUDIES.keys() - studies.keys():
        lines += [f"## {STUDIES[study].title}", "", "Not measured yet.", ""]
    lines += ["## The methods", ""]
    lines += table(("method", "what it is"), [[method.title, method.about] for method in METHODS.values()])
    return "\n".join([*lines, ""])


def draw(studies: Mapping[str, Any]) -> Figure:
    figure, axes = new_figure(len(studies), 2, 7.0, 5.5)
    for (speed, cells), (study, report) in zip(axes, studies.items(), strict=True):
        for name, method in report["methods"].items():
            usual = name.removesuffix("-falling")
            style = {
                "label": METHODS[name].title,
                "color": [*(f"C{number}" for number in range(10)), "black"][list(METHODS).index(usual)],
                "linestyle": "-" if name in (usual, OURS) else "--",
                "linewidth": 2.2 if name in (OURS, TEXTBOOK) else 1.1,
            }
            runs = [run["curve"] for run in method["runs"]]
            shortest = min(map(len, runs))
            if shortest:
                seconds = [report["pace"][name] * point["step"] for point in runs[0][:shortest]]
                middle = [statistics.median(run[i]["frechet"] for run in runs) for i in range(shortest)]
                speed.plot(seconds, middle, **style)
            ends = [end for end in grid_ends(method) if math.isfinite(end)]
            cells.plot(range(1, len(ends) + 1), ends, marker="o", markersize=3, **style)
        best = min(grid_ends(method)[0] for method in report["methods"].values())
        cells.axhline(NEAR * best, color="#888888", linewidth=0.8)
        speed.axhline(target_of(report), color="#888888", linewidth=0.8)
        for axis, height, words in (
            (speed, target_of(report), "textbook's end"),
            (cells, NEAR * best, f"{NEAR} x the best of all"),
        ):
            where = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            axis.text(0.99, height, words, fontsize=8, color="#555555", **where)
        speed.set(title=STUDIES[study].title, xlabel="CPU seconds of training", ylabel="Frechet distance", yscale="log")
        cells.set(title="cells of the grid, best first", xlabel="cell", ylabel="Frechet distance", yscale="log")
        for axis in (speed, cells):
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.tick_params(axis="y", which="both", labelsize=8)
        cells.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def methods_of(earlier: Mapping[str, Any], now: Mapping[str, Any], tuning: int, steps: int) -> dict[str, Any]:
    """What was measured before, if it was under the same conditions."""
    same = all(earlier[what] == now[what] for what in ("features", "samples", "seeds"))
    same &= math.isclose(earlier["floor"], now["floor"], rel_tol=1e-3)  # the last digits depend on the processor
    methods = earlier["methods"] if same else {}
    return {name: one for name, one in methods.items() if (one["tuning steps"], one["steps"]) == (tuning, steps)}


def without_seconds(method: Mapping[str, Any]) -> dict[str, Any]:
    """For the file of results: what a run took is left out, since time is steps times the pace."""
    runs = [
        {
            **run,
            "curve": [{what: value for what, value in point.items() if what != "seconds"} for point in run["curve"]],
        }
        for run in method["runs"]
    ]
    return {**method, "runs": runs}


def main() -> None:
    parser = new_parser(__doc__, 5, SIZES)
    parser.add_argument("mnist", metavar="MNIST_FOLDER", help="MNIST in Hub layout")
    parser.add_argument("cifar", metavar="CIFAR_FOLDER", help="CIFAR-10 in Hub layout")
    parser.add_argument(
        "--only", choices=STUDIES, nargs="+", default=list(STUDIES), help="these data sets; figures of the other stay"
    )
    parser.add_argument(
        "--methods",
        choices=METHODS,
        nargs="+",
        default=list(METHODS),
        help="these methods; figures of the others stay, if seeds and samples are the same",
    )
    add_device(parser)
    arguments = parser.parse_args()
    folders = {"mnist": arguments.mnist, "cifar": arguments.cifar}
    file = arguments.out / "results" / "quality.json"
    studies: dict[str, Any] = json.loads(file.read_text())["studies"] if file.exists() else {}
    with workers(arguments.processes) as pool:
        for study in arguments.only:
            cells = Cells(arguments.work / "quality", pool)
            size, seeds = SIZES[arguments.size], range(arguments.seeds)
            bench = Bench(study, folders[study], cells, seeds, size, arguments.device)
            print(STUDIES[study].title, flush=True)
            report = bench.prepare(list(METHODS))
            known = methods_of(studies.get(study, report), report, size.tuning[study], size.steps[study])
            needed = [name for name in (TEXTBOOK, OURS) if name not in known]
            for name in dict.fromkeys((*needed, *arguments.methods)):
                known[name] = without_seconds(bench.measure(name))
                report["methods"] = {one: known[one] for one in METHODS if one in known}
                if OURS in known:
                    studies[study] = report
                    write_report(arguments.out, "quality", {"command": COMMAND, "studies": studies}, page(studies))
                    save_plot(arguments.out, "quality", draw(studies))


if __name__ == "__main__":
    main()
