"""Data-parallel ranks, as gloo processes, against one process that holds the whole batch."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import on_ranks_once
from losses.batches import ANCHOR, CONFIG, VOCAB, Batch, anchored, flattened, make_batch

from paec_kernels import reference
from paec_kernels.losses.drop_in import PAECLoss
from paec_kernels.losses.paec import Plan
from paec_kernels.types import TokenStats

VARIANTS = {
    "": CONFIG,
    "scores": replace(CONFIG, anchored="scores"),
    "positions": replace(CONFIG, anchored="positions", rho_min=1.2),
    "proportional": replace(CONFIG, penalty="proportional"),
    "integral": replace(CONFIG, penalty="integral"),
}
STRENGTH = 0.25  # of the integral penalty
# The micro-batches of each rank; ragged, one rank without a valid token in any.
SHAPES = [[(3, 17), (1, 5)], [(4, 40)], [(2, 9), (1, 0)]]
P_VALID = [0.7, 0.9, 0.0]


def micro_batches_of(rank: int) -> list[Batch]:
    return [make_batch(*shape, seed=10 * rank + i, p_valid=P_VALID[rank]) for i, shape in enumerate(SHAPES[rank])]


def anchor_stats_of(batch: Batch) -> TokenStats:
    """Of another policy, made from the logits so that the same tokens get the same wherever they are."""
    return reference.token_stats(0.5 * batch.logits.detach().roll(1, -1), valid=batch.valid)


def loss_arguments(batch: Batch) -> tuple[torch.Tensor, ...]:
    """What PAECLoss takes, made from the logits so that the same tokens get the same wherever they are."""
    logits = batch.logits.detach().float().requires_grad_()
    token_ids = (logits[..., 0].abs() * 100).long() % VOCAB
    return logits, token_ids, logits[..., 1].detach(), batch.valid, -logits[..., 2].abs().detach()


def work(rank: int, n_ranks: int) -> dict:
    """The values and the logits' gradients of each way to compute the loss."""
    dist.init_process_group("gloo")
    micro_batches = micro_batches_of(rank)

    def accumulated(group: dist.ProcessGroup, variant: str = "") -> tuple[Plan, torch.Tensor, list[torch.Tensor]]:
        """The plan, the sum of the terms, and their gradients."""
        paec = anchored(VARIANTS[variant], process_group=group)
        paec.strength.fill_(STRENGTH)
        for batch in micro_batches:
            paec.observe(batch.stats, batch.valid, anchor_stats=anchor_stats_of(batch))
        plan = paec.plan()
        terms = [
            paec.term(batch.stats, batch.valid, plan, anchor_stats=anchor_stats_of(batch)) for batch in micro_batches
        ]
        grads = [torch.autograd.grad(x, batch.logits)[0] for x, batch in zip(terms, micro_batches, strict=True)]
        return plan, sum(terms).detach(), grads

    of_variants = {name: accumulated(dist.group.WORLD, name) for name in VARIANTS}
    # The mistake: each rank by itself.
    _, _, local_grads = accumulated([dist.new_group([r]) for r in range(n_ranks)][rank])

    # One micro-batch: forward() is the whole step. Without a group, that of all ranks.
    out = anchored()(micro_batches[0].stats, micro_batches[0].valid)

    arguments = loss_arguments(micro_batches[0])
    policy_loss = PAECLoss(CONFIG, process_group=dist.group.WORLD)(*arguments).loss
    return {
        "plans": {name: dict(plan._asdict()) for name, (plan, _, _) in of_variants.items()},
        "values": {name: value for name, (_, value, _) in of_variants.items()},
        "grads": {name: grads for name, (_, _, grads) in of_variants.items()},
        "forward_value": out.loss.detach(),
        "forward_grad": torch.autograd.grad(out.loss, micro_batches[0].logits)[0],
        "forward_mask": out.mask,
        "policy_value": policy_loss.detach(),
        "policy_grad": torch.autograd.grad(policy_loss, arguments[0])[0],
        "local_grads": local_grads,
    }


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory) -> list[dict]:
    return on_ranks_once(request.param, work, tmp_path_factory, request.param)


def truth(batches: list[Batch], variant: str = "") -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, gradient ``[N, VOCAB]`` and metrics of all tokens in one process."""
    whole, config = flattened(batches), VARIANTS[variant]
    strength = STRENGTH if config.penalty == "integral" else 0.0
    loss, _, metrics = reference.paec_loss(
        whole.stats, whole.valid, config, ANCHOR, anchor_stats_of(whole), strength=strength
    )
    return loss.detach(), torch.autograd.grad(loss, whole.logits)[0], metrics


def averaged(grads_of_ranks: list[list[torch.Tensor]]) -> torch.Tensor:
    """What DistributedDataParallel makes of gradients that each live on one rank alone."""
    return torch.cat([g.reshape(-1, VOCAB) for grads in grads_of_ranks for g in grads]) / len(grads_of_ranks)


def all_micro_batches(n_ranks: int) -> list[Batch]:
    return [batch for rank in range(n_ranks) for batch in micro_batches_of(rank)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_terms_average_to_the_whole_batch(ranks, variant):
    loss, grad, metrics = truth(all_micro_batches(len(ranks)), variant)
    value = torch.stack([rank["values"][variant] for rank in ranks]).mean()
    torch.testing.assert_close(value, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(averaged([rank["grads"][variant] for rank in ranks]), grad, rtol=1e-9, atol=1e-15)
    for name, expected in metrics.items():
        torch.testing.assert_close(ranks[0]["plans"][variant][name], expected, rtol=1e-12, atol=0)
    assert metrics["pull"] > 0.1


def test_every_rank_has_the_same_plan_to_the_bit(ranks):
    for rank in ranks[1:]:
        assert rank["plans"] == ranks[0]["plans"]


def test_forward_averages_to_the_whole_batch(ranks):
    batches = [micro_batches_of(rank)[0] for rank in range(len(ranks))]
    loss, grad, _ = truth(batches)
    value = torch.stack([rank["forward_value"] for rank in ranks]).mean()
    torch.testing.assert_close(value, loss, rtol=1e-12, atol=0)
    actual = averaged([[rank["forward_grad"]] for rank in ranks])
    torch.testing.assert_close(actual, grad, rtol=1e-9, atol=1e-15)
    for rank, batch in zip(ranks, batches, strict=True):
        assert rank["forward_mask"].shape == batch.valid.shape


def test_the_policy_loss_averages_over_all_tokens_too(ranks):
    whole = flattened([micro_batches_of(rank)[0] for rank in range(len(ranks))])
    arguments = loss_arguments(whole)
    loss = PAECLoss(CONFIG)(*arguments).loss
    value = torch.stack([rank["policy_value"] for rank in ranks]).mean()
    torch.testing.assert_close(value, loss.detach(), rtol=1e-5, atol=0)
    actual = averaged([[rank["policy_grad"]] for rank in ranks])
    (expected,) = torch.autograd.grad(loss, arguments[0])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_that_check_rejects_a_threshold_per_rank(ranks):
    _, grad, _ = truth(all_micro_batches(len(ranks)))
    wrong = averaged([rank["local_grads"] for rank in ranks])
    assert (wrong - grad).norm() > 0.05 * grad.norm()


@pytest.mark.parametrize("ranks", [3], indirect=True)
def test_a_rank_without_a_valid_token_adds_nothing(ranks):
    assert all(value == 0 for value in [ranks[2]["forward_value"], *ranks[2]["values"].values()])
    assert all((grad == 0).all() for grads in ranks[2]["grads"].values() for grad in grads)
