"""The page and the plots that `cost.py` and `scale.py` make of their figures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost_steps import DEFAULT, LAZY

Report = dict[str, Any]

WHAT = {
    "textbook": "textbook loop: two draws, D's parameter gradients thrown away in the G step",
    "dcgan example": "PyTorch's DCGAN example: one draw, D's halves one by one",
    "one-stage": "one-stage GAN training (Shen et al. 2021)",
    "r3gan": "R3GAN's step: relativistic, R1 and R2 every step",
    "flat fresh": "`fresh` written out by hand",
    "fresh": "**GAC `fresh`**",
    "flat fused": "`fused` written out by hand",
    "fused": "**GAC `fused`**",
    "fresh, CG": "`fresh`, `ConjugateGradient`",
    "fused, CG": "`fused`, `ConjugateGradient`",
    "fresh, lazy": f"`fresh`, R1 + R2 every {LAZY} steps",
    "fused, lazy": f"`fused`, R1 + R2 every {LAZY} steps",
    "fresh, CG, lazy": f"`fresh`, `ConjugateGradient`, R1 + R2 every {LAZY}",
    "fused, CG, lazy": f"`fused`, `ConjugateGradient`, R1 + R2 every {LAZY}",
    "fresh, penalty every step": "`fresh`, R1 + R2 every step",
    DEFAULT: f"`fresh`, metric `kronecker`, R1 + R2 every {LAZY}: what `gac train` does",
}
GOALS = (  # what, contender, base, goal
    ("`fused` to the textbook loop", "fused", "textbook", 0.67),
    ("`fresh` to the textbook loop", "fresh", "textbook", 0.86),
    ("`fused`, lazy penalty, to R3GAN's step", "fused, lazy", "r3gan", 0.5),
    ("`fresh`, lazy penalty, to R3GAN's step", "fresh, lazy", "r3gan", 0.5),
    ("GAC's own overhead, `fresh` to the same by hand", "fresh", "flat fresh", 1.02),
    ("GAC's own overhead, `fused` to the same by hand", "fused", "flat fused", 1.02),
)
HEAD = """# What does a training step cost?

```bash
python -m benchmarks.cost
```

GAC against the loops that people use, on the same networks and batches, the ways in turn within each round and the
order shifted from round to round. A figure is the median over rounds of the ratio of two times of one round, in
brackets the quartiles. On one thread of a CPU alone CPU time, else wall-clock time. Optimizers are
`torch.optim.Adam(foreach=True)` but G's where `ConjugateGradient` is named (rule `none`, metric `adam`). Written by the
script; figures in [results/cost.json](results/cost.json).

**Operations** are those of matrix products and convolutions, counted as they run; their ratio is the floor that a ratio
of times approaches as networks grow. In passes of one network over a batch (forward, backward to weights, to inputs):
the textbook loop D 3 3 3, G 2 1 1; `fresh` D 3 2 3, G 1 1 1; `fused` D 2 2 2, G 1 1 1. A first layer needs no backward
pass to its inputs where these are data, so the floor depends on the networks. For `fused` it lies between 2/3, D alone,
and 3/4, G alone: the goal of .67 asks for a G that costs nothing, or for time saved beside the arithmetic.

**Peak memory** is what tensors hold at the worst moment, networks, gradients and optimizer states among them.
"""
NOTES = """## Reading

- `fused` on the residual networks: spectral norm is no obstacle, since it depends on the weights alone. D runs twice a
  step in place of three times, and so does its power iteration.
- `fused` is a simultaneous step. Its covectors are those of D before its update, which costs quality:
  1.56 times the distance at equal time ([ABLATION.md](ABLATION.md)). The price of a step is not the price of a result.
- One-stage training is the cheapest of all: it does the arithmetic of `fused` in one backward pass, and moves both
  networks at once as `fused` does. PyTorch's DCGAN example, which many start from, costs nine tenths of the textbook
  loop; against it `fresh` is .96, .94 and .94 on one thread.
- Where memory exceeds the textbook loop's, it is G's activations, which GAC keeps while D is updated so that the same
  samples can be used again, where the textbook loop makes others.
- With the penalty every fourth step GAC still carries a quarter of R1 and R2. The goal of half of R3GAN's step lies
  below the floor of both schedules on all three networks; `fresh` with no penalty at all has a floor of .50 to .57.
