"""The command line: `gac train | sample | refine | evaluate | explain | report | publish | demo | info`."""

import argparse
import json
import math
import platform
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gac_plugin import (
    BETAS,
    LOSSES,
    METRICS,
    PENALTIES,
    REFINEMENTS,
    SCORES,
    Refined,
    __version__,
    refine,
)
from gac_plugin.demo import launch
from gac_plugin.errors import UsageError, exit_code
from gac_plugin.strategy import SCHEDULES
from gac_plugin.train import OneLineParser
from gac_plugin.train import add_arguments as add_train_arguments
from gac_plugin.train import run as run_train
from gac_plugin.training.assess import DATA_SETTINGS, RESAMPLES, assess, table
from gac_plugin.training.calibration import calibrated
from gac_plugin.training.card import CARD, TRAINING
from gac_plugin.training.config import PRESETS, Config, field_type
from gac_plugin.training.data import codec_of
from gac_plugin.training.files import COMPARISON, REPORT, write_json
from gac_plugin.training.generate import GENERATION_BATCH, class_labels, draw_latents, generate
from gac_plugin.training.hub import judge_folder, load_discriminator, load_generator, network_folder, read_recipe
from gac_plugin.training.judging.features import FEATURES
from gac_plugin.training.judging.maps import explain
from gac_plugin.training.networks import Recipe, adapter_names, adapter_options, find_adapter
from gac_plugin.training.publish import described, push_to_hub
from gac_plugin.training.report import write_reports

