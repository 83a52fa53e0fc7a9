"""Where and when a row was measured."""

import datetime
import functools
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    """Give the date (UTC), the command, the versions, and the commit with ``-dirty`` if a file loaded here differs."""
    module = getattr(sys.modules["__main__"].__spec__, "name", "")
    return {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}",
    }


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor's with the number of threads that PyTorch uses."""
    if device == "cuda":
        return _gpu()
    return f"{_processor()}, {torch.get_num_threads()} threads"


@functools.cache
def _gpu() -> str:
    """Asked once: after an illegal access CUDA answers nothing more, and the rows that say so still name the device."""
    return torch.cuda.get_device_name()


@functools.cache
def _commit() -> str:
    root = Path(__file__).parents[1]
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] in ("paec_kernels", "benchmarks")]
    measured = [str(m.__file__) for m in modules if getattr(m, "__file__", None)]

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return found.stdout.strip()

    if shutil.which("git") is None:
        return "unknown, git is not installed"
    commit = git("rev-parse", "--short=10", "HEAD")
    if not commit:
        return "not in a git checkout"
    return commit + ("-dirty" if git("status", "--porcelain", "--", *measured) else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@functools.cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
