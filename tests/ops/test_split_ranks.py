"""A split vocabulary among the other ways to use ranks: meshes, DTensors, heads, compilers, and ranks that differ."""

import re
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import on_ranks, on_ranks_once
from losses.batches import CONFIG, anchored
from ops.rows import flat
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import paec_kernels as pk
from benchmarks import split_cost
from paec_kernels.ops import operator
from paec_kernels.ops.layout import Rows
from paec_kernels.ops.vocab_group import agree

N, V, D = 12, 203, 16
LOGITS, TOKEN_IDS = flat(N, V), torch.arange(N) * 17 % V
HIDDEN, WEIGHT, BIAS = flat(N, D, 1.0), flat(V, D, 1.0), flat(1, V, 1.0)[0]


def own(x: Tensor, rank: int, n_ranks: int, dim: int = -1) -> Tensor:
    return x.tensor_split(n_ranks, dim)[rank].clone()


def mixed(stats: pk.TokenStats) -> Tensor:
    return (stats.logp - stats.entropy * stats.nucleus_entropy).sum()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


# Ranks that differ


class Differ:
    """What rank 1 of two does otherwise: arguments of `token_stats`, and what the error must say."""

    def __init__(self, says: str, **changes) -> None:
        self.says, self.changes = says, changes


ROW_TEMPERATURES = torch.linspace(0.5, 2, N)
VALID = torch.arange(N) % 2 == 0
DIFFERENT = {
    "top_p": Differ("top_p must be the same on all ranks of vocab_group, got 0.95 on rank 0 and 0.9", top_p=0.9),
    "softcap": Differ("softcap must be the same .* got 0 on rank 0 and 30", softcap=30.0),
    "vocab_size": Differ("vocab_size must be the same .* got 0 on rank 0 and 200", vocab_size=200),
    "dtype": Differ("dtype must be the same .* got torch.float32 on rank 0 and torch.bfloat16", dtype=torch.bfloat16),
    "rows": Differ("number of rows must be the same .* got 12 on rank 0 and 11", rows=N - 1),
    "token_ids": Differ("token_ids must be the same", token_ids=TOKEN_IDS.roll(1)),
    "no token_ids": Differ("token_ids must be the same", token_ids=None),
    "valid": Differ("valid must be the same", valid=VALID),
    # As many rows are valid, and the sum of their numbers is the same.
    "valid elsewhere": Differ("valid must be the same", valid=torch.arange(N).eq(1) | torch.arange(N).eq(2)),
    "two token_ids": Differ(
        "token_ids must be the same", token_ids=TOKEN_IDS + torch.eye(N)[0].long() * 3 - torch.eye(N)[1].long()
    ),
    "temperature": Differ("temperature must be the same", temperature=0.7),
    "temperatures": Differ("temperature must be the same", temperature=ROW_TEMPERATURES),
}


def differences(rank: int, group: dist.ProcessGroup) -> dict[str, str]:
    """The errors of each case on two ranks, by name."""

    def error_of(call: Callable[..., object], *arguments, **options) -> str:
        try:
            call(*arguments, vocab_group=group, **options)
        except ValueError as error:
            return str(error)
        return "no error"

    found = {}
    for name, case in DIFFERENT.items():
        changes = dict(case.changes) if rank == 1 else {}
        n = changes.pop("rows", N)
        shard = own(LOGITS, rank, 2)[:n].to(changes.pop("dtype", torch.float32))
        token_ids = changes.pop("token_ids", TOKEN_IDS)
        if name == "valid elsewhere" and rank == 0:
            changes["valid"] = torch.arange(N).eq(0) | torch.arange(N).eq(3)
        found[name] = error_of(pk.token_stats, shard, None if token_ids is None else token_ids[:n], **changes)
    shard = own(LOGITS, rank, 2)
    found["too large"] = error_of(pk.token_stats, shard, vocab_size=V + 1)
    found["no column"] = error_of(pk.token_stats, LOGITS[:, :0])
    found["token id"] = error_of(pk.token_stats, shard, TOKEN_IDS + 20)
    rows_of_weight = own(WEIGHT, rank, 2, 0)
    found["chunk_rows"] = error_of(pk.linear_token_stats, HIDDEN, rows_of_weight, chunk_rows=3 + rank)
    bias = own(BIAS, rank, 2) if rank else None
    found["bias"] = error_of(pk.linear_token_stats, HIDDEN, rows_of_weight, bias=bias)
    hidden = HIDDEN.clone().requires_grad_(rank == 0)
    found["requires_grad"] = error_of(pk.linear_token_stats, hidden, rows_of_weight)
    return found


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_difference_is_named_on_every_rank(ranks, name):
    for rank in ranks[:2]:
        error = rank["differences"][name]
        assert re.search(DIFFERENT[name].says, error), error


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("too large", f"vocab_size must be in [1, {V}], the columns of all ranks of vocab_group together, got {V + 1}"),
        ("no column", "vocab_size must be in [1, 0]"),
        ("token id", f"token_ids must be -100 or in [0, {V}), got {187 + 20}"),
        ("chunk_rows", "chunk_rows must be the same on all ranks of vocab_group, got 3 on rank 0 and 4 on rank 1"),
        ("bias", "number of biases must be the same on all ranks of vocab_group, got 0 on rank 0 and 1 on rank 1"),
        ("requires_grad", "hidden.requires_grad must be the same on all ranks of vocab_group, got 1 on rank 0 and 0"),
    ],
)
def test_bad_input_is_named_on_every_rank(ranks, name, says):
    assert all(says in rank["differences"][name] for rank in ranks[:2])


