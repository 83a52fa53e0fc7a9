"""The one-pass form: exact for sums over tokens, and how far PAEC with the last step's plan is from exact."""

import math

import pytest
import torch

import paec_kernels as pk

N, WIDTH, V = 200, 24, 600


class Policy:
    """A head, hidden states that move a little from step to step, and what GRPO needs."""

    def __init__(self, dtype=torch.float32):
        self.hidden = torch.randn(N, WIDTH).to(dtype)
        self.weight = (torch.randn(V, WIDTH) * 3 / math.sqrt(WIDTH)).to(dtype)
        self.token_ids = torch.randint(0, V, (N,))
        self.valid = torch.rand(N) > 0.2
        self.advantages = torch.randn(N)
        self.old_logp = pk.linear_token_stats(self.hidden, self.weight, self.token_ids).logp

    def leaves(self):
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()

    def grpo(self, stats, rows):
        n_tokens = self.valid.sum()
        return pk.grpo_loss(
            stats.logp, self.old_logp[rows], self.advantages[rows], self.valid[rows], normalizer=n_tokens
        )[0]


def relative(value, exact):
    return ((value - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [None, 17, 1000])
def test_a_sum_over_tokens_is_exact(device, dtype, chunk_rows):
    policy = Policy(dtype)
    hidden, weight = policy.leaves()
    loss = pk.one_pass_loss(hidden, weight, policy.token_ids, policy.grpo, valid=policy.valid, chunk_rows=chunk_rows)
    (2 * loss).backward()
    exact_hidden, exact_weight = policy.leaves()
    stats = pk.linear_token_stats(exact_hidden, exact_weight, policy.token_ids, valid=policy.valid)
    expected = policy.grpo(stats, torch.arange(N))
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative(hidden.grad, exact_hidden.grad) < tolerance
    assert relative(weight.grad, exact_weight.grad) < tolerance


def test_bias_options_and_no_grad(device):
    policy = Policy()
    bias = torch.randn(V)

    def entropy(stats, rows):
        return (stats.entropy * policy.advantages[rows]).sum()

    options = {"temperature": 0.5 + torch.rand(N), "softcap": 9.0, "vocab_size": 500, "top_p": 0.8}
    leaves = [*policy.leaves(), bias.clone().requires_grad_()]
    pk.one_pass_loss(leaves[0], leaves[1], None, entropy, bias=leaves[2], chunk_rows=30, **options).backward()
    exact = [*policy.leaves(), bias.clone().requires_grad_()]
    stats = pk.linear_token_stats(exact[0], exact[1], bias=exact[2], **options)
    entropy(stats, torch.arange(N)).backward()
    for leaf, other in zip(leaves, exact, strict=True):
        assert relative(leaf.grad, other.grad) < 1e-5
    with torch.no_grad():
        assert pk.one_pass_loss(*policy.leaves(), None, entropy).item() == pytest.approx(
            entropy(pk.linear_token_stats(policy.hidden, policy.weight), torch.arange(N)).item(), rel=1e-5
        )


def test_how_far_the_last_plan_is_from_exact(capsys):
    """Two optimiser steps; in the second the policy has moved. Exact: this step's plan. One pass: the last one's."""
    policy = Policy()
    config = pk.PAECConfig(beta=0.02, lam=1.0, rho_min=1.2, anchor_steps=1)

    def plan_of(paec, hidden):
        with torch.no_grad():
            paec.observe(pk.linear_token_stats(hidden, policy.weight, policy.token_ids), policy.valid)
        return paec.plan()

    def gradient(paec, hidden, plan):
        leaf = hidden.clone().requires_grad_()

        def chunk_loss(stats, rows):
            return policy.grpo(stats, rows) + paec.term(stats, policy.valid[rows], plan)

        pk.one_pass_loss(
            leaf, policy.weight, policy.token_ids, chunk_loss, valid=policy.valid, chunk_rows=50
        ).backward()
        return leaf.grad

    distances = {}
    for move in (0.0, 0.01, 0.1):
        paec = pk.PAEC(config)
        plan_of(paec, policy.hidden)
        paec.step()  # the anchor is set, and the floor above it makes the penalty active
        last_plan = plan_of(paec, policy.hidden)
        moved = policy.hidden + move * torch.randn(N, WIDTH)
        exact = gradient(paec, moved, plan_of(paec, moved))
        leaf = moved.clone().requires_grad_()
        stats = pk.linear_token_stats(leaf, policy.weight, policy.token_ids, valid=policy.valid)
        two_pass = pk.PAEC(config)
        two_pass.load_state_dict(paec.state_dict())
        (policy.grpo(stats, torch.arange(N)) + two_pass(stats, policy.valid).loss).backward()
        assert relative(exact, leaf.grad) < 1e-5, "one pass with this step's own plan is exact"
        distances[move] = relative(gradient(paec, moved, last_plan), exact)
    with capsys.disabled():
        print("\none pass with the last step's plan, relative distance of the gradient by the hidden states' move:")
        print(", ".join(f"{move}: {distance:.1e}" for move, distance in distances.items()))
    assert distances[0.0] < 1e-6
    assert 1e-5 < distances[0.01] < distances[0.1] < 0.3


def test_one_backward_pass():
    policy = Policy()
    loss = pk.one_pass_loss(*policy.leaves(), policy.token_ids, policy.grpo)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_bad_input_is_named():
    policy = Policy()
    with pytest.raises(ValueError, match=r"token_ids must be .*\[0, 600\), got 600"):
        pk.one_pass_loss(policy.hidden, policy.weight, policy.token_ids * 0 + V, policy.grpo)
    with pytest.raises(ValueError, match="chunk_rows must be >= 1, got 0"):
        pk.one_pass_loss(policy.hidden, policy.weight, policy.token_ids, policy.grpo, chunk_rows=0)
    with pytest.raises(ValueError, match="backend must be"):
        pk.one_pass_loss(policy.hidden, policy.weight, policy.token_ids, policy.grpo, backend="reference")
