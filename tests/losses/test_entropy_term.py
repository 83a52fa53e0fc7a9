"""What PAEC and the terms it is compared with share: exactness, invalid tokens, state, checkpoints, and misuse."""

import copy
import dataclasses
import io
import math
from typing import Any

import pytest
import torch
from losses.batches import CONFIG, accuracy_of, make_batch, whole_step, with_anchor
from torch import Tensor, nn

from paec_kernels import reference
from paec_kernels.losses.entropy_term import EntropyTerm
from paec_kernels.losses.paec import PAEC
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.losses.rivals import AER, SIREN, AERConfig, GlobalEntropy, GlobalEntropyConfig, SIRENConfig

pytestmark = pytest.mark.usefixtures("device")
TERMS = {
    "PAEC": lambda: PAEC(CONFIG, backend="torch"),
    "PAEC in Triton": lambda: PAEC(CONFIG, backend="triton"),
    "integral PAEC": lambda: PAEC(dataclasses.replace(CONFIG, penalty="integral"), backend="torch"),
    "GlobalEntropy": lambda: GlobalEntropy(GlobalEntropyConfig(coef=0.3)),
    "AER": lambda: AER(AERConfig(initial_coef=0.3)),
    "SIREN": lambda: SIREN(SIRENConfig(coef=0.3, rho=0.6)),
}
CHANGES = {
    PAECConfig: {"rho": 0.9, "anchor_steps": 2},
    GlobalEntropyConfig: {"coef": 0.5},
    AERConfig: {"target_ratio": 0.5, "coef_step": 0.1},
    SIRENConfig: {"rho": 0.5},
}


@pytest.fixture(params=TERMS)
def term(request: pytest.FixtureRequest, device: str) -> EntropyTerm:
    """A term whose anchor is not set."""
    if "Triton" in request.param:
        pytest.importorskip("triton", reason="the triton package is not installed")
    return TERMS[request.param]()


def state_of(term: EntropyTerm) -> dict[str, Any]:
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in term.state_dict().items()}


def buffers_of(term: EntropyTerm) -> dict[str, float]:
    """Return all buffers, those too that are not in the state."""
    return {name: value.item() for name, value in term.named_buffers()}


def trained(term: EntropyTerm, seeds: range) -> EntropyTerm:
    for seed in seeds:
        batch = make_batch(3, 40, seed=seed)
        whole_step(term, batch.stats, batch.valid)
        term.step()
    return term


# Tokens


@pytest.mark.parametrize("term", ["GlobalEntropy", "AER", "SIREN"], indirect=True)  # PAEC's mask has no gradient
def test_gradients(term):
    batch, term = make_batch(3, 4), with_anchor(term)

    def loss(logits: Tensor) -> Tensor:
        return whole_step(copy.deepcopy(term), reference.token_stats(logits, valid=batch.valid), batch.valid)

    assert torch.autograd.gradcheck(loss, batch.logits)


def test_micro_batches_add_up_to_the_whole_step(term):
    (logits, valid), term = make_batch(3, 40), with_anchor(term)
    stats = reference.token_stats(logits, valid=valid)
    whole, accuracy = whole_step(term, stats, valid), accuracy_of(stats)
    rows = (slice(0, 1), slice(1, 3), slice(3, 3))
    parts = [reference.token_stats(logits[r], valid=valid[r]) for r in rows]
    for part, r in zip(parts, rows, strict=True):
        term.observe(part, valid[r])
    plan = term.plan()
    total = sum(term.term(part, valid[r], plan, accuracy[r]) for part, r in zip(parts, rows, strict=True))
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (total, whole)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-15)


