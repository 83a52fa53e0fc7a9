"""Logits of a head that Megatron-Core splits over two gloo ranks, as they come out, against one process."""

import pytest
import torch
import torch.distributed as dist
from helpers import on_ranks
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("megatron.core", reason="megatron-core is not installed: see make test-megatron")
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding

import paec_kernels as pk

V, PADDED, D = 61, 64, 8  # Megatron pads a vocabulary to what its ranks can share
TOKENS = torch.arange(14).view(2, 7) * 9 % V


def normal(weight: Tensor) -> None:
    torch.nn.init.normal_(weight)


def loss_of(stats: pk.TokenStats) -> Tensor:
    return (stats.logp - stats.entropy * stats.nucleus_entropy).sum()


def work(rank: int) -> dict[str, Tensor]:
    """Statistics, and the gradients of embeddings and head with all their rows, after Megatron's and after ours."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    config = ModelParallelConfig(tensor_model_parallel_size=2, use_cpu_initialization=True)
    torch.manual_seed(0)
    embeddings = VocabParallelEmbedding(PADDED, D, init_method=normal, config=config)
    head = ColumnParallelLinear(D, PADDED, config=config, init_method=normal, bias=False, gather_output=False)
    options = {"vocab_size": V, "vocab_group": group}

    found = {}
    for name in ("of_logits", "of_hidden"):
        hidden = torch.tanh(embeddings(TOKENS))
        if name == "of_logits":
            logits, _ = head(hidden)
            assert logits.shape == (2, 7, PADDED // 2)
            stats = pk.token_stats(logits, TOKENS.roll(-1, 1), **options)
        else:
            stats = pk.linear_token_stats(hidden, head.weight, TOKENS.roll(-1, 1), **options)
        loss_of(stats).backward()
        found |= {f"{name} {key}": value.detach() for key, value in stats._asdict().items()}
        for key, weight in (("embeddings", embeddings.weight), ("head", head.weight)):
            found[f"{name} d_{key}"] = of_all_ranks(weight.grad, group)
            weight.grad = None
    found["embeddings"], found["head"] = (of_all_ranks(x.weight.detach(), group) for x in (embeddings, head))
    return found


def of_all_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Tensor]]:
    return on_ranks(2, work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["of_logits", "of_hidden"])
def test_statistics_and_gradients_are_those_of_one_process(ranks, name):
    embeddings, head = (ranks[0][key].clone().requires_grad_() for key in ("embeddings", "head"))
    logits = torch.tanh(F.embedding(TOKENS, embeddings)) @ head.T
    expected = pk.token_stats(logits, TOKENS.roll(-1, 1), vocab_size=V)
    loss_of(expected).backward()
    assert embeddings.grad is not None
    assert head.grad is not None
    gradients = {"d_embeddings": embeddings.grad, "d_head": head.grad}
    for key, value in (expected._asdict() | gradients).items():
        for rank in ranks:
            torch.testing.assert_close(rank[f"{name} {key}"], value.detach(), atol=1e-5, rtol=1e-5)
    assert (head.grad[:V] != 0).any(1).all()
    assert (head.grad[V:] == 0).all()
