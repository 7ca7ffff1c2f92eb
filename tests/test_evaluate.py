"""Figures against reference libraries and closed forms; features by name; what an evaluation says."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image as Picture
from sklearn.neighbors import NearestNeighbors
from torch import nn

from gac_plugin.errors import UsageError
from gac_plugin.training import train
from gac_plugin.training.assess import assess
from gac_plugin.training.config import Config
from gac_plugin.training.data import load_data
from gac_plugin.training.data.source import Decoded
from gac_plugin.training.judging import features as features_module
from gac_plugin.training.judging.evaluate import Features, evaluate, frechet_distance, make_features, precision_recall
from gac_plugin.training.judging.features import FEATURES, find_kind
from gac_plugin.training.judging.measures import MEASURES, coverage, density, intervals, kernel_distance, measure
from gac_plugin.training.judging.memorisation import discriminator_gap

CPU = torch.device("cpu")


def normal(n: int, mean: float, scale: float, size: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed)) * scale + mean


class Same(nn.Module):
    """A feature extractor for reference libraries: images that are the features."""

    num_features = 6

    def forward(self, x):
        return x.flatten(1)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of 400 real and 400 generated samples, neither equal nor far apart."""
    return normal(400, 0.0, 1.0), normal(400, 0.3, 0.8, seed=1) @ torch.eye(6).add(0.2)


def test_the_frechet_distance_agrees_with_the_matrix_square_root():
    a, b = normal(200, 0.0, 1.0), normal(150, 0.3, 1.5, seed=1) @ torch.randn(6, 6)
    x, y = a.double().numpy(), b.double().numpy()
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all extracted features:UserWarning")
def test_the_distances_agree_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = pair()
    frechet = FrechetInceptionDistance(feature=Same())
    kernel = KernelInceptionDistance(feature=Same(), subsets=1, subset_size=len(real))
    for reference in (frechet, kernel):
        reference.update(real.double(), real=True)
        reference.update(generated.double(), real=False)
    assert frechet_distance(real, generated) == pytest.approx(float(frechet.compute()), rel=1e-3)
    assert kernel_distance(real, generated) == pytest.approx(float(kernel.compute()[0]), rel=1e-3)
    assert kernel_distance(real, generated) > 0.05


def test_the_kernel_distance_agrees_with_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, generated = pair()
    settings = {"kid_subsets": 1, "kid_subset_size": len(real), "verbose": False}
    expected = kid_features_to_metric(real.double(), generated.double(), **settings)["kernel_inception_distance_mean"]
    assert kernel_distance(real, generated) == pytest.approx(expected, rel=1e-3)


def test_the_kernel_distance_of_sets_of_different_size_is_the_mean_over_all_pairs():
    x, y = normal(7, 0.0, 1.0).double(), normal(4, 0.5, 1.0, seed=1).double()

    def mean(a, b, same=False):
        values = [(float(p @ q) / 6 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not same or i != j]
        return sum(values) / len(values)

    assert kernel_distance(x, y) == pytest.approx(mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y), rel=1e-10)


@pytest.mark.parametrize(("neighbours", "names"), [(3, ("precision", "recall")), (5, ("density", "coverage"))])
def test_the_shares_agree_with_prdc(neighbours, names, monkeypatch):
    import prdc.prdc
    from sklearn.metrics import pairwise_distances

    alone = SimpleNamespace(pairwise_distances=lambda *sets, **options: pairwise_distances(*sets))
    monkeypatch.setattr(prdc.prdc, "sklearn", SimpleNamespace(metrics=alone))  # else it starts 8 processes
    real, generated = pair()
    expected = prdc.prdc.compute_prdc(real.double().numpy(), generated.double().numpy(), nearest_k=neighbours)
    found = measure(real, generated)
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name
        assert 0.1 < found[name] < 0.99


def test_equal_sets_are_at_distance_zero_even_where_features_are_degenerate():
    a = normal(50, 1.0, 1.0)
    a[:, 2] = 0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_precision_and_recall_agree_with_nearest_neighbours_counted_by_scikit_learn():
    real, generated = normal(1300, 0.0, 1.0, size=3), normal(1100, 0.4, 0.7, size=3, seed=1)

    def inside(points, manifold):
        distances, _ = NearestNeighbors(n_neighbors=4).fit(manifold).kneighbors(manifold)
        return (scipy.spatial.distance.cdist(points, manifold) <= distances[:, 3]).any(axis=1).mean()

    precision, recall = precision_recall(real, generated)
    assert precision == pytest.approx(inside(generated.numpy(), real.numpy()), abs=2e-3)
    assert recall == pytest.approx(inside(real.numpy(), generated.numpy()), abs=2e-3)
    assert recall < precision < 1