MOST_SAMPLES, MOST_STEPS = 100_000, 10_000
SPACES = ("latent", "sample")
MODEL = "run folder, saved generator, or USER/NAME on the Hub"
JUDGED = "run folder, or USER/NAME published with --discriminator"
LIBRARIES = ("torch", "accelerate", "datasets", "timm", "safetensors", "huggingface_hub", "numpy", "pillow")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gac`; returns the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="gac", description="Train GANs by gradient ascent along the discriminator's conjugate gradient direction."
    )
    parser.add_argument("--version", action="version", version=f"gac-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a GAN; with no flags on the embedded digits",
        description="Train a GAN with GAC. With no flags: real handwritten digits, embedded, in under two minutes.",
        allow_abbrev=False,
    )
    add_train_arguments(train)
    train.set_defaults(run=run_train)

    sample = commands.add_parser("sample", help="write generated samples to a file", allow_abbrev=False)
    _add_model(sample)
    sample.add_argument("--n", type=int, default=64, metavar="N", help="how many samples (default: 64)")
    sample.add_argument("--out", metavar="FILE", help="file to write (default: samples.png, or what suits the data)")
    sample.add_argument("--columns", type=int, metavar="N", help="samples in a row (default: a square)")
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the latents (default: 0)")
    sample.add_argument("--label", type=int, metavar="N", help="class to make (default: all of them in turn)")
    sample.add_argument("--truncation", type=float, metavar="T", help="keep latents within -T and T (default: off)")
    sample.set_defaults(run=_sample)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a generator against real samples, and look for training samples in it",
        description="Measure a generator against real samples, with floors and intervals, and look for training "
        "samples among what it makes. A run is measured against its own data, and its card is brought up to date.",
        allow_abbrev=False,
    )
    _add_model(evaluate)
    for item in fields(Config):
        if item.name in DATA_SETTINGS:
            kind = field_type(item.type)
            evaluate.add_argument(
                "--" + item.name.replace("_", "-"),
                type=kind,
                metavar="N" if kind is int else "NAME",
                default=argparse.SUPPRESS,
                help=item.metadata["help"].replace("%", "%%") + " (default: the run's)",
            )
    evaluate.add_argument(
        "--features",
        metavar="NAME",
        help="; ".join(
            f"{name}{':' + one.model if one.model else ''}: {one.description}" for name, one in FEATURES.items()
        )
        + " (default: classifier where there are labels, else pixels)",
    )
    evaluate.add_argument("--samples", type=int, metavar="N", help="generated samples (default: the run's, or 5000)")
    evaluate.add_argument("--seed", type=int, metavar="N", help="seed of latents and classifier (default: the run's)")
    evaluate.add_argument(
        "--bootstrap",
        type=int,
        default=RESAMPLES,
        metavar="N",
        help=f"resamples for the intervals; 0 for none (default: {RESAMPLES})",
    )
    evaluate.add_argument(
        "--memorisation",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look for training samples among generated ones",
    )
    evaluate.add_argument("--json", metavar="FILE", help="write everything there as JSON as well")
    evaluate.set_defaults(run=_evaluate)

    refined = commands.add_parser(
        "refine",
        help="write samples moved to where the discriminator finds them more real",
        description="Write samples moved to where the discriminator finds them more real; both networks are held.",
        allow_abbrev=False,
    )
    _add_model(refined, JUDGED)
    refined.add_argument("--steps", type=int, default=10, metavar="K", help="gradients of D (default: 10)")
    refined.add_argument("--n", type=int, default=64, metavar="N", help="how many samples (default: 64)")
    refined.add_argument("--out", metavar="FILE", help="file to write (default: refined.png, or what suits the data)")
    refined.add_argument("--compare", action="store_true", help="write each sample before and after, side by side")
    refined.add_argument("--seed", type=int, default=0, metavar="N", help="seed of latents and noise (default: 0)")
    refined.add_argument("--label", type=int, metavar="N", help="class to make (default: all of them in turn)")
    refined.add_argument("--method", default="conjugate", metavar="NAME", help=f"{', '.join(REFINEMENTS)} (gac info)")
    refined.add_argument("--rate", type=float, metavar="X", help="step length (default: the method's)")
    refined.add_argument("--prior", type=float, metavar="X", help="weight of the latents' log-prior (the method's)")
    refined.add_argument("--proximity", type=float, metavar="X", help="weight of staying near the start (the method's)")
    refined.add_argument("--rule", metavar="NAME", help="conjugacy rule of the methods that climb (the method's)")
    refined.add_argument("--space", choices=SPACES, default="latent", help="what moves (default: latent)")
    refined.add_argument(
        "--calibrate",
        type=int,
        metavar="N",
        help="first train D so long, on the run's data, that refined samples end where real ones are; left in "
        "MODEL/calibrated",
    )
    refined.add_argument("--discriminator", metavar="FOLDER", help="(default: MODEL/calibrated, else the model's own)")
    refined.set_defaults(run=_refine)

    demo = commands.add_parser("demo", help="try a generator out on a local web page", allow_abbrev=False)
    _add_model(demo)
    demo.add_argument("--port", type=int, metavar="N", help="port on 127.0.0.1 (default: a free one from 7860 on)")
    demo.set_defaults(run=_demo)

    explain = commands.add_parser(
        "explain", help="draw what D wants changed, and where in G it arrives", allow_abbrev=False
    )
    _add_model(explain, JUDGED)
    explain.add_argument("--n", type=int, default=8, metavar="N", help="how many samples (default: 8)")
    explain.add_argument("--out", default="explanation", metavar="DIR", help="folder (default: explanation)")
    explain.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the latents (default: 0)")
    explain.set_defaults(run=_explain)

    report = commands.add_parser(
        "report",
        help="write what there is to see of a run, or of several side by side, as one HTML file",
        description=f"Write RUN/{REPORT}, one file to open in a browser; with several runs also a comparison, into "
        f"the first one's folder as {COMPARISON}. A run that goes on is shown as far as it is.",
        allow_abbrev=False,
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    report.add_argument("--out", metavar="FILE", help="write this file alone: the run's report, or the comparison")
    report.add_argument("--open", action="store_true", help="open it in the browser")
    report.set_defaults(run=_report)

    publish = commands.add_parser(
        "publish",
        help="put the generator of a run on the Hub",
        description="Put the generator of a run on the Hub, with a card. Log in with `hf auth login` or set HF_TOKEN.",
        allow_abbrev=False,
    )
    publish.add_argument("run_folder", metavar="RUN", help="run folder")
    publish.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub, made if there is none")
    publish.add_argument("--dry-run", action="store_true", help="send nothing, and show all that would be sent")
    publish.add_argument("--private", action="store_true", default=None, help="for you alone, if it is made")
    publish.add_argument("--pull-request", action="store_true", help="propose it instead of changing the repository")
    publish.add_argument("--force", action="store_true", help="replace a different model")
    publish.add_argument(
        "--discriminator", action="store_true", help="with the discriminator, so that others can refine"
    )
    publish.add_argument(
        "--recipe",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"with the settings of the run as {TRAINING}, without local paths",
    )
    publish.add_argument("--license", metavar="ID", help="licence of the weights, such as mit or cc-by-4.0")
    publish.add_argument("--revision", metavar="BRANCH", help="branch, made if there is none (default: main)")
    publish.add_argument("--space", action="store_true", help="with a demo for the browser, a Space of the same name")
    publish.set_defaults(run=_publish)

    info = commands.add_parser("info", help="list losses, rules, metrics, adapters, versions, devices")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)
    return parser


def _add_model(command: argparse.ArgumentParser, what: str = MODEL) -> None:
    command.add_argument("model", metavar="RUN_OR_MODEL", help=what)
    command.add_argument("--revision", metavar="REVISION", help="branch, tag or commit on the Hub (default: main)")


def _sample(arguments: argparse.Namespace) -> None:
    columns = arguments.columns
    _require_between("--columns", 1 if columns is None else columns, 1, MOST_SAMPLES)
    folder, recipe, out = _asked_for(arguments, "samples")
    labels = None if arguments.label is None else class_labels(recipe, arguments.n, arguments.label)
    generator, truncation = load_generator(folder), arguments.truncation
    stored = generate(generator, recipe, arguments.n, arguments.seed, labels=labels, truncation=truncation)
    codec_of(recipe).write(out, stored, min(columns, arguments.n) if columns else None)
    print(f"{arguments.n} samples in {out}")


def _explain(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    for sentence in explain(arguments.model, out, arguments.n, arguments.seed, arguments.revision):
        print(f"- {sentence}")
    print(f"pictures in {out}")


def _report(arguments: argparse.Namespace) -> None:
    out = None if arguments.out is None else Path(arguments.out)
    written = write_reports([Path(folder) for folder in arguments.runs], out)
    for path in written:
        print(f"report in {path}")
    if arguments.open:
        webbrowser.open(written[-1].resolve().as_uri())


def _evaluate(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    found = assess(
        arguments.model,
        {name: given[name] for name in DATA_SETTINGS if name in given},
        arguments.features,
        arguments.samples,
        arguments.seed,
        arguments.bootstrap,
        arguments.memorisation,
        arguments.revision,
    )
    if arguments.json is not None:
        write_json(Path(arguments.json), found.to_json())
    print(table(found), end="")


def _refine(arguments: argparse.Namespace) -> None:
    _require_between("--steps", arguments.steps, 0, MOST_STEPS)
    folder, recipe, out = _asked_for(arguments, "refined")
    generator, codec = load_generator(folder), codec_of(recipe)
    options = {name: getattr(arguments, name) for name in ("method", "rate", "prior", "proximity", "rule")}
    discriminator = _judge(arguments, folder, generator, options)
    latents, labels = (
        draw_latents(recipe, arguments.n, arguments.seed),
        class_labels(recipe, arguments.n, arguments.label),
    )
    random, reports = torch.Generator().manual_seed(arguments.seed), list[Refined]()
    before, after = [], []
    for rows in torch.arange(arguments.n).split(GENERATION_BATCH):
        conditions: dict[str, Any] = {} if labels is None else {"labels": labels[rows]}
        further = {**options, **conditions, "steps": arguments.steps, "random": random, "report": reports.append}
        with torch.no_grad():
            before.append(generator(latents[rows], **conditions))
            if arguments.space == "sample":
                after.append(refine(None, discriminator, before[-1], **further))
            else:
                after.append(generator(refine(generator, discriminator, latents[rows], **further), **conditions))
    first, last = codec.to_stored(torch.cat(before)), torch.cat(after)
    if not last.isfinite().all():
        raise UsageError("the samples are not finite any more, the steps were too long: pass a smaller --rate")
    if arguments.compare:
        pairs = torch.stack([first, codec.to_stored(last)], dim=1).flatten(0, 1)
        codec.write(out, pairs, 2 * math.ceil(math.sqrt(arguments.n / 2)))
    else:
        codec.write(out, codec.to_stored(last))
    was, now, moved = (
        torch.cat([getattr(report, name) for report in reports]).mean().item()
        for name in ("logit_before", "logit_after", "moved")
    )
    print(
        f"{arguments.n} samples in {out}: mean logit {was:.3f} -> {now:.3f}, {arguments.space}s moved {moved:.3f} in "
        f"the mean, {reports[0].evaluations} evaluations of D's gradient"
    )


def _judge(arguments: argparse.Namespace, folder: Path, generator: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The discriminator to refine with: the one asked for, or the run's, calibrated if it has been or is to be."""
    place: str | Path = arguments.discriminator or arguments.model
    if arguments.discriminator or arguments.calibrate is not None or arguments.space == "sample":
        judge = network_folder(place, "discriminator", None if arguments.discriminator else arguments.revision)
    else:
        judge = judge_folder(place, arguments.revision)
    if judge == folder:
        raise UsageError(
            f"no discriminator in {str(place)!r}, and refinement needs one: name the run folder itself, or a "
            "model that was published with --discriminator"
        )
    discriminator = load_discriminator(judge)
    if arguments.calibrate is None:
        return discriminator
    _require_between("--calibrate", arguments.calibrate, 1, MOST_STEPS)
    if arguments.space == "sample":
        raise UsageError("--calibrate is for latents that move: leave out --space sample")
    return calibrated(Path(arguments.model), generator, discriminator, arguments.calibrate, **options)


def _asked_for(arguments: argparse.Namespace, name: str) -> tuple[Path, Recipe, Path]:
    """The generator's folder, its recipe and the file to write, after a look at the options about samples."""
    _require_between("--n", arguments.n, 1, MOST_SAMPLES)
    _require_between("--seed", arguments.seed, 0, 2**32 - 1)
    folder = network_folder(arguments.model, "generator", arguments.revision)
    recipe = read_recipe(folder)
    suffixes = codec_of(recipe).suffixes
    out = Path(arguments.out or f"{name}{suffixes[0]}")
    if out.suffix.lower() not in suffixes:
        raise UsageError(f"--out must end in one of {', '.join(suffixes)}; got {arguments.out!r}")
    if arguments.label is not None and not 0 <= arguments.label < recipe.classes:
        known = f"has the classes 0 to {recipe.classes - 1}" if recipe.classes else "was trained without classes"
        raise UsageError(f"--label {arguments.label} does not fit: the generator {known}")
    return folder, recipe, out


def _require_between(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UsageError(f"{name} must be between {least} and {most}, got {value}")


def _publish(arguments: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "run_folder", "repo_id")}
    done = push_to_hub(arguments.run_folder, arguments.repo_id, **options)
    if arguments.dry_run:
        for parcel in done.parcels:
            seen = "private" if arguments.private else "as the account's settings say, usually public"
            print(
                f"nothing was sent; to be sent to the {parcel.kind} {parcel.repo_id}, {arguments.revision or 'main'}:"
            )
            print(f"  if it is made: {seen}")
            for path, (size, digest) in described(parcel).items():
                print(f"  {path:<34} {size:>12,} bytes  sha256 {digest}")
            print(f"\n{CARD}:\n\n{parcel.files[CARD].decode()}")
    for url in done.urls:
        print(f"published: {url}")
    if arguments.license is None:
        print("no licence is named; --license cc-by-4.0, for example, says what others may do with the weights")


def _demo(arguments: argparse.Namespace) -> None:
    launch(arguments.model, "127.0.0.1", arguments.port, arguments.revision)


def _info(arguments: argparse.Namespace) -> None:
    facts = {
        "losses": _descriptions(LOSSES),
        "scores": _descriptions(SCORES),
        "rules": _descriptions(BETAS),
        "metrics": _descriptions(METRICS),
        "features": _descriptions(FEATURES),
        "refinements": _descriptions(REFINEMENTS),
        "penalties": {name: str(penalty) for name, penalty in PENALTIES.items()},
        "schedules": list(SCHEDULES),
        "adapters": {name: _adapter(name) for name in adapter_names()},
        "presets": PRESETS,
        "versions": {
            "gac-plugin": __version__,
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES},
        },
        "devices": _devices(),
    }
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for title, content in facts.items():
        print(title)
        for name, text in content.items() if isinstance(content, Mapping) else ((entry, "") for entry in content):
            print(f"  {name:<16} {text}".rstrip())


def _adapter(name: str) -> str:
    """What an adapter says of itself; one that cannot be used does not keep the others from being listed."""
    try:
        adapter = find_adapter(name)
        options = ", ".join(adapter_options(adapter))
        return adapter.description + (f"; options: {options}" if options else "")
    except UsageError as error:
        return f"(cannot be used: {error})"


def _descriptions(table: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry.description for name, entry in table.items()}


def _devices() -> list[str]:
    found = [f"cpu ({torch.get_num_threads()} threads)"]
    found += [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found