def wait_for_nobody(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """The error of a rank whose group's other never comes, and the seconds until then."""
    if rank == 1:
        time.sleep(5)  # as good as dead: what it holds open would close with it
        return {}
    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        pk.token_stats(own(LOGITS, rank, 2), TOKEN_IDS, vocab_group=group)
    return {"error": str(error.value), "seconds": time.monotonic() - start}


def test_a_rank_that_never_comes_is_the_backends_timeout(ranks):
    found = ranks[0]["nobody"]
    assert found["error"]
    assert found["seconds"] < 20


def test_a_group_must_be_one():
    for value in (2, "tp", -100):  # -100 is what new_group returns to ranks that are not in it
        with pytest.raises(TypeError, match="vocab_group must be of type ProcessGroup, got"):
            pk.token_stats(LOGITS, vocab_group=value)
        with pytest.raises(TypeError, match="vocab_group must be of type ProcessGroup, got"):
            pk.linear_token_stats(HIDDEN, WEIGHT, vocab_group=value)


# Traffic


def traffic(rank: int, n_ranks: int) -> dict[str, float]:
    """Bytes that a rank sends for each token, as a ring adds them up: twice (n - 1) / n of what is added."""
    reduce, sent = dist.all_reduce, [0]

    def counted(x: Tensor, *args, **kwargs):
        sent[0] += x.numel() * x.element_size()
        return reduce(x, *args, **kwargs)

    dist.all_reduce = counted
    found = {}
    for n_cols in (1000, 9000):
        flat_rows = flat(64, n_cols, 0.5)
        cases = {"real-like": (flat_rows, {}), "no nucleus": (flat_rows, {"top_p": 1.0})}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):  # ties, from the smallest float on
            cases[f"the longest search, {dtype}"] = torch.zeros(64, n_cols, dtype=dtype), {"softcap": 30.0}
        for name, (logits, options) in cases.items():
            sent[0] = 0
            pk.token_stats(own(logits, rank, n_ranks), vocab_group=dist.group.WORLD, **options)
            found[f"{name}, {n_cols}"] = sent[0] / 64 * 2 * (n_ranks - 1) / n_ranks
    dist.all_reduce = reduce
    return found


def test_traffic(ranks):
    """What benchmarks/split_cost.py counts, whose bytes for 8 ranks a test there bounds; however large V is."""
    found, *others = (rank["traffic"] for rank in ranks)
    assert all(other == found for other in others)
    for n_cols in (1000, 9000):
        longest = {
            dtype: split_cost.ring_bytes(split_cost.numbers_of(rounds), ranks=4)
            for dtype, rounds in ((torch.float32, 16), (torch.bfloat16, 8), (torch.float16, 8))
        }
        for dtype, sent in longest.items():
            assert found[f"the longest search, {dtype}, {n_cols}"] == sent
        assert found[f"no nucleus, {n_cols}"] == split_cost.ring_bytes(split_cost.SUMS + 1, ranks=4)
        assert 0 < found[f"real-like, {n_cols}"] < longest[torch.float32]