def test_a_narrow_generator_is_precise_and_forgets():
    real, generated = normal(500, 0.0, 1.0, size=2), normal(500, 0.0, 0.05, size=2, seed=1)
    precision, recall = precision_recall(real, generated)
    assert precision > 0.95
    assert recall < 0.2
    assert density(real, generated) > 1
    assert coverage(real, generated) < 0.2


def test_intervals_are_as_wide_as_figures_of_fresh_samples_spread():
    """The standard deviation over independent pairs of sets, against what one pair tells of it, on average."""

    def sets(seed):
        return normal(120, 0.0, 1.0, seed=seed), normal(160, 0.4, 0.8, seed=1000 + seed)

    drawn = [measure(*sets(seed)) for seed in range(80)]
    told = []
    for seed in range(10):
        found = drawn[seed]
        told.append(intervals(*sets(seed), found, 40, seed))
        for name, (low, high) in told[-1].items():
            assert low < found[name] < high
    for name in MEASURES:
        spread = torch.tensor([values[name] for values in drawn]).std()
        width = torch.tensor([one[name][1] - one[name][0] for one in told]).mean() / (2 * 1.96)
        assert 0.7 < width / spread < 1.4, name


def test_an_evaluation_says_what_it_measured():
    features = Features("first pixel row", lambda pixels: pixels[:, 0, 0].float())
    real = torch.randint(0, 256, (80, 1, 3, 3), dtype=torch.uint8)
    generated = torch.randint(0, 256, (60, 1, 3, 3), dtype=torch.uint8)
    result = evaluate(features, real, generated, split="test")
    assert (result.features, result.real_samples, result.generated_samples) == ("first pixel row", 80, 60)
    assert result.frechet == pytest.approx(frechet_distance(real[:, 0, 0].float(), generated[:, 0, 0].float()))
    assert result.floor == result.floors["frechet"] > 0
    assert set(result.floors) == set(MEASURES)
    plain = {"features", "split", "floor", "floors", "real_samples", "generated_samples", *MEASURES}
    assert set(result.to_json()) == plain
    sure = evaluate(features, real, generated, split="test", resamples=5).to_json()
    assert set(sure) == plain | {"intervals", "interval_method", "resamples"}
    assert sure["interval_method"].startswith("95% intervals by 5 half-samples of both sets")
    assert {name: sure[name] for name in plain} == result.to_json()


def test_the_fewest_samples_that_may_be_evaluated_can_be():
    features = Features("pixels", lambda pixels: pixels.flatten(1).float())
    pixels = torch.randint(0, 256, (16, 1, 3, 3), dtype=torch.uint8)
    result = evaluate(features, pixels[:8], pixels[8:], resamples=3)
    assert all(np.isfinite(value) for edges in result.intervals.values() for value in edges)


# features by name


def digits() -> tuple[Decoded, Decoded]:
    data = load_data(Config())
    return data.train, data.test


def test_labelled_data_give_a_classifier_s_features_the_same_each_time(monkeypatch, tmp_path):
    train, test = digits()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(features_module, "_learn", partial(features_module._learn, steps=150))
    trained = make_features(train, test, seed=3, device=CPU)
    assert trained.name.startswith("64 features of a classifier trained on this data set (accuracy 9")
    assert trained.accuracy == (trained.classify(trained.extract(test.values)) == test.labels).float().mean()
    (file,) = (tmp_path / "gac-plugin").iterdir()
    assert file.suffix == ".safetensors"
    monkeypatch.setattr(features_module, "_learn", lambda *_: pytest.fail("the cache is not used"))
    cached = make_features(train, test, seed=3, device=CPU)
    assert trained.extract(test.values).shape == (360, 64)
    assert torch.equal(trained.extract(test.values), cached.extract(test.values))
    assert trained.name == cached.name


