"""No finite input makes a loss overflow, masked positions add exactly nothing, and what is not finite shows."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import paec_kernels as pk
from paec_kernels import reference

LOG_PROBS = (-1e4, -100.0, -1.0, 0.0)
ADVANTAGES = (0.0, 1.0, -1.0, 1e4, -1e4)
NOT_FINITE = (math.nan, math.inf, -math.inf)
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def half_of(valid: Tensor) -> Tensor:
    return torch.arange(valid.numel()).view(valid.shape) % 2 == 0


# Of logp, old_logp, ref_logp, advantages, valid
LOSSES: dict[str, Loss] = {
    "grpo": lambda p, old, ref, a, v: pk.grpo_loss(p, old, a, v)[0],
    "grpo with a penalty": lambda p, old, ref, a, v: pk.grpo_loss(p, old, a, v, ref_logp=ref, kl_coef=0.01)[0],
    "grpo without clipping": lambda p, old, ref, a, v: pk.grpo_loss(p, old, a, v, clip_high=math.inf)[0],
    "cispo": lambda p, old, ref, a, v: pk.cispo_loss(p, old, a, v)[0],
    "cispo without clipping": lambda p, old, ref, a, v: pk.cispo_loss(p, old, a, v, clip_high=math.inf)[0],
    "clip-cov": lambda p, old, ref, a, v: pk.clip_cov_loss(p, old, a, v, half_of(v))[0],
    "kl-cov": lambda p, old, ref, a, v: pk.kl_cov_loss(p, old, a, v, half_of(v))[0],
    "reference": lambda p, old, ref, a, v: reference.grpo_loss(p, old, a, v, ref_logp=ref, kl_coef=0.01),
}
WITH_REF = ("grpo with a penalty", "reference")
each_loss = pytest.mark.parametrize("name", LOSSES)


def sweep(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every combination of log-probs and an advantage, four vectors."""
    rows = list(itertools.product(LOG_PROBS, LOG_PROBS, LOG_PROBS, ADVANTAGES))
    return torch.tensor(rows, dtype=dtype).unbind(1)


