"""Logits of a head that torchtitan splits over two gloo ranks, as they come out, against one process.

A Llama 3 without layers: torchtitan's attention is FlexAttention, which has no backward pass on a CPU.
"""

import pytest
import torch
import torch.distributed as dist
from helpers import on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

pytest.importorskip("torchtitan", reason="torchtitan is not installed: see make test-torchtitan")
from torchtitan.distributed import parallel_dims, utils
from torchtitan.distributed.spmd_types import current_spmd_mesh
from torchtitan.models.common import Embedding, Linear, RMSNorm
from torchtitan.models.llama3 import Llama3Model
from torchtitan.models.llama3.sharding import set_llama3_sharding_config

import paec_kernels as pk

V, D = 51, 16  # uneven: 26 columns and 25
TOKENS = torch.arange(14).view(2, 7) * 9 % V
POSITIONS = torch.arange(7).expand(2, 7)


def model(split: bool) -> Llama3Model:
    normal = {"weight": torch.nn.init.normal_}
    config = Llama3Model.Config(
        dim=D,
        vocab_size=V,
        tok_embeddings=Embedding.Config(num_embeddings=V, embedding_dim=D, param_init=normal),
        norm=RMSNorm.Config(normalized_shape=D, param_init={"weight": torch.nn.init.ones_}),
        lm_head=Linear.Config(in_features=D, out_features=V, param_init=normal),
        layers=[],
    )
    if split:
        set_llama3_sharding_config(config, enable_sp=False)
    built = config.build()
    torch.manual_seed(0)
    built.init_states(buffer_device=torch.device("cpu"))
    return built


def loss_of(stats: pk.TokenStats) -> Tensor:
    return (stats.logp - stats.entropy * stats.nucleus_entropy).sum()


def work(rank: int, backend: str) -> dict[str, Tensor]:
    """Statistics and the gradients of all parameters."""
    dist.init_process_group("gloo")
    parallel_dims.device_type = "cpu"  # torchtitan takes a machine without accelerators for one with CUDA
    dims = parallel_dims.ParallelDims(
        dp_replicate=1, dp_shard=1, cp=1, tp=2, pp=1, ep=1, world_size=2, spmd_backend=backend
    )
    dims.build_mesh()
    utils.set_spmd_backend(backend)
    split = model(split=True)
    split.parallelize(dims)
    with utils.get_spmd_context(parallel_dims=dims)(), torch.autograd.set_multithreading_enabled(False):
        logits = split(TOKENS, positions=POSITIONS)
        options = {}
        if backend == "partial_dtensor":
            assert isinstance(logits, DTensor)
            assert logits.placements == (Shard(2),)
        else:
            assert not isinstance(logits, DTensor)
            options["vocab_group"] = current_spmd_mesh().get_group("tp")
        stats = pk.token_stats(logits, TOKENS.roll(-1, 1), **options)
        loss_of(stats).backward()
    found = {name: value.detach() for name, value in stats._asdict().items()}
    for name, parameter in split.named_parameters():
        gradient = parameter.grad
        found[f"d_{name}"] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


@pytest.mark.parametrize("backend", ["partial_dtensor", "spmd_types"])
def test_statistics_and_gradients_are_those_of_one_process(tmp_path, backend):
    ranks = on_ranks(2, work, tmp_path, backend)
    whole = model(split=False)
    expected = pk.token_stats(whole(TOKENS, positions=POSITIONS), TOKENS.roll(-1, 1))
    loss_of(expected).backward()
    gradients = {f"d_{name}": parameter.grad for name, parameter in whole.named_parameters()}
    for name, value in (expected._asdict() | gradients).items():
        for rank, found in enumerate(ranks):
            # A parameter that is no DTensor is this rank's rows.
            whole_here = value if found[name].shape == value.shape else value.tensor_split(2)[rank]
            torch.testing.assert_close(found[name], whole_here.detach(), atol=1e-5, rtol=1e-5)