def test_a_kept_classifier_gives_its_features_on_another_machine(monkeypatch, tmp_path):
    train, test = digits()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(features_module, "_learn", partial(features_module._learn, steps=20))
    trained = make_features(train, test, seed=3, device=CPU)
    (file,) = (tmp_path / "gac-plugin").iterdir()
    assert file.stem == features_module.fingerprint(train, 3)
    kept = features_module.kept_features(file, test, CPU)
    assert torch.equal(kept.extract(test.values), trained.extract(test.values))
    assert torch.equal(kept.classify(kept.extract(test.values)), trained.classify(trained.extract(test.values)))
    assert (kept.name, kept.accuracy) == (trained.name, trained.accuracy)


def test_a_cached_classifier_is_of_its_data_and_seed_and_whole(monkeypatch, tmp_path):
    train, test = digits()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    learned = []
    monkeypatch.setattr(features_module, "_learn", lambda *_: learned.append(True))
    other = Decoded(train.values, (train.labels + 1) % 10, train.split)
    for data, seed in ((train, 0), (train, 0), (train, 1), (other, 0)):
        make_features(data, test, seed, CPU)
    assert len(learned) == 3
    for file in (tmp_path / "gac-plugin").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    make_features(train, test, 0, CPU)
    assert len(learned) == 4
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file"))
    make_features(train, test, 0, CPU)


@pytest.mark.parametrize("label", [None, 0, -1], ids=["no labels", "one class", "labels withheld"])
def test_data_without_labels_to_learn_give_principal_components(label):
    pixels = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    images = Decoded(pixels, None if label is None else torch.full((40,), label), "train")
    features = make_features(images, images, seed=0, device=CPU)
    assert features.name == "16 principal components of the pixels in [0, 1]"
    extracted = features.extract(pixels).double()
    covariance = torch.cov((pixels.double() / 255).flatten(1).T)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(extracted.var(0), eigenvalues, rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match="need class labels, and the data set has none; pass --features pixels"):
        make_features(images, images, 0, CPU, "classifier")


def pictures(channels: int) -> Decoded:
    return Decoded(torch.randint(0, 256, (3, channels, 20, 20), dtype=torch.uint8), None, "train")


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_a_backbone_of_timm_sees_what_timm_would_show_it(monkeypatch, channels):
    images, build, asked = pictures(channels), timm.create_model, []

    def without_download(*args, pretrained, **options):
        asked.append(pretrained)
        return build(*args, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", without_download)
    torch.manual_seed(1)
    features = make_features(images, images, 0, CPU, "timm:test_resnet", samples="audio clips")
    assert asked == [True]
    assert features.name == "96 features of timm's test_resnet.r160_in1k, at 160x160 pixels, on pictures of audio clips"
    torch.manual_seed(1)
    network = build("test_resnet", num_classes=0).eval()
    config = {**timm.data.resolve_model_data_config(network), "interpolation": "bicubic", "crop_pct": 1.0}
    transform = timm.data.create_transform(**config)
    shown = [
        Picture.fromarray(image).convert("RGB") for image in images.values.expand(-1, 3, -1, -1).movedim(1, 3).numpy()
    ]
    with torch.no_grad():
        expected = network(torch.stack([transform(picture) for picture in shown]))
    torch.testing.assert_close(features.extract(images.values), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "inceptoin",
            r"unknown features 'inceptoin' \(did you mean 'inception'\?\); choose one of: classifier, .*timm",
        ),
        ("timm", "features 'timm' are not of the form timm:NAME"),
        ("timm:", "features 'timm:' are not of the form timm:NAME"),
        ("pixels:64", "features 'pixels:64' are not of the form pixels"),
        ("timm:resnet81", r"timm has no backbone 'resnet81'; near names: \w*res\w+"),
    ],
)
def test_a_mistake_in_the_name_of_features_is_one_line(name, message):
    with pytest.raises(UsageError, match=message):
        make_features(pictures(1), pictures(1), 0, CPU, name)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    pytest.importorskip("torch_fidelity", reason="needs the extra 'evaluate'")

    def offline(*args, **options):
        raise LocalEntryNotFoundError("the Hub is out of reach\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    for name in ("timm:resnet18", "inception"):
        with pytest.raises(UsageError) as caught:
            make_features(pictures(1), pictures(1), 0, CPU, name)
        assert "cannot be fetched: the Hub is out of reach; run once with a network, or pass" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_extractor_of_the_fid_is_torch_fidelity_s_and_read_without_unpickling_first(monkeypatch):
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs the extra 'evaluate'")
    read = []

    def fetch(url, **options):
        read.append((url, options["weights_only"], options["check_hash"]))
        return {}

    class Extractor(nn.Module):
        def __init__(self, name, wanted, **options):
            super().__init__()
            assert wanted == ["2048"]
            assert len(read) == 1

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.float().mean((2, 3)),)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    monkeypatch.setattr(library, "FeatureExtractorInceptionV3", Extractor)
    images = pictures(1)
    features = make_features(images, images, 0, CPU, "inception")
    assert read == [(library.URL_INCEPTION_V3, True, True)]
    torch.testing.assert_close(features.extract(images.values), images.values.float().mean((2, 3)).expand(-1, 3))


