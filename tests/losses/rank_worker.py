"""What each process of `test_ranks` runs; a module of its own, so that spawned processes can import it."""

import torch
import torch.distributed as dist
from losses.batches import CONFIG, VOCAB, Batch, anchored, make_batch

from paec_kernels.losses.drop_in import PAECLoss

# The micro-batches of each rank; ragged, one rank without a valid token in any.
SHAPES = [[(3, 17), (1, 5)], [(4, 40)], [(2, 9), (1, 0)]]
P_VALID = [0.7, 0.9, 0.0]


def micro_batches_of(rank: int) -> list[Batch]:
    return [make_batch(*shape, seed=10 * rank + i, p_valid=P_VALID[rank]) for i, shape in enumerate(SHAPES[rank])]


def loss_arguments(batch: Batch) -> tuple[torch.Tensor, ...]:
    """What PAECLoss takes, made from the logits so that the same tokens get the same wherever they are."""
    logits = batch.logits.detach().float().requires_grad_()
    token_ids = (logits[..., 0].abs() * 100).long() % VOCAB
    return logits, token_ids, logits[..., 1].detach(), batch.valid, -logits[..., 2].abs().detach()


def run(rank: int, world_size: int, folder: str) -> None:
    """Write to ``folder/rank`` the values and the logits' gradients of each way to compute the loss."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    micro_batches = micro_batches_of(rank)

    def grads(losses: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.autograd.grad(loss, batch.logits)[0] for loss, batch in zip(losses, micro_batches, strict=True)]

    accumulated = anchored(process_group=dist.group.WORLD)
    for batch in micro_batches:
        accumulated.observe(batch.stats, batch.valid)
    plan = accumulated.plan()
    terms = [accumulated.term(batch.stats, batch.valid, plan) for batch in micro_batches]

    # One micro-batch: forward() is the whole step. Without a group, that of all ranks.
    whole = anchored()
    out = whole(micro_batches[0].stats, micro_batches[0].valid)

    # The mistake: each rank by itself.
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    local = anchored(process_group=alone)
    for batch in micro_batches:
        local.observe(batch.stats, batch.valid)
    local_plan = local.plan()
    local_terms = [local.term(batch.stats, batch.valid, local_plan) for batch in micro_batches]

    arguments = loss_arguments(micro_batches[0])
    policy = PAECLoss(CONFIG, process_group=dist.group.WORLD)
    policy_out = policy(*arguments)

    torch.save(
        {
            "plan": dict(plan._asdict()),
            "value": sum(terms).detach(),
            "grads": grads(terms),
            "forward_value": out.loss.detach(),
            "forward_grad": torch.autograd.grad(out.loss, micro_batches[0].logits)[0],
            "forward_mask": out.mask,
            "policy_value": policy_out.loss.detach(),
            "policy_grad": torch.autograd.grad(policy_out.loss, arguments[0])[0],
            "local_grads": grads(local_terms),
        },
        f"{folder}/{rank}",
    )
    dist.destroy_process_group()