- On a large GPU a step of networks as small as these takes as long as the CPU takes to launch its kernels: 5 ms for
  .4 G operations, which 16 bits do not shorten. Saved operations save nothing there, and what `fused` does beside the
  arithmetic is 13 to 16% of its step (`fresh` 5%, which may be noise). As a CUDA graph GAC's steps are 5 to 10 times as
  fast, 9 on the MLP also against the usual Adam's 4.7 ms, and within 3% of the same by hand. They can be captured
  because they wait for nothing on the GPU (`tests/test_cuda.py`), if the optimizers can: `ConjugateGradient` cannot. To
  the textbook loop's graph `fused` is then .72 to .85, to R3GAN's with the lazy penalty .52 to .73.
- On the GPU only the MLP was measured in full. Networks that fill it (the large ones of `benchmarks/cost.py`) were not
  yet, and memory was taken with the libraries' own in it, so it is left out. Operations are those of products and
  convolutions alone: the metric's orthogonal bases (QR) are not among them.
- What `gac train` does spends what `fresh` saves, and on small perceptrons a third of the textbook loop's step more, on
  the metric `kronecker` and the penalty. With the penalty the residual networks need twice the textbook loop's memory,
  for G's activations are kept through it.
- Two processes: what keeps them from .9 is gloo's all-reduce, which by itself leaves .47 of the perceptrons' pace and
  .85 of DCGAN's; sharing nothing they reach .96 and .95.
