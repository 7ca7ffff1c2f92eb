"""Fixed seeds, a stand-in for the Hub, and tiny float64 networks whose Jacobians can be written out."""

import atexit
import gc
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_server import Hub, Server
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

CACHE = Path(tempfile.mkdtemp(prefix="hub-cache-"))
HUB_SERVER = Server()
# the Hub's clients read these when they are imported, which is after this
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
    del os.environ[name]
os.environ |= {"HF_ENDPOINT": HUB_SERVER.endpoint, "HF_HOME": str(CACHE)}
os.environ |= {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DISABLE_XET": "1"}
os.environ |= dict.fromkeys((f"HF_HUB_DISABLE_{what}" for what in ("TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")), "1")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

torch.set_num_threads(1)
LATENT = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """A fresh, empty Hub behind HF_ENDPOINT; the clients remember nothing of earlier ones, and do not wait to retry."""
    from huggingface_hub import HfFileSystem, file_download
    from huggingface_hub.utils import _http

    shutil.rmtree(CACHE, ignore_errors=True)
    HfFileSystem.clear_instance_cache()
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    HUB_SERVER.hub = Hub(HUB_SERVER.endpoint)
    yield HUB_SERVER.hub
    HUB_SERVER.hub = None


@pytest.fixture
def streams() -> Iterator[None]:
    """For a test that streams a data set: `datasets` leaves the event loop in which it decodes open."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def tiny_generator() -> Callable[..., nn.Module]:
    """Sample shape -> a smooth network from latents (B, 3) to samples (B, *shape)."""

    def build(shape: tuple[int, ...] = (4,)) -> nn.Module:
        layers = nn.Linear(LATENT, 5), nn.Tanh(), nn.Linear(5, math.prod(shape)), nn.Unflatten(1, shape)
        return nn.Sequential(*layers).double()

    return build


@pytest.fixture
def tiny_discriminator() -> Callable[..., nn.Module]:
    """Sample shape, number of logits, spread of the logits -> a smooth network to logits (B, n)."""

    def build(shape: tuple[int, ...] = (4,), logits: int = 1, spread: float = 3.0) -> nn.Module:
        last = nn.Linear(6, logits)
        last.weight.data.mul_(spread)
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 6), nn.Tanh(), last).double()

    return build


@pytest.fixture
def latents() -> Callable[[int], torch.Tensor]:
    """Batch size -> float64 latents for the tiny generator."""
    return lambda batch: torch.randn(batch, LATENT, dtype=torch.float64)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one, for what DDP needs."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class HostReads(TorchDispatchMode):
    """Records in `seen` every operation that makes the host wait for the device, or copies between devices."""

    operations = frozenset(
        ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_to_copy", "masked_select")
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.operations:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def host_reads() -> type[HostReads]:
    return HostReads


@pytest.fixture(scope="session", autouse=True)
def _closing() -> Iterator[Callable[..., None]]:
    """A run in these tests ends without its report, which takes half a second; see `reports`."""
    from gac_plugin.training.report import LiveReport

    close = LiveReport.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveReport, "close", lambda self: None)
        yield close


@pytest.fixture(scope="module")
def reports(_closing) -> Iterator[None]:
    """Runs in this module end with their report, as they do for users."""
    from gac_plugin.training.report import LiveReport

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveReport, "close", _closing)
        yield