def test_without_its_package_inception_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UsageError, match=r"pip install 'gac-plugin\[evaluate\]'"):
        make_features(pictures(1), pictures(1), 0, CPU, "inception")


def test_every_kind_of_features_describes_itself():
    for name, kind in FEATURES.items():
        assert kind.description
        assert find_kind(f"{name}:model" if kind.model else name)[0] is kind


# a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    settings = {"steps": 30, "width": 16, "evaluation_samples": 60, "evaluate_every": 15, "log_every": 10}
    train(Config(**settings, conditional=True, output_dir=str(folder), cpu=True))
    return folder


def test_a_run_evaluated_again_gives_the_figures_of_training_and_intervals(run):
    before = json.loads((run / "evaluation.json").read_text())
    found = assess(run, resamples=4)
    after = json.loads((run / "evaluation.json").read_text())
    assert found.written == run
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"intervals", "interval_method", "resamples"}
    assert before["split"] == "test"
    card = (run / "generator" / "README.md").read_text()
    assert "95% intervals by 4 half-samples" in card
    assert "360 real ones of split `test`" in card
    assert f"training samples come back from it: {found.memorisation.verdict}." in card
    assert json.loads((run / "memorisation.json").read_text())["verdict"] == found.memorisation.verdict


def test_other_data_or_features_leave_the_files_of_a_run_alone(run):
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for options in ({"features": "pixels"}, {"data": {"test_split": "train[:100]"}}):
        found = assess(run, resamples=0, **options)
        assert found.written is None
    assert (found.evaluation.split, found.evaluation.real_samples) == ("train[:100]", 100)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_a_model_that_is_no_run_is_told_its_data(run, tmp_path):
    with pytest.raises(UsageError, match="is no run folder and does not tell its data; name them with --dataset"):
        assess(copied(run, tmp_path))
    found = assess(tmp_path / "model", {"dataset": "digits"}, samples=60, resamples=0)
    expected = assess(run, {"dataset": "digits"}, resamples=0)
    assert found.evaluation.frechet == expected.evaluation.frechet
    other = tmp_path / "other"
    other.mkdir()
    for index in range(9):
        Picture.new("RGB", (12, 12), (index, 0, 0)).save(other / f"{index}.png")
    with pytest.raises(UsageError, match=r"makes samples of 1x8x8, and those of data set '.*other' are of 3x8x8"):
        assess(run, {"dataset": str(other)})


def copied(run, folder):
    (folder / "model").mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / "model" / name).write_bytes((run / "generator" / name).read_bytes())
    return folder / "model"


def test_the_gap_of_d_is_the_difference_of_its_mean_logits_and_is_logged(run):
    class Codec:
        def to_samples(self, stored):
            return stored.float()

    values = torch.randint(0, 256, (700, 1, 2, 2), dtype=torch.uint8)
    train, test = Decoded(values[:400], None, "train"), Decoded(values[400:], None, "test")
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Dropout(0.5))
    expected = values[:400].float().mean(0).flatten() - values[400:].float().mean(0).flatten()
    gap = discriminator_gap(network, Codec(), train, test, CPU, conditional=False)
    assert gap == pytest.approx(float(network[1].weight[0].detach() @ expected), rel=1e-4)
    assert network.training
    assert discriminator_gap(network, Codec(), train, train, CPU, conditional=False) is None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("d_gap" in line for line in lines)
    assert lines[-1]["d_gap"] == pytest.approx(json.loads((run / "evaluation.json").read_text())["d_gap"], rel=1e-6)