"""


def write(folder: Path) -> None:
    """COST.md and the plots, from the figures in `results`."""
    report, scale = (
        json.loads(file.read_text()) if file.exists() else {}
        for file in (folder / "results" / name for name in ("cost.json", "scale.json"))
    )
    (folder / "COST.md").write_text(page(report, scale))
    (folder / "plots").mkdir(exist_ok=True)
    for device, found in report.items():
        if cases := cases_of(found):
            draw(list(cases.values()), folder / "plots" / plot_of(device))
    if "sweeps" in scale:
        draw_sweeps(scale["sweeps"], folder / "plots" / "scale.png")


def command(device: str) -> str:
    """How the figures of another device than the CPU are made."""
    kind, dtype = device.split(", ")
    return "" if kind == "cpu" else f"`python -m benchmarks.cost --device {kind} --dtype {dtype} --threads 1`"


def cases_of(found: Report) -> dict[str, Report]:
    return {name: case for name, case in found.items() if "operations" in case}


def plot_of(device: str) -> str:
    return f"cost-{device.replace(', ', '-')}.png"


def page(report: Report, scale: Report) -> str:
    parts = [HEAD]
    for device, found in report.items():
        parts.append(f"## {device}\n\n{found['machine']}. {command(device)}\n")
        if cases := cases_of(found):
            parts.append(f"![Cost of a step in units of the textbook loop's](plots/{plot_of(device)})\n")
            parts.append(goals(cases))
        parts += [table(case) for case in cases.values()]
        if "default" in found:
            parts.append(default(found["default"].values()))
        if "compiled" in found:
            parts.append(compiled(found["compiled"]))
        if "captured" in found:
            parts.append(captured(found["captured"], device))
    return "\n".join([*parts, NOTES, *scaling(scale)])


def goals(cases: Mapping[str, Report]) -> str:
    """Goals against what was measured with each number of threads, and what the operations allow."""
    titles = [case["title"].split(",")[0] for case in cases.values()]
    lines = ["| goal | |" + "".join(f" {title} |" for title in titles), "|---|---|" + "---|" * len(titles)]
    for what, name, base, goal in GOALS:
        cells = []
        for case in cases.values():
            measured = " / ".join(figure(times[name][base][1], goal) for times in case["times"].values())
            floor = case["operations"][name] / case["operations"][base]
            cells.append(measured if floor == 1 else f"{measured}; floor {floor:.2f}")
        lines.append(f"| {what} | ≤ {goal} | " + " | ".join(cells) + " |")
    for name in ("fresh", "fused") if all("memory" in case for case in cases.values()) else ():
        shares = [figure(case["memory"][name] / case["memory"]["textbook"], 1.0) for case in cases.values()]
        lines.append(f"| peak memory of `{name}` to the textbook loop | ≤ 1 | " + " | ".join(shares) + " |")
    threads = " / ".join(next(iter(cases.values()))["times"])
    return f"Threads: {threads}. In bold where the goal is met.\n\n" + "\n".join(lines) + "\n"


def figure(value: float, goal: float) -> str:
    told = f"{value:.3f}"
    return f"**{told}**" if value <= goal else told


def table(case: Report) -> str:
    threads, memory, textbook = list(case["times"]), case.get("memory", {}), case["operations"]["textbook"]
    seconds = ", ".join(f"{1e3 * case['times'][n]['textbook']['seconds']:.1f} ms, threads {n}" for n in threads)
    held = f"{memory['textbook'] / 1e6:.1f} MB; " if memory else ""
    head = [
        "step",
        "operations",
        *(f"time, {n} thread{'s' * (n != '1')}" for n in threads),
        "time / operations",
        *(["memory"] if memory else []),
    ]
    lines = [
        f"### {case['title']}\n",
        f"The textbook step: {textbook / 1e9:.3g} G operations, {held}{seconds}.\n",
        "| " + " | ".join(head) + " |",
        "|---|" + "---|" * (len(head) - 1),
    ]
    for name, operations in case["operations"].items():
        share = operations / textbook
        times = [quartiles(case["times"][n][name]["textbook"]) for n in threads]
        above = case["times"][threads[0]][name]["textbook"][1] / share
        cells = [WHAT[name], f"{share:.3f}", *times, f"{above:.2f}"]
        cells += [f"{memory[name] / memory['textbook']:.2f}"] if memory else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def quartiles(values: tuple[float, float, float]) -> str:
    low, middle, high = values
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def default(found: Iterable[Report]) -> str:
    """A row for each contender of each case."""
    lines = [
        "### What `gac train` does\n",
        "`python -m benchmarks.cost --default`: one thread. All in units of the textbook loop's.\n",
        "| networks | step | time | operations | peak memory |",
        "|---|---|---|---|---|",
    ]
    for case in found:
        times, operations, memory = case["times"]["1"], case["operations"], case["memory"]
        for name in list(operations)[1:]:
            shares = (f"{figures[name] / figures['textbook']:.2f}" for figures in (operations, memory))
            cells = case["title"], WHAT[name], quartiles(times[name]["textbook"]), *shares
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compiled(found: Report) -> str:
    lines = [
        "### torch.compile\n",
        f"`python -m benchmarks.cost --compile`: {found['title']}; both networks compiled or neither, one thread.\n",
        "| step | to the textbook loop, not compiled | first turn, seconds |",
        "|---|---|---|",
    ]
    for name, figures in found["times"].items():
        lines.append(f"| {name} | {quartiles(figures['textbook'])} | {found['first turn, seconds'][name]:.1f} |")
    return "\n".join(lines) + "\n"


def captured(found: Sequence[Report], device: str) -> str:
    """A table for each case."""
    kind, dtype = device.split(", ")
    lines = [
        "### CUDA graphs\n",
        f"`python -m benchmarks.cost --device {kind} --dtype {dtype} --graphs`: {LAZY} steps, from one penalty to the "
        "next, as one graph, and the same step by step, with `Adam(capturable=True)` for both, which is slower step by "
        "step than the usual one. The last column is the ratio of two median times.\n",
    ]
    for case in found:
        times = {name: 1e6 * figures["seconds"] for name, figures in case["times"].items()}
        lines += [
            f"| {case['title']} | step by step, µs | as a graph, µs | times as fast | to the textbook loop's graph |",
            "|---|---|---|---|---|",
        ]
        for name, graph in ((name.removesuffix(", captured"), name) for name in times if name.endswith(", captured")):
            ratios = f"{times[name] / times[graph]:.1f} | {times[graph] / times['textbook, captured']:.3f}"
            lines.append(f"| {WHAT[name]} | {times[name]:,.0f} | {times[graph]:,.0f} | {ratios} |")
        lines.append("")
    return "\n".join(lines)


SCALE_HEAD = """## How does it grow?

```bash
python -m benchmarks.scale
```

