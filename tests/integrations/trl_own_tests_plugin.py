"""A pytest plugin for TRL's own tests: small local datasets and, if asked, PAEC's trainer in place of TRL's.

It is loaded before the tests, which take both by ``from ... import``.
"""

import importlib
import os
import re
from pathlib import Path

import datasets
import pytest
import trl

HUB, TRAINER = "TRL_OWN_TESTS_HUB", "TRL_OWN_TESTS_TRAINER"  # environment variables
ROWS = 6  # of a dataset's 17; each test trains three epochs


def load_dataset(path: str, name: str | None = None, split: str | None = None, **_):
    """What ``datasets.load_dataset`` gives of a dataset that TRL's script has written to the local folder."""
    found = datasets.load_from_disk(str(Path(os.environ[HUB]) / "datasets" / path / (name or "default")))
    found["train"] = found["train"].select(range(ROWS))
    return found if split is None else found[split]


def no_longer_asked_for(name: str):
    """Tests of another version may ask whether a package is there that the installed trl does not know of."""
    if re.fullmatch("is_[a-z_]+_available", name):
        return lambda *_: False
    raise AttributeError(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(mark.kwargs.get("reason") == "test requires liger-kernel" for mark in item.iter_markers("skipif")):
            # On a CPU its kernels fail, and stay in the models' classes for all tests after.
            item.add_marker(
                pytest.mark.skip(reason="trains with Liger's kernels, which need a GPU: any is hidden here")
            )
        elif "TestGRPOTrainerVLM" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="needs an image processor's files from the Hugging Face hub"))


import_utils = importlib.import_module("trl.import_utils")  # trl itself is a lazy module
import_utils.__getattr__ = no_longer_asked_for
# Tests of tools ask for it, though trl itself does not with a transformers that parses answers by templates.
import_utils.is_jmespath_available = lambda: True
datasets.load_dataset = load_dataset

if os.environ[TRAINER] == "ours":
    from paec_kernels.integrations.trl import PAECGRPOConfig, PAECGRPOTrainer

    trl.GRPOConfig, trl.GRPOTrainer = PAECGRPOConfig, PAECGRPOTrainer
