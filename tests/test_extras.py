"""The core needs torch, numpy and triton alone; what needs more says which extra brings it."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import files, requires
from pathlib import Path
from sysconfig import get_path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import paec_kernels

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
CORE = {Requirement(line).name for line in PROJECT["dependencies"]}

WORK = """
import numpy, torch
import paec_kernels as pk

logits = torch.randn(2, 3, 50, requires_grad=True)
ids, valid = torch.randint(50, (2, 3)), torch.ones(2, 3, dtype=torch.bool)
paec = pk.PAEC(pk.PAECConfig())
stats = pk.token_stats(logits, ids, valid=valid)
policy_loss, _ = pk.grpo_loss(stats.logp, stats.logp.detach(), torch.randn(2, 1), valid)
(policy_loss + paec(stats, valid).loss).backward()
paec.step()
torch.testing.assert_close(stats.entropy, pk.reference.token_stats(logits, ids, valid=valid).entropy.float())
pk.linear_token_stats(torch.randn(2, 3, 8), torch.randn(50, 8), ids, valid=valid)
"""

IMPORT_ALL = """
import importlib, json, pkgutil
import paec_kernels

errors = {}
for module in pkgutil.walk_packages(paec_kernels.__path__, "paec_kernels."):
    if module.name != "paec_kernels.cli":
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            errors[module.name] = str(error)
print(json.dumps(errors))
"""


def brought_by(names: set[str]) -> set[str]:
    """Close these distributions under what they require, without extras of theirs."""
    found, new = set(), {canonicalize_name(name) for name in names}
    while new:
        found |= new
        lines = [line for name in new for line in requires(name) or []]
        needed = [Requirement(line) for line in lines]
        new = {canonicalize_name(r.name) for r in needed if not r.marker or r.marker.evaluate({"extra": ""})} - found
    return found


@pytest.fixture
def core(tmp_path: Path) -> Path:
    """Make a folder with this package and what `pip install` brings with it, as links."""
    names = brought_by({name for name in CORE if name != "triton" or sys.platform == "linux"})
    packages = Path(get_path("platlib"))
    for top in {file.parts[0] for name in names for file in files(name) or []} - {".."}:
        (tmp_path / top).symlink_to(packages / top)
    (tmp_path / "paec_kernels").symlink_to(Path(paec_kernels.__file__).parent)
    return tmp_path


def run_python(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these packages alone."""
    environment = os.environ | {"PYTHONPATH": str(packages)}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, env=environment, cwd=packages, capture_output=True, text=True)


def test_the_core_needs_three_packages(core):
    assert sorted(CORE) == ["numpy", "torch", "triton"]
    result = run_python(core, "-c", WORK)
    assert not result.returncode, result.stderr


def test_what_needs_more_says_which_extra(core):
    result = run_python(core, "-c", IMPORT_ALL)
    assert not result.returncode, result.stderr
    errors = json.loads(result.stdout)
    extras = {
        module: re.findall(r"; it comes with: pip install 'paec-kernels\[(\w+)\]'$", errors[module])
        for module in errors
    }
    assert extras.pop("paec_kernels.integrations.trl") == ["trl"]
    assert extras.pop("paec_kernels.integrations.verl") == ["verl"]
    assert "paec_kernels.train.report.plots" in extras
    for module, found in extras.items():
        assert module.startswith("paec_kernels.train.")
        assert found == ["train"], f"{module}: {errors[module]}"
    assert {"train", "trl", "verl"} <= PROJECT["optional-dependencies"].keys()


def test_the_command_without_its_extra_says_so_in_a_line(core):
    result = run_python(core, "-m", "paec_kernels.cli", "train")
    assert result.returncode == 1
    assert result.stderr == "paec: No module named 'tyro'; it comes with: pip install 'paec-kernels[train]'\n"