"""


def scaling(scale: Report) -> list[str]:
    """The parts of the page that `scale.py` measures."""
    parts = [f"{SCALE_HEAD}{scale['machine']}.\n"] if scale else []
    if "sweeps" in scale:
        parts += ["DCGAN's networks, one thread.\n", sweeps(scale["sweeps"])]
        parts.append("![Cost of a step against batch, resolution and width](plots/scale.png)\n")
    if "processes" in scale:
        parts.append(processes(scale["processes"]))
    if "paper" in scale:
        parts.append(paper(scale["paper"]))
    return parts


def sweeps(found: Mapping[str, list[Report]]) -> str:
    lines = [
        "| sweep | batch | pixels | width | parameters | textbook, ms | `fresh` | operations | `fused` | operations |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for what, points in found.items():
        for point in points:
            sizes = " | ".join(str(size) for size in point["sizes"].values())
            cells = [
                f"{quartiles(point['ratio'][name])} | {point['operations'][name]:.3f}" for name in ("fresh", "fused")
            ]
            seconds = f"{point['parameters']:,} | {1e3 * point['seconds']:.1f}"
            lines.append(f"| {what} | {sizes} | {seconds} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def processes(found: Report) -> str:
    names = list(next(iter(found.values())))
    lines = [
        "### Two processes\n",
        "One thread each, gloo, each process with the whole batch: a step of one process alone, by a step of the two "
        "together. Goal 0.9. Beside them what the machine gives to two processes that share nothing, and to two that "
        "exchange as many numbers as there are gradients, by one all-reduce for each network, and are not "
        "`DistributedDataParallel`.\n",
        "| networks | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for title, shares in found.items():
        lines.append(f"| {title} | " + " | ".join(quartiles(shares[name]) for name in names) + " |")
    return "\n".join(lines) + "\n"


def paper(found: Report) -> str:
    rates = "; ".join(f"{rate:.3g} {what}" for what, rate in found["rates"].items())
    lines = [
        "### 8 and 64 GPUs, on paper\n",
        f"{found['title']}; D has {found['bytes']['D'] / 1e6:.1f} MB of gradients, G {found['bytes']['G'] / 1e6:.1f} "
        f"MB (float32). Operations are counted; these rates are assumed, not measured: {rates}. A ring all-reduce "
        "sends 2 (n - 1) / n of the bytes; the range is from no overlap with computation to as much as can be. GAC "
        "exchanges each network's gradient once in a step; the textbook loop under `DistributedDataParallel` exchanges "
        "D's a second time in the G step, to throw it away.\n",
        "| step | G operations a GPU | MB exchanged | efficiency, 8 GPUs | efficiency, 64 GPUs |",
        "|---|---|---|---|---|",
    ]
    for name, step in found["steps"].items():
        ranges = [f"{share['worst']:.2f} to {share['best']:.2f}" for share in step["efficiency"].values()]
        cells = [f"{step['operations'] / 1e9:.0f}", f"{step['bytes'] / 1e6:.1f}", *ranges]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(cases: Sequence[Report], file: Path) -> None:
    """For each case a bar for each contender, its floor as a mark."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(cases), figsize=(1.8 + 4.4 * len(cases), 5.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, case in zip(axes[0], cases, strict=True):
        names, times = list(case["operations"]), next(iter(case["times"].values()))
        middles = [times[name]["textbook"][1] for name in names]
        spread = [[abs(times[name]["textbook"][end] - times[name]["textbook"][1]) for name in names] for end in (0, 2)]
        floors = [case["operations"][name] / case["operations"]["textbook"] for name in names]
        colours = ["#0072B2" if name.startswith(("fresh", "fused", DEFAULT)) else "#B0B0B0" for name in names]
        axis.barh(names, middles, xerr=spread, color=colours, error_kw={"elinewidth": 0.8, "ecolor": "#444444"})
        axis.scatter(floors, names, marker="|", s=120, color="#D55E00", zorder=3, label="counted operations")
        axis.axvline(1, color="#888888", linewidth=0.8)
        axis.set(title=case["title"], xlabel="cost of a step / textbook loop")
        axis.title.set_fontsize(9)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=8, loc="upper right")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_sweeps(found: Mapping[str, list[Report]], file: Path) -> None:
    """A panel for each sweep: measured ratios with their quartiles, and counted operations as dashed lines."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.8), sharey=True, layout="constrained")
    for axis, (what, points) in zip(axes, found.items(), strict=True):
        sizes = [point["sizes"][what] for point in points]
        for name, colour in (("fresh", "#0072B2"), ("fused", "#D55E00")):
            low, middle, high = zip(*(point["ratio"][name] for point in points), strict=True)
            axis.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(sizes, middle, color=colour, marker="o", markersize=4, label=name)
            floors = [point["operations"][name] for point in points]
            axis.plot(sizes, floors, color=colour, linestyle="--", linewidth=0.9, label=f"{name}, operations")
        axis.axhline(1, color="#888888", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set(xlabel=what, ylim=(0.5, 1.1))
    axes[0].set_ylabel("cost of a step / textbook loop")
    axes[-1].legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)
