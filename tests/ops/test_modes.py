"""PyTorch's modes and transforms around the operators: each works, or says by name that it does not."""

import copy
import multiprocessing
import pickle
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from ops.rows import flat
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import paec_kernels as pk

V, D, N = 70, 8, 6
WEIGHT, BIAS = flat(V, D), flat(1, V)[0]
TOKEN_IDS = torch.arange(N) * 11
VALID = torch.tensor([True, True, False, True, True, True])


def of_logits(x: Tensor, **options) -> pk.TokenStats:
    return pk.token_stats(x, TOKEN_IDS, valid=VALID, **options)


def of_hidden(x: Tensor, **options) -> pk.TokenStats:
    return pk.linear_token_stats(x[:, :D], WEIGHT, TOKEN_IDS, bias=BIAS, valid=VALID, **options)


def mixed(stats: pk.TokenStats) -> Tensor:
    return (stats.logp - stats.entropy * stats.nucleus_entropy).sum()


def one_pass(x: Tensor) -> Tensor:
    return pk.one_pass_loss(x[:, :D], WEIGHT, TOKEN_IDS, lambda stats, _: mixed(stats), bias=BIAS, valid=VALID)


LOSSES = {
    "token_stats": lambda x: mixed(of_logits(x)),
    "linear_token_stats": lambda x: mixed(of_hidden(x)),
    "one_pass_loss": one_pass,
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def loss_and_gradient(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    loss = LOSSES[name](leaf)
    return loss.detach(), *torch.autograd.grad(loss, leaf)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_about_given_logits(backend, dtype):
    logits, token_ids = flat(N, V).requires_grad_(), torch.arange(N)
    expected = pk.token_stats(logits, token_ids, backend=backend)
    (d_logits,) = torch.autograd.grad(mixed(expected), logits)
    with torch.autocast(logits.device.type, dtype=dtype):
        stats = pk.token_stats(logits, token_ids, backend=backend)
        (inside,) = torch.autograd.grad(mixed(stats), logits, retain_graph=True)
    (outside,) = torch.autograd.grad(mixed(stats), logits)
    for value, other in zip((*stats, inside, outside), (*expected, d_logits, d_logits), strict=True):
        assert value.dtype == other.dtype
        assert torch.equal(value, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_the_linear_form_is_a_linear_layers(dtype):
    """Nested, left again, and never with a copy of the weight from before it changed."""
    hidden, weight = flat(N, D), WEIGHT.clone()

    def entropy(dtype=torch.float32):
        return pk.linear_token_stats(hidden.to(dtype), weight.to(dtype)).entropy

    with torch.autocast("cpu", dtype=dtype):
        for _ in range(2):
            assert torch.equal(pk.linear_token_stats(hidden, weight).entropy, entropy(dtype))
            with torch.no_grad():
                weight.mul_(1.5)
        with torch.autocast("cpu", enabled=False):
            stats = pk.linear_token_stats(hidden, weight)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inner = pk.linear_token_stats(hidden, weight).entropy
    assert torch.equal(stats.entropy, entropy())
    assert torch.equal(inner, entropy(torch.bfloat16))


# Gradients: modes, checkpoints, determinism


@each_loss
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_makes_the_same_bits_again(name, use_reentrant):
    x = flat(N, V)
    expected = loss_and_gradient(name, x.tanh())[1] * (1 - x.tanh().square())
    leaf = x.clone().requires_grad_()
    checkpoint(lambda y: LOSSES[name](y.tanh()), leaf, use_reentrant=use_reentrant).backward()
    plain = x.clone().requires_grad_()
    LOSSES[name](plain.tanh()).backward()
    assert torch.equal(leaf.grad, plain.grad)
    torch.testing.assert_close(leaf.grad, expected)


@each_loss
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_numbers_are_the_same(name, mode):
    x = flat(N, V)
    expected, _ = loss_and_gradient(name, x)
    with mode():
        loss = LOSSES[name](x.clone().requires_grad_())
    assert not loss.requires_grad
    assert torch.equal(loss, expected)


@each_loss
def test_a_second_derivative_is_an_error(name):
    leaf = flat(N, V).requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        torch.autograd.grad(LOSSES[name](leaf), leaf, create_graph=True)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_everything_runs_where_only_deterministic_algorithms_may(where):
    torch.use_deterministic_algorithms(True)  # the fixture that poisons memory only warns
    with torch.device(where):
        head = WEIGHT.to(where)
        logits, hidden = flat(N, V).view(2, 3, V).requires_grad_(), flat(N, D).view(2, 3, D).requires_grad_()
        token_ids, valid = torch.arange(N).view(2, 3) * 11, torch.tensor([[True, False, True], [True, True, True]])
        accuracy, advantages = torch.tensor([[0.5], [1.0]]), torch.tensor([[1.0], [-1.0]])
        stats = pk.token_stats(1.0 * logits, token_ids, valid=valid, inplace_backward=True)
        loss = pk.PAEC(pk.PAECConfig())(stats, valid).loss + mixed(
            pk.linear_token_stats(hidden, head, token_ids, valid=valid)
        )
        loss = loss + pk.one_pass_loss(hidden, head, token_ids, lambda s, _: mixed(s), valid=valid)
        for term in (pk.GlobalEntropy(), pk.AER(), pk.SIREN()):
            term.observe(stats, valid)
            loss = loss + term.term(stats, valid, term.plan(), accuracy)
            term.step()
        steps = [[x.detach()] for x in (stats.logp, stats.logp + 0.1, advantages, valid)]
        (removed,) = pk.clip_cov_selection(*steps, seed=0, cov_low=-9, cov_high=9)
        (penalised,) = pk.kl_cov_selection(steps[0], *steps[2:])
        arguments = stats.logp, steps[1][0], advantages, valid
        for policy in (
            pk.grpo_loss(*arguments),
            pk.cispo_loss(*arguments),
            pk.clip_cov_loss(*arguments, removed),
            pk.kl_cov_loss(*arguments, penalised),
        ):
            loss = loss + policy[0]
        loss.backward()
    assert logits.grad.isfinite().all()
    assert hidden.grad.isfinite().all()


# torch.func and torch.export


def test_vmap_is_the_batch(backend):
    logits, token_ids = flat(N, V).view(2, 3, V), torch.tensor([1, 2, 3])
    mapped = torch.func.vmap(lambda z: pk.token_stats(z, token_ids, backend=backend))(logits)
    expected = pk.token_stats(logits, token_ids.expand(2, 3), backend=backend)
    for value, other in zip(mapped, expected, strict=True):
        assert torch.equal(value, other)


@each_loss
def test_a_tangent_is_not_lost_without_a_word(name):
    """But where a compiled graph has dropped it before: see docs/in_your_trainer.md."""
    x = flat(N, V)
    with pytest.raises(RuntimeError, match=f"{name} has no forward-mode derivative"):
        torch.func.jvp(LOSSES[name], (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        LOSSES[name](torch.autograd.forward_ad.make_dual(x, x))
    compiled = torch.compile(lambda x: torch.func.jvp(LOSSES[name], (x,), (x,)), backend="eager")
    with pytest.raises(RuntimeError, match=f"{name} has no forward-mode derivative"):
        compiled(x)
    LOSSES[name](x)


@each_loss
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_functional_gradients_are_an_error(name, transform):
    with pytest.raises(RuntimeError, match=r"functorch|forward-mode"):
        transform(LOSSES[name])(flat(N, V))


def test_a_gradient_of_stride_zero_enters_a_compiled_graph(backend):
    """What `.sum().backward()` outside of it makes, for one statistic at a time."""
    logits, token_ids = flat(N, V).requires_grad_(), torch.arange(N)

    def statistics(z):
        return pk.token_stats(z, token_ids, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(statistics, fullgraph=True, backend="aot_eager")
    for name in ("logp", "entropy", "nucleus_entropy"):
        found, expected = (
            torch.autograd.grad(getattr(function(logits), name).sum(), logits)[0] for function in (compiled, statistics)
        )
        assert expected.any()
        assert torch.equal(found, expected)


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(WEIGHT.clone())

    def forward(self, hidden: Tensor, token_ids: Tensor) -> tuple[pk.TokenStats, pk.TokenStats]:
        options = {"temperature": 0.7, "softcap": 20.0}
        logits = torch.nn.functional.linear(hidden, self.weight)
        return (
            pk.token_stats(logits, token_ids, **options),
            pk.linear_token_stats(hidden, self.weight, token_ids, **options),
        )


def test_an_exported_program_takes_any_number_of_rows():
    n = torch.export.Dim("n", min=2)
    head = Head()
    program = torch.export.export(
        head, (flat(4, D), torch.arange(4)), dynamic_shapes={"hidden": {0: n}, "token_ids": {0: n}}
    )
    arguments = flat(9, D), torch.arange(9)
    for exported, expected in zip(program.module()(*arguments), head(*arguments), strict=True):
        assert all(map(torch.equal, exported, expected))


# Modules


TERMS = {
    "PAEC": lambda: pk.PAEC(pk.PAECConfig(anchor_steps=1)),
    "integral PAEC": lambda: pk.PAEC(pk.PAECConfig(anchor_steps=1, penalty="integral")),
    "PAECLoss": lambda: pk.PAECLoss(pk.PAECConfig(anchor_steps=1)),
    "GlobalEntropy": pk.GlobalEntropy,
    "AER": pk.AER,
    "SIREN": pk.SIREN,
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda term: pickle.loads(pickle.dumps(term))])
def test_a_copied_module_goes_on_from_the_same_state_on_its_own(name, copied):
    module = TERMS[name]()
    term = getattr(module, "paec", module)
    stats, valid = pk.token_stats(flat(N, V).view(2, 3, V)), VALID.view(2, 3)

    def take_a_step(term):
        term.plan()
        term.step()

    term.observe(stats, valid)
    other = copied(module)  # between observe and plan: what was observed comes along
    take_a_step(term)
    assert getattr(other, "paec", other).anchor_count == 0
    take_a_step(getattr(other, "paec", other))
    for value, expected in zip(other.buffers(), module.buffers(), strict=True):
        assert torch.equal(value, expected)
    assert other.state_dict().keys() == module.state_dict().keys()


def test_functional_call_takes_the_state_that_it_is_given():
    paec, stats = pk.PAEC(pk.PAECConfig(anchor_steps=1, rho_min=2.0)), pk.token_stats(flat(N, V))
    state = {name: value.clone() for name, value in paec.named_buffers()}
    state |= {"anchor_sum": torch.tensor(3.0), "anchor_count": torch.tensor(1)}
    out = torch.func.functional_call(paec, state, (stats, VALID))
    assert out.metrics["anchor"] == 3.0
    assert out.metrics["penalty"] > 0
    assert paec.anchor.isnan()
    assert paec.last_mean_entropy.isnan()


# Threads and processes


@each_loss
def test_threads_at_once_get_the_bits_of_one_alone(name):
    inputs = [scale * flat(N, V) for scale in (0.5, 1.0, 2.0, 4.0)]
    expected = [loss_and_gradient(name, x) for x in inputs]
    found: list[list] = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def work(x: Tensor, results: list) -> None:
        start.wait()
        results += [loss_and_gradient(name, x) for _ in range(10)]

    threads = [threading.Thread(target=work, args=arguments) for arguments in zip(inputs, found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, values in zip(found, expected, strict=True):
        assert len(results) == 10
        assert all(torch.equal(*pair) for result in results for pair in zip(result, values, strict=True))


class Scored(Dataset):
    """Rows that a worker scores, as a data pipeline that filters by entropy does."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        return pk.token_stats(flat(40, 300 + i)).entropy


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method):
    if method not in multiprocessing.get_all_start_methods() or (method == "fork" and sys.platform != "linux"):
        pytest.skip(f"no {method} on {sys.platform}")
    expected = [Scored()[i] for i in range(4)]  # this process has its threads before the workers start
    loader = DataLoader(Scored(), batch_size=None, num_workers=1, multiprocessing_context=method, timeout=120)
    found: Iterator[Tensor] = iter(loader)
    for value in expected:
        assert torch.equal(next(found), value)
