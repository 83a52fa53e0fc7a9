import dataclasses
import math

import numpy as np
import pytest

from paec_kernels.losses.paec_config import PAECConfig


def test_defaults_are_the_documented_ones():
    assert dataclasses.asdict(PAECConfig()) == {
        "top_p": 0.95,
        "nucleus_norm": "log_size",
        "alpha": 0.5,
        "tau_c": 1.0,
        "rho": 0.8,
        "tau_m": 0.05,
        "beta": 0.005,
        "lam": 1.0,
        "rho_min": 0.8,
        "anchor_steps": 4,
        "entropy_support": "full",
        "vocab_size": None,
        "penalty": "absolute",
        "anchor_unit": "optimiser_step",
        "anchored": "mean",
    }


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("top_p", 0.0, "in (0, 1]"),
        ("top_p", 1.01, "in (0, 1]"),
        ("nucleus_norm", "log", "one of"),
        ("alpha", -0.1, "in [0, 1]"),
        ("tau_c", 0.0, "> 0"),
        ("rho", 1.5, "in [0, 1]"),
        ("tau_m", -1.0, "> 0"),
        ("beta", -0.1, ">= 0"),
        ("lam", math.inf, "finite"),
        ("rho_min", math.nan, "finite"),
        ("anchor_steps", 0, ">= 1"),
        ("entropy_support", "half", "one of"),
        ("vocab_size", 1, ">= 2"),
        ("penalty", "squared", "one of"),
        ("anchor_unit", "step", "one of"),
    ],
)
def test_value_out_of_range_names_field_value_and_expectation(name, value, expected):
    with pytest.raises(ValueError, match=f"PAECConfig.{name} must be ") as error:
        PAECConfig(**{name: value})
    assert expected in str(error.value)
    assert f"got {value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rho", "0.8"),
        ("beta", True),
        ("anchor_steps", 4.0),
        ("nucleus_norm", None),
        ("vocab_size", "many"),
        ("penalty", None),
    ],
)
def test_wrong_type_names_field_and_value(name, value):
    with pytest.raises(TypeError, match=f"PAECConfig.{name} must be .*{value!r}"):
        PAECConfig(**{name: value})


def test_log_vocab_needs_a_vocabulary_size():
    with pytest.raises(ValueError, match="vocab_size is None, but nucleus_norm='log_vocab'"):
        PAECConfig(nucleus_norm="log_vocab")
    assert PAECConfig(nucleus_norm="log_vocab", vocab_size=32000).vocab_size == 32000


def test_numbers_of_other_types_become_plain_ones():
    config = PAECConfig(rho=1, anchor_steps=np.int64(3))
    assert type(config.rho) is float
    assert type(config.anchor_steps) is int
