"""What a user's type checker sees."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="the mypy package is not installed")

ROOT = Path(__file__).parents[1]

USER = """
# mypy: disallow-untyped-calls, disallow-any-generics, warn-return-any, warn-unreachable, strict-equality
from typing import Any, assert_type

import paec_kernels as pk
import torch
from torch import Tensor


def step(logits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, perhaps: Tensor | None, valid: Tensor) -> Tensor:
    stats = pk.token_stats(logits, ids, valid=valid, top_p=0.9, temperature=torch.ones(3), backend="torch")
    assert_type(stats.logp, Tensor)
    linear = pk.linear_token_stats(hidden, weight, token_ids=ids, bias=None, chunk_rows=4, vocab_size=30)
    assert_type(linear.logp, Tensor)
    assert_type(pk.token_stats(logits, perhaps, inplace_backward=True).logp.sum(), Tensor)
    assert_type(linear.nucleus_size, Tensor)
    options: dict[str, Any] = {"top_p": 0.9, "token_ids": ids}
    again: pk.TokenStats = pk.token_stats(logits, **options)
    assert_type(again._replace(margin=stats.margin)._asdict(), dict[str, Any])
    policy, metrics = pk.grpo_loss(stats.logp, stats.logp.detach(), torch.ones(3), valid)
    assert_type(metrics, dict[str, Tensor])
    paec = pk.PAEC(pk.PAECConfig())
    paec.observe(stats, valid)
    return policy + paec.term(linear, valid, paec.plan()) + entropy(stats) + entropy(pk.token_stats(logits))


def entropy(stats: pk.TokenStats) -> Tensor:
    return stats.entropy.sum()
"""
WRONG = {
    "stats.log_prob": '"TokenStats" has no attribute "log_prob"',
    "pk.token_stats([[1.0]], ids)": 'incompatible type "list[list[float]]"; expected "Tensor"',
    "pk.token_stats(logits, top_q=0.9)": 'Unexpected keyword argument "top_q"',
    "pk.linear_token_stats(hidden, weight, inplace_backward=True)": 'Unexpected keyword argument "inplace_backward"',
    "pk.token_stats(logits, top_p='0.9')": 'incompatible type "str"',
}


def test_mypy_takes_a_users_file_and_refuses_its_mistakes(tmp_path):
    """One run for both: each wrong line, appended to the function, is the only one on which something is said."""
    lines = USER.strip().splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("    return policy"))
    lines[end:end] = [f"    {line}" for line in WRONG]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    # The settings of `make lint`, and so its cache: without one, torch alone takes 20 seconds.
    command = [sys.executable, "-m", "mypy", "--no-error-summary", tmp_path / "user.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert not result.stderr
    assert len(said) == len(WRONG), result.stdout
    for number, (line, (wrong, message)) in enumerate(zip(said, WRONG.items(), strict=True), start=end + 1):
        # Not the folder: the cache repeats what it said of the same text elsewhere.
        assert f"user.py:{number}: " in line, f"{wrong}: {line}"
        assert message in line