# Heads


LINEAR: dict[str, dict] = {
    "float32": {},
    "without bias": {"bias": None},
    "chunks": {"chunk_rows": 5},
    "padding": {"vocab_size": V - 3, "chunk_rows": 5},
    "nothing but padding": {"vocab_size": 60},
    "bfloat16": {"dtype": torch.bfloat16, "chunk_rows": 4},
    "valid, temperatures, softcap": {"valid": VALID, "temperature": ROW_TEMPERATURES, "softcap": 10.0},
    "a frozen head": {"frozen": ("weight", "bias")},
    "frozen states": {"frozen": ("hidden",)},
}
if operator.HAS_TRITON and operator.INTERPRETED:
    LINEAR["kernels"] = {"backend": "triton", "chunk_rows": 5, "valid": VALID, "vocab_size": V - 3}


def head(rank: int | None, group: dist.ProcessGroup | None, options: dict) -> dict[str, Tensor]:
    """Statistics and gradients of this rank's part of the head; of the whole head without a rank."""
    options = dict(options)
    dtype, frozen = options.pop("dtype", torch.float32), options.pop("frozen", ())
    inputs = {"hidden": HIDDEN, "weight": WEIGHT, "bias": options.pop("bias", BIAS)}
    leaves = {}
    for name, x in inputs.items():
        if x is not None:
            x = x if name == "hidden" or group is None else own(x, rank, group.size(), 0)
            leaves[name] = x.to(dtype).clone().requires_grad_(name not in frozen)
    options["vocab_group"] = group
    ids = TOKEN_IDS % options.get("vocab_size", V)
    stats = pk.linear_token_stats(leaves["hidden"], leaves["weight"], ids, bias=leaves.get("bias"), **options)
    mixed(stats).backward()
    found = {f"d_{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return found | {name: value.detach() for name, value in stats._asdict().items()}


@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("name", LINEAR)
def test_a_head_split_over_ranks(ranks, n_ranks, name):
    expected = head(None, None, LINEAR[name])
    found = [rank[f"heads {n_ranks}"][name] for rank in ranks[:n_ranks]]
    tolerance = {"atol": 0.06, "rtol": 0.05} if "bfloat16" in name else {"atol": 2e-5, "rtol": 1e-4}
    for of_rank in found:
        assert of_rank.keys() == expected.keys()
    for key, value in expected.items():
        if key in ("d_weight", "d_bias"):
            torch.testing.assert_close(torch.cat([of_rank[key] for of_rank in found]), value, **tolerance)
        else:
            assert all(torch.equal(of_rank[key], found[0][key]) for of_rank in found)
            torch.testing.assert_close(found[0][key], value, **tolerance)


# DTensors, meshes and compilers


def check_dtensors(rank: int, mesh: DeviceMesh) -> None:
    whole = LOGITS.clone().requires_grad_()
    expected = pk.token_stats(whole, TOKEN_IDS)
    mixed(expected).backward()

    logits = distribute_tensor(LOGITS, mesh, [Shard(1)]).requires_grad_()
    stats = pk.token_stats(logits, TOKEN_IDS)
    mixed(stats).backward()
    for value, other in zip(stats, expected, strict=True):
        close(value, other)
    assert isinstance(logits.grad, DTensor)
    close(logits.grad.full_tensor(), whole.grad)
    # Sharded by what is counted from the end, with token ids that are DTensors too; and not sharded.
    token_ids = distribute_tensor(TOKEN_IDS, mesh, [Replicate()])
    close(pk.token_stats(distribute_tensor(LOGITS, mesh, [Shard(-1)]), token_ids).logp, expected.logp)
    close(pk.token_stats(distribute_tensor(LOGITS, mesh, [Replicate()]), token_ids).entropy, expected.entropy)
    # Rows sharded: each rank has its own, and all their columns.
    rows = distribute_tensor(LOGITS, mesh, [Shard(0)])
    close(pk.token_stats(rows, own(TOKEN_IDS, rank, 2)).logp, own(expected.logp, rank, 2))

    for placement in (Partial(), _StridedShard(1, split_factor=2)):
        with pytest.raises(ValueError, match="that are a DTensor must be replicated or sharded"):
            pk.token_stats(DTensor.from_local(LOGITS, mesh, [placement], run_check=False), TOKEN_IDS)
    with pytest.raises(ValueError, match="inplace_backward must be False for logits that are a DTensor"):
        pk.token_stats(logits, TOKEN_IDS, inplace_backward=True)
    with pytest.raises(ValueError, match="vocab_group must be None for logits that are a DTensor"):
        pk.token_stats(logits, TOKEN_IDS, vocab_group=mesh.get_group())

    # A head that is a DTensor: its rows are this rank's, and without a group all are gathered.
    weight, group = distribute_tensor(WEIGHT, mesh, [Shard(0)]).requires_grad_(), mesh.get_group()
    whole = WEIGHT.clone().requires_grad_()
    mixed(pk.linear_token_stats(HIDDEN, whole, TOKEN_IDS)).backward()
    for options in ({"vocab_group": group}, {}):
        mixed(pk.linear_token_stats(HIDDEN, weight, TOKEN_IDS, **options)).backward()
        close(weight.grad.full_tensor(), whole.grad)
        weight.grad = None
    with pytest.raises(ValueError, match="must be sharded by rows over vocab_group, got Replicate"):
        pk.linear_token_stats(HIDDEN, distribute_tensor(WEIGHT, mesh, [Replicate()]), vocab_group=group)


VALID_OF_RANKS = torch.arange(N) % 5 != 0


def paec_term(stats: pk.TokenStats, valid: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    paec = anchored(CONFIG, process_group=group)
    paec.observe(stats, valid)
    return paec.term(stats, valid, paec.plan())


def check_mesh(rank: int) -> None:
    """Two ranks have the columns of some positions, two others those of the others."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("positions", "vocabulary"))
    place, column = mesh.get_local_rank("positions"), mesh.get_local_rank("vocabulary")
    whole = LOGITS.clone().requires_grad_()
    expected = paec_term(pk.token_stats(whole, TOKEN_IDS), VALID_OF_RANKS, alone(rank))
    expected.backward()

    shard = own(own(LOGITS, place, 2, 0), column, 2).requires_grad_()
    stats = pk.token_stats(shard, own(TOKEN_IDS, place, 2), vocab_group=mesh.get_group("vocabulary"))
    term = paec_term(stats, own(VALID_OF_RANKS, place, 2), mesh.get_group("positions"))
    term.backward()
    # Data-parallel ranks average: the terms and gradients of both places are twice the whole's.
    terms = term.detach().clone()
    dist.all_reduce(terms, group=mesh.get_group("positions"))
    close(terms / 2, expected.detach())
    close(shard.grad / 2, own(own(whole.grad, place, 2, 0), column, 2))

    loss_fn = pk.PAECLoss(CONFIG, process_group=alone(rank))
    loss_fn.paec.load_state_dict(anchored(CONFIG).state_dict())
    advantages, old_logp = LOGITS[:, 1], -LOGITS[:, 2].abs()
    whole_loss = loss_fn(whole, TOKEN_IDS, advantages, VALID_OF_RANKS, old_logp).loss
    (gradient,) = torch.autograd.grad(whole_loss, whole)
    loss_fn = pk.PAECLoss(CONFIG, process_group=mesh.get_group("positions"), vocab_group=mesh.get_group("vocabulary"))
    loss_fn.paec.load_state_dict(anchored(CONFIG).state_dict())
    of_rows = (own(x, place, 2) for x in (TOKEN_IDS, advantages, VALID_OF_RANKS, old_logp))
    (of_rank,) = torch.autograd.grad(loss_fn(shard, *of_rows).loss, shard)
    close(of_rank / 2, own(own(gradient, place, 2, 0), column, 2))

    of_both = DTensor.from_local(shard.detach(), mesh, [Shard(0), Shard(1)]).requires_grad_()
    stats_of_both = pk.token_stats(of_both, own(TOKEN_IDS, place, 2))
    assert torch.equal(stats_of_both.entropy, stats.entropy)
    twice = DTensor.from_local(shard.detach(), mesh, [Shard(1), Shard(1)])
    with pytest.raises(ValueError, match="by one dimension of the mesh at most"):
        pk.token_stats(twice)


def alone(rank: int) -> dist.ProcessGroup:
    return [dist.new_group([r]) for r in range(dist.get_world_size())][rank]


def check_compilers(rank: int, mesh: DeviceMesh) -> None:
    group = mesh.get_group()

    def of_logits(z: Tensor) -> Tensor:
        return mixed(pk.token_stats(z, TOKEN_IDS, vocab_group=group))

    def of_hidden(hidden: Tensor, weight: Tensor) -> Tensor:
        return mixed(pk.linear_token_stats(hidden, weight, TOKEN_IDS, vocab_group=group))

    for function, inputs in ((of_logits, (own(LOGITS, rank, 2),)), (of_hidden, (HIDDEN, own(WEIGHT, rank, 2, 0)))):
        results = []
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in inputs]
            value = call(*leaves)
            value.backward()
            results.append([value.detach(), *(x.grad for x in leaves)])
        for eager, compiled in zip(*results, strict=True):
            close(compiled, eager)

    graphs = []  # one for any number of rows
    counting = torch.compile(of_some, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(1) or graph)
    for n in (3, 5, 12):
        close(
            counting(own(LOGITS, rank, 2)[:n], TOKEN_IDS[:n], group),
            of_some(own(LOGITS, rank, 2)[:n], TOKEN_IDS[:n], group),
        )
    assert len(graphs) == 1
    logits = distribute_tensor(LOGITS, mesh, [Shard(1)])
    compiled = torch.compile(of_dtensor, fullgraph=True, backend="aot_eager")
    close(compiled(logits), of_dtensor(logits))


def of_some(z: Tensor, token_ids: Tensor, group: dist.ProcessGroup) -> Tensor:
    return mixed(pk.token_stats(z, token_ids, vocab_group=group))


def of_dtensor(z: Tensor) -> Tensor:
    return mixed(pk.token_stats(z, TOKEN_IDS))


def check_alone(group: dist.ProcessGroup) -> None:
    """A group of one rank is as good as none."""
    split = pk.token_stats(LOGITS, TOKEN_IDS, vocab_group=group)
    for value, expected in zip(split, pk.token_stats(LOGITS, TOKEN_IDS), strict=True):
        assert torch.equal(value, expected)
    with pytest.raises(ValueError, match="logits must have shape"):
        pk.token_stats(LOGITS[:, :0], vocab_group=group)


def work(rank: int) -> dict[str, Any]:
    """Numbers, and the text of what failed by name: ranks that stop leave others waiting, so all go on."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    two, three = dist.new_group([0, 1]), dist.new_group([0, 1, 2])
    impatient = dist.new_group([0, 1], timeout=timedelta(seconds=3))
    found: dict[str, Any] = {"traffic": traffic(rank, 4)}
    if rank < 2:
        found["differences"] = differences(rank, two)
        found["heads 2"] = {name: head(rank, two, options) for name, options in LINEAR.items()}
    if rank < 3:
        found["heads 3"] = {name: head(rank, three, options) for name, options in LINEAR.items()}
    # Of pairs the first is as good as both.
    own_mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("pairs", "tp"))["tp"]
    checks = {"mesh": partial(check_mesh, rank), "alone": partial(check_alone, alone(rank))}
    if rank < 2:
        checks |= {
            "dtensors": partial(check_dtensors, rank, own_mesh),
            "compilers": partial(check_compilers, rank, own_mesh),
        }
    for name, check in checks.items():
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    if rank < 2:
        found["nobody"] = wait_for_nobody(rank, impatient)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks_once(4, work, tmp_path_factory)


@pytest.mark.parametrize(("name", "n_ranks"), [("dtensors", 2), ("mesh", 4), ("compilers", 2), ("alone", 4)])
def test_it_holds_on_every_rank(ranks, name, n_ranks):
    """What a function ``check_NAME`` above checks there."""
    for rank in ranks[:n_ranks]:
        assert rank[name] == "", rank[name]


def ask_in_a_graph(rank: int) -> None:
    dist.init_process_group("nccl")
    rows = Rows(None, None, torch.ones(1, device="cuda"))
    assert agree(4, {"vocab_size": 0}, rows, dist.group.WORLD).vocab_size == 4
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="a CUDA graph cannot hold"):
        agree(4, {"vocab_size": 0}, rows, dist.group.WORLD)


@pytest.mark.gpu
def test_a_cuda_graph_cannot_hold_the_question(tmp_path):
    on_ranks(1, ask_in_a_graph, tmp_path)