def loss_and_gradient(name: str, logp: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logp.clone().requires_grad_()
    loss = LOSSES[name](leaf, *others)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_finite_input_gives_a_finite_loss_and_gradient(name, dtype):
    logp, old_logp, ref_logp, advantages = sweep(dtype)
    for chosen in (advantages == advantages, advantages.abs() <= 1):  # all at once, and without the largest
        tokens = [x[chosen] for x in (logp, old_logp, ref_logp, advantages)]
        loss, gradient = loss_and_gradient(name, *tokens, torch.ones(len(tokens[0]), dtype=torch.bool))
        assert loss.isfinite()
        if dtype != torch.float16:  # whose own range a gradient of 1e4 e^20 leaves
            assert gradient.isfinite().all()


@each_loss
@pytest.mark.parametrize("poison", [*NOT_FINITE, 3e38, -3e38])
def test_masked_positions_add_exactly_nothing(name, poison):
    tokens = sweep()
    valid = torch.arange(len(tokens[0])) % 3 != 0
    clean = [torch.where(valid, x, 0.0) for x in tokens]
    expected = loss_and_gradient(name, *clean, valid)
    for poisoned in (*((i,) for i in range(4)), (0, 1), (0, 1, 2, 3)):
        arguments = [torch.where(valid, x, poison) if i in poisoned else x for i, x in enumerate(clean)]
        for value, other in zip(loss_and_gradient(name, *arguments, valid), expected, strict=True):
            assert torch.equal(value, other)


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize(("name", "place"), [(n, i) for n in LOSSES for i in range(4) if i != 2 or n in WITH_REF])
def test_what_is_not_finite_shows(name, place, bad):
    for token in (0, 1):  # one that Clip-Cov removes and KL-Cov penalises, and one that neither does
        for sign in (1.0, -1.0):
            tokens = [torch.tensor([-1.0, -2.0, -0.5]) for _ in range(3)] + [torch.tensor([1.0, -1.0, 0.5]) * sign]
            tokens[place][token] = bad
            loss, gradient = loss_and_gradient(name, *tokens, torch.ones(3, dtype=torch.bool))
            assert not loss.isfinite()
            assert not gradient[token].isfinite() or name.startswith("cispo")


@each_loss
def test_the_bound_leaves_ordinary_ratios_alone(name):
    logp, old_logp, ref_logp, advantages = sweep(torch.float64)
    near = ((logp - old_logp).abs() < 20) & ((ref_logp - logp).abs() < 20)
    logp, old_logp, ref_logp, advantages = (x[near] for x in (logp, old_logp, ref_logp, advantages))
    ratio, log_ratio = (logp - old_logp).exp(), logp - old_logp
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    x = ref_logp - logp
    selected = half_of(near[near])
    expected = {
        "grpo": clipped,
        "grpo with a penalty": clipped - 0.01 * (x.exp() - x - 1),
        "grpo without clipping": torch.minimum(ratio * advantages, ratio.clamp(min=0.8) * advantages),
        "cispo": ratio.clamp(max=1.28) * advantages * logp,
        "cispo without clipping": ratio * advantages * logp,
        "clip-cov": torch.where(selected, 0.0, torch.minimum(ratio * advantages, ratio.clamp(0, 2) * advantages)),
        "kl-cov": ratio * advantages - torch.where(selected, log_ratio.abs(), 0.0),
        "reference": clipped - 0.01 * (x.exp() - x - 1),
    }[name]
    loss, _ = loss_and_gradient(name, logp, old_logp, ref_logp, advantages, torch.ones(len(logp), dtype=torch.bool))
    torch.testing.assert_close(loss, -expected.mean(), rtol=1e-12, atol=1e-12)


def test_the_reference_bounds_what_the_loss_bounds():
    logp, old_logp, ref_logp, advantages = sweep(torch.float64)
    valid = torch.arange(len(logp)) % 7 != 0
    results = [
        loss_and_gradient(name, logp, old_logp, ref_logp, advantages, valid)
        for name in ("grpo with a penalty", "reference")
    ]
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def drop_in(logits: Tensor, token_ids: Tensor, advantages: Tensor, valid: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    return pk.PAECLoss(pk.PAECConfig(), kl_coef=0.01)(logits, token_ids, advantages, valid, old, ref).loss


def one_pass(logits: Tensor, token_ids: Tensor, advantages: Tensor, valid: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    def policy(stats: pk.TokenStats, rows: Tensor) -> Tensor:
        tokens = old[rows], advantages[rows], valid[rows]
        return pk.grpo_loss(stats.logp, *tokens, ref_logp=ref[rows], kl_coef=0.01, normalizer=8)[0]

    return pk.one_pass_loss(logits, torch.eye(logits.shape[1]), token_ids, policy, valid=valid, chunk_rows=3)


@pytest.mark.parametrize("loss_of", [drop_in, one_pass])
def test_losses_on_logits(loss_of):
    """Peaked rows, whose sampled token has a log-prob down to -1e4, against every other log-prob and advantage."""
    rows = list(itertools.product((0.0, 1.0, 100.0, 1e4), LOG_PROBS, LOG_PROBS, ADVANTAGES))
    gap, old_logp, ref_logp, advantages = torch.tensor(rows).unbind(1)
    logits = torch.zeros(len(gap), 30)
    logits[:, 3] = gap
    token_ids = torch.full((len(gap),), 5)
    valid = torch.arange(len(gap)) % 5 != 0
    results = []
    for poison in (0.0, math.nan):
        old, ref, a = (torch.where(valid, x, poison) for x in (old_logp, ref_logp, advantages))
        leaf = torch.where(valid[:, None], logits, poison).requires_grad_()
        loss = loss_of(leaf, token_ids, a, valid, old, ref)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert all(value.isfinite().all() for value in results[0])
    assert (results[0][1][~valid] == 0).all()
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)