def test_float32(term):
    term = with_anchor(term)
    true_loss, loss = (
        whole_step(term, batch.stats, batch.valid)
        for batch in (make_batch(3, 40), make_batch(3, 40, dtype=torch.float32))
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, true_loss.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_invalid_positions_reach_nothing(term, poison):
    batch, term = make_batch(3, 40, dtype=torch.float32), with_anchor(term)
    stats = batch.stats
    clean = whole_step(term, stats, batch.valid)
    poisoned = {
        name: torch.where(batch.valid, getattr(stats, name).detach(), poison).requires_grad_()
        for name in ("entropy", "nucleus_entropy", "margin")
    }
    loss = whole_step(term, stats._replace(**poisoned), batch.valid)
    assert torch.equal(loss, clean)
    for grad in torch.autograd.grad(loss, list(poisoned.values()), allow_unused=True):
        assert grad is None or (grad[~batch.valid] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 7)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: 1 / 0
def test_no_valid_token_is_exactly_nothing(term, shape):
    batch = make_batch(*shape, p_valid=0)
    for each in (term, with_anchor(copy.deepcopy(term))):
        before = state_of(each)
        loss = whole_step(each, batch.stats, batch.valid)
        assert loss == 0
        assert (torch.autograd.grad(loss, batch.logits)[0] == 0).all()
        each.step()
        each.plan()  # of nothing at all
        each.step()
        assert state_of(each) == before


def test_a_nan_shows_in_the_loss_and_enters_no_state(term):
    batch, before = make_batch(2, 20, p_valid=1), state_of(term)
    with torch.no_grad():
        batch.logits[1, 3, 5] = math.nan
    assert whole_step(term, batch.stats, batch.valid).isnan()
    term.step()
    assert state_of(term) == before


def test_a_plan_has_no_gradient_and_keeps_no_graph(term):
    batch = make_batch(2, 10)
    term.observe(batch.stats, batch.valid)
    assert not any(x.requires_grad for x in term._observed)
    assert not any(x.requires_grad for x in term.plan())


# Checkpoints


def test_state_dict_round_trip_through_a_file(term):
    restored, file = copy.deepcopy(term), io.BytesIO()
    torch.save(trained(with_anchor(term), range(2)).state_dict(), file)  # an anchor at which the penalty acts
    file.seek(0)
    assert state_of(restored) != state_of(term)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert state_of(restored) == state_of(term)
    batch = make_batch(3, 40, seed=9)
    losses = [whole_step(trained(each, range(5, 8)), batch.stats, batch.valid) for each in (restored, term)]
    assert torch.equal(*losses)
    assert state_of(restored) == state_of(term)
    assert buffers_of(restored) == buffers_of(term)
    assert restored.anchor.isfinite()


def test_a_checkpoint_of_another_config_is_refused_and_changes_nothing(term):
    config, changes = term.config, CHANGES[type(term.config)]
    state = trained(term, range(2)).state_dict()
    other = type(term)(dataclasses.replace(config, **changes))
    before = state_of(other)
    model = nn.ModuleDict({"term": other})
    fields = "; ".join(f"{name}: checkpoint {getattr(config, name)}, here {value}" for name, value in changes.items())
    for module, checkpoint in ((other, state), (model, {f"term.{name}": value for name, value in state.items()})):
        for strict in (True, False):
            with pytest.raises(RuntimeError) as error:
                module.load_state_dict(checkpoint, strict=strict)
            assert f"another {type(config).__name__} ({fields})" in str(error.value)
            assert state_of(other) == before


def test_an_incomplete_checkpoint_is_refused_and_changes_nothing(term):
    other, before = copy.deepcopy(term), state_of(term)
    whole = trained(term, range(2)).state_dict()
    for name in whole:
        state = {other_name: value for other_name, value in whole.items() if other_name != name}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            other.load_state_dict(state)
        assert other.load_state_dict(state, strict=False).missing_keys == [name]
        assert state_of(other) == before


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(term):
    other, before = copy.deepcopy(term), state_of(term)
    state = trained(term, range(2)).state_dict()
    for name in state:
        damaged = (torch.zeros(3, 3), *map(torch.tensor, (math.nan, math.inf, -1)))
        for value in ({}, None) if name == "_extra_state" else damaged:
            with pytest.raises(RuntimeError, match=f"{name} must"):
                other.load_state_dict(state | {name: value})
            assert state_of(other) == before


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_the_state_stays_float32_in_a_module_that_is_cast(term, cast):
    before = state_of(with_anchor(term, 1 / 3))
    cast(nn.Sequential(term))
    assert {buffer.dtype for buffer in term.buffers()} == {torch.float32, torch.int64}
    assert state_of(term) == before


# Misuse


def test_misuse_of_the_life_cycle(term):
    batch = make_batch(2, 10)
    stats, valid = batch.stats, batch.valid
    with pytest.raises(RuntimeError, match=r"call forward\(\) or plan\(\) before it"):
        term.step()
    with pytest.raises(TypeError, match=rf"plan must be the {term.PLAN.__name__} .* got None"):
        term.term(stats, valid, None, accuracy_of(stats))
    whole_step(term, stats, valid)
    with pytest.raises(RuntimeError, match=r"plan\(\) was already made"):
        term.plan()
    term.step()
    assert term.anchor_count == 1
    with pytest.raises(RuntimeError, match=r"call forward\(\) or plan\(\) before it"):
        term.step()


def test_forget_drops_a_step_that_failed(term):
    failed, batch = make_batch(2, 10), make_batch(3, 12, seed=1)
    fresh = copy.deepcopy(term)
    term.observe(failed.stats, failed.valid)
    term.forget()
    for each in (term, fresh):
        each.observe(batch.stats, batch.valid)
    assert str(term.plan()) == str(fresh.plan())


def test_a_config_of_another_type_is_refused(term):
    with pytest.raises(TypeError, match=rf"config must be of type {type(term.config).__name__}, got \{{'rho': 0.8\}}"):
        type(term)({"rho": 0.8})
