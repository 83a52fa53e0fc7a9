"""A head sharded over ranks, as FSDP2 shards it: gathered for the call, its gradient scattered back."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import paec_kernels as pk

V, WIDTH = 51, 8


class Model(nn.Module):
    """A body and a head whose weight the loss takes, not its forward."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, V, bias=False)

    def forward(self, x, token_ids):
        stats = pk.linear_token_stats(torch.tanh(self.body(x)), self.head.weight, token_ids)
        return (stats.logp - stats.entropy + stats.nucleus_entropy).sum()


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, WIDTH, generator=generator), torch.randint(0, V, (6,), generator=generator)


def work(rank):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    plain = Model()
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(sharded, mesh=mesh, reshard_after_forward=False)
    sharded(*batch(rank)).backward()
    sum(plain(*batch(r)) for r in range(2)).div(2).backward()
    for name in ("body", "head"):
        got = getattr(sharded, name).weight.grad.full_tensor()
        torch.testing.assert_close(got, getattr(plain, name).weight.grad, atol=1e-5, rtol=1e-4)
    weight = distribute_tensor(plain.head.weight.detach(), mesh, [Shard(0)]).requires_grad_()
    hidden, token_ids = batch(0)
    pk.linear_token_stats(hidden, weight, token_ids).entropy.sum().backward()
    whole = plain.head.weight.detach().clone().requires_grad_()
    pk.linear_token_stats(hidden, whole, token_ids).entropy.sum().backward()
    torch.testing.assert_close(weight.grad.full_tensor(), whole.grad)


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_fsdp2_head(tmp_path):
    on_ranks(2, work, tmp_path)
