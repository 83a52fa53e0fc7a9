"""One vocabulary of errors: what passes, what does not, and what is said."""

import math
import re

import numpy as np
import pytest
import torch

from paec_kernels import checks


@pytest.mark.parametrize(
    ("value", "bounds", "expected"),
    [
        (0.0, {"above": 0, "most": 1}, "in (0, 1]"),
        (1.5, {"above": 0, "most": 1}, "in (0, 1]"),
        (-0.1, {"least": 0, "most": 1}, "in [0, 1]"),
        (0, {"above": 0}, "> 0 and finite"),
        (math.inf, {"above": 0}, "> 0 and finite"),
        (-1, {"least": 0}, ">= 0 and finite"),
        (-1, {"least": 0, "most": math.inf}, ">= 0"),
        (math.nan, {"least": -math.inf, "most": math.inf}, "a number"),
        (2, {"most": 1}, "<= 1 and finite"),
        (math.nan, {}, "finite"),
    ],
)
def test_numbers_out_of_range_are_refused(value, bounds, expected) -> None:
    with pytest.raises(ValueError, match=re.escape(f"x must be {expected}, got {value!r}")):
        checks.number("x", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (1, {"above": 0, "most": 1}),
        (0, {"least": 0}),
        (math.inf, {"least": 0, "most": math.inf}),
        (-math.inf, {"least": -math.inf}),
        (np.float32(0.5), {"above": 0}),
    ],
)
def test_numbers_in_range_become_floats(value, bounds) -> None:
    found = checks.number("x", value, **bounds)
    assert type(found) is float
    assert found == value


@pytest.mark.parametrize("value", [True, "1", None, torch.tensor(1.0), 1j])
def test_what_is_no_number_is_refused(value) -> None:
    with pytest.raises(TypeError, match="x must be a number, got"):
        checks.number("x", value)


def test_integers() -> None:
    assert type(checks.integer("n", np.int64(3), least=1)) is int
    for bound in (1, 4):
        assert checks.integer("n", bound, least=1, most=4) == bound
    for longest in (-(2**63), 2**63 - 1):
        assert checks.integer("n", longest) == longest
    for value in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match=re.escape(f"n must be an int, got {value!r}")):
            checks.integer("n", value)
    with pytest.raises(ValueError, match=re.escape("n must be >= 1, got 0")):
        checks.integer("n", 0, least=1)
    with pytest.raises(ValueError, match=re.escape("n must be in [1, 4], got 5")):
        checks.integer("n", 5, least=1, most=4)
    for value in (-(2**63) - 1, 2**63):
        with pytest.raises(ValueError, match=re.escape(f"n must be an int of 64 bits, got {value}")):
            checks.integer("n", value)


def test_bools_and_choices() -> None:
    checks.boolean("flag", False)
    checks.one_of("colour", "red", ("red", "blue"))
    with pytest.raises(TypeError, match="flag must be a bool, got 1"):
        checks.boolean("flag", 1)
    with pytest.raises(ValueError, match="colour must be one of red, blue, got 'green'"):
        checks.one_of("colour", "green", ("red", "blue"))
    with pytest.raises(TypeError, match=r"colour must be one of red, blue, got \['red'\]"):
        checks.one_of("colour", ["red"], ("red", "blue"))


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x must be a tensor, got [1.0]"),
        (torch.ones(2), {"kind": "bool"}, TypeError, "x must be a bool tensor, got torch.float32"),
        (torch.ones(2), {"kind": "integer"}, TypeError, "x must be an integer tensor, got torch.float32"),
        (torch.ones(2) > 0, {"kind": "integer"}, TypeError, "x must be an integer tensor, got torch.bool"),
        (torch.ones(2).long(), {"kind": "floating"}, TypeError, "x must be a floating tensor, got torch.int64"),
        (torch.ones(2), {"like": (2, 3)}, ValueError, "x must have the shape of y, (2, 3), got (2,)"),
        (torch.ones(2, 1), {"like": (2, 3)}, ValueError, "x must have the shape of y, (2, 3), got (2, 1)"),
        (torch.ones(3), {"like": (3, 3), "broadcast": True}, ValueError, "or 1 in some of its dimensions"),
        (torch.ones(2, 2), {"like": (2, 3), "broadcast": True}, ValueError, "or 1 in some of its dimensions"),
        (torch.ones(2, device="meta"), {"like": (2,)}, ValueError, "x must be on the device of y, cpu, got meta"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(value, options, error, message) -> None:
    if "like" in options:
        options = options | {"like": ("y", torch.ones(options["like"]))}
    with pytest.raises(error, match=re.escape(message)):
        checks.tensor("x", value, **options)


def test_tensors_that_fit() -> None:
    other = ("y", torch.ones(2, 3))
    checks.tensor("x", torch.ones(2, 3) > 0, kind="bool", like=other)
    checks.tensor("x", torch.ones(2, 1), kind="floating", like=other, broadcast=True)
