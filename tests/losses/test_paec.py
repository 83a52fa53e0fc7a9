"""PAEC against the definition: whole batches, micro-batches, the anchor, checkpoints, bad input."""

import dataclasses
import math
import warnings

import pytest
import torch
from losses import batches
from losses.batches import ANCHOR, CONFIG, VOCAB, Batch, flattened, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from paec_kernels import reference
from paec_kernels.losses.drop_in import PAECLoss
from paec_kernels.losses.paec import PAEC, Plan
from paec_kernels.losses.paec_config import PENALTIES, PAECConfig
from paec_kernels.types import TokenStats

pytestmark = pytest.mark.usefixtures("device")
CONFIGS = {
    "defaults": PAECConfig(),
    "penalty": CONFIG,
    "nucleus": dataclasses.replace(CONFIG, entropy_support="nucleus", nucleus_norm="none"),
    "vocab": dataclasses.replace(CONFIG, nucleus_norm="log_vocab", rho=0.3, alpha=0.9, tau_m=0.2),
    "no penalty": dataclasses.replace(CONFIG, lam=0.0),
    "relative": dataclasses.replace(CONFIG, penalty="relative"),
    "proportional": dataclasses.replace(CONFIG, penalty="proportional"),
    "integral": dataclasses.replace(CONFIG, penalty="integral"),
}
STRENGTH = 0.25  # of the integral penalty


SQUARES = [name for name in PENALTIES if name != "integral"]


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(loss, logits)
    return grad


def reference_loss(batch: Batch, config: PAECConfig, anchor: float | None = ANCHOR):
    strength = STRENGTH if config.penalty == "integral" else 0.0
    return reference.paec_loss(batch.stats, batch.valid, config, anchor, strength=strength)


def anchored(config: PAECConfig = CONFIG, anchor: float = ANCHOR, **options) -> PAEC:
    paec = batches.anchored(config, anchor, **options)
    paec.strength.fill_(STRENGTH)  # used by the integral penalty alone
    return paec


def in_micro_batches(paec: PAEC, micro_batches: list[Batch]) -> tuple[Plan, torch.Tensor, list[torch.Tensor]]:
    """The plan, the sum of the terms, and the gradient of each micro-batch's logits."""
    for batch in micro_batches:
        paec.observe(batch.stats, batch.valid)
    plan = paec.plan()
    terms = [paec.term(batch.stats, batch.valid, plan) for batch in micro_batches]
    grads = [gradient(term, batch.logits) for term, batch in zip(terms, micro_batches, strict=True)]
    return plan, torch.stack(terms).sum().detach(), grads


# Whole batch


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_the_definition(config):
    batch = make_batch(4, 60)
    loss, mask, metrics = reference_loss(batch, config)
    out = anchored(config)(batch.stats, batch.valid)
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.mask, mask, rtol=1e-12, atol=0)
    for name, value in metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(out.loss, batch.logits), gradient(loss, batch.logits), rtol=1e-9, atol=1e-15)
    assert out.metrics["anchor"] == ANCHOR
    assert out.metrics["floor"] == torch.tensor(config.rho_min * ANCHOR, dtype=torch.float64)


def test_the_penalty_is_one_sided():
    batch = make_batch(4, 60)
    low, high = (anchored(CONFIG, anchor)(batch.stats, batch.valid) for anchor in (0.1, ANCHOR))
    assert low.metrics["penalty"] == 0
    assert high.metrics["penalty"] > 0.1
    expected = -CONFIG.beta * low.metrics["mean_entropy"]
    torch.testing.assert_close(low.loss.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_gradient_is_that_of_the_value(penalty):
    # The mask does not depend on the entropy itself, so that the loss is a function of it.
    batch, paec = make_batch(3, 4), anchored(dataclasses.replace(CONFIG, penalty=penalty))
    stats = batch.stats

    def loss(entropy: torch.Tensor) -> torch.Tensor:
        return paec(stats._replace(entropy=entropy), batch.valid).loss

    assert torch.autograd.gradcheck(loss, stats.entropy.detach().requires_grad_())


def test_penalties_are_equal_at_a_floor_of_one_nat():
    batch = make_batch(4, 60)
    stats = batch.stats._replace(entropy=batch.stats.entropy / 8)
    outs = []
    for penalty in SQUARES:
        config = dataclasses.replace(CONFIG, penalty=penalty, rho_min=0.5)
        outs.append(anchored(config, anchor=2.0)(stats, batch.valid))
        assert outs[-1].metrics["floor"] == 1
        assert outs[-1].metrics["penalty"] > 0.1
    grads = [torch.autograd.grad(out.loss, batch.logits, retain_graph=True)[0] for out in outs]
    for out, grad in zip(outs, grads, strict=True):
        assert out.metrics == outs[0].metrics
        assert torch.equal(out.loss, outs[0].loss)
        assert torch.equal(grad, grads[0])


def test_a_relative_penalty_has_no_unit():
    # With all entropies and the anchor c times as large, it is the same.
    batch, config = make_batch(4, 60), dataclasses.replace(CONFIG, penalty="relative", beta=0.0)
    found = []
    for c in (1.0, 0.01):
        scaled = batch.stats._replace(entropy=c * batch.stats.entropy.detach())
        found.append(anchored(config, c * ANCHOR)(scaled, batch.valid))
    torch.testing.assert_close(found[0].loss, found[1].loss, rtol=1e-6, atol=0)
    shortfall = 1 - found[0].metrics["mean_entropy"] / found[0].metrics["floor"]
    assert found[0].metrics["penalty"] == pytest.approx(shortfall.item() ** 2, rel=1e-12)


def test_a_proportional_penalty_pulls_alike_at_any_floor():
    # With all entropies and the anchor c times as large, the weight of a nat is the same.
    batch, config = make_batch(4, 60), dataclasses.replace(CONFIG, penalty="proportional")
    pulls = []
    for c in (1.0, 0.01):
        scaled = batch.stats._replace(entropy=c * batch.stats.entropy.detach())
        metrics = anchored(config, c * ANCHOR)(scaled, batch.valid).metrics
        pulls.append(metrics["pull"].item())
        assert metrics["pull"] == pytest.approx(2 * config.lam * (1 - metrics["floor_ratio"].item()), rel=1e-6)
    assert pulls[0] == pytest.approx(pulls[1], rel=1e-6)
    assert pulls[0] > 0.1


def test_the_integral_strength_follows_the_shortfall():
    # H_bar of each step is the entropy of all its tokens; the floor is .5 from the second step on.
    entropies = [1.0, 0.25, 0.4, 0.5, 2.0, 0.25]
    expected = [0.0, 0.0, 0.05, 0.07, 0.07, 0.0, 0.05]  # c += .1 (1 - H / .5), which is not negative
    paec = PAEC(PAECConfig(penalty="integral", lam=0.1, rho_min=0.5, anchor_steps=1, beta=0.01))
    ones = torch.ones(1, 6, dtype=torch.float64)
    for h, c in zip(entropies, expected, strict=False):
        entropy = (h * ones).requires_grad_()
        stats = TokenStats(None, entropy, ones, ones, ones, 3 * ones.int())
        out = paec(stats, ones.bool())
        assert out.metrics["pull"].item() == pytest.approx(c)
        assert out.metrics["penalty_active"] == (c > 0)
        assert gradient(out.loss, entropy).sum().item() == pytest.approx(-0.01 - c)
        paec.step()
    assert paec.strength.item() == pytest.approx(expected[-1])


def test_the_integral_strength_of_a_plan_stays():
    paec, batch = anchored(CONFIGS["integral"]), make_batch(2, 5, dtype=torch.float32)
    plan = paec(batch.stats, batch.valid).metrics
    paec.step()
    assert plan["pull"] == STRENGTH != paec.strength


def test_a_step_that_is_not_taken_leaves_the_integral_strength():
    paec, batch = anchored(CONFIGS["integral"]), make_batch(2, 5, p_valid=0)
    paec(batch.stats, batch.valid)
    paec.step()
    batch = make_batch(2, 5)
    paec(batch.stats._replace(entropy=batch.stats.entropy * math.nan), batch.valid)
    paec.step()
    paec.anchor_sum.fill_(-1e-8)  # rounding can take an entropy under 0
    paec(batch.stats, batch.valid)
    paec.step()
    assert paec.strength.item() == pytest.approx(STRENGTH)


def test_the_integral_strength_is_saved():
    paec = anchored(CONFIGS["integral"])
    other = PAEC(CONFIGS["integral"])
    other.load_state_dict(paec.state_dict())
    assert other.strength == paec.strength > 0
    assert "strength" not in PAEC(CONFIG).state_dict()


@pytest.mark.parametrize("penalty", SQUARES)
@pytest.mark.parametrize("paec_of", [PAEC, lambda config: anchored(dataclasses.replace(config, rho_min=0.0))])
def test_without_a_floor_there_is_no_penalty(penalty, paec_of):
    batch, config = make_batch(4, 60), dataclasses.replace(CONFIG, penalty=penalty)
    out = paec_of(config)(batch.stats, batch.valid)
    assert out.metrics["penalty"] == out.metrics["penalty_per_token"] == out.metrics["penalty_active"] == 0
    torch.testing.assert_close(out.loss.detach(), -config.beta * out.metrics["mean_entropy"], rtol=1e-12, atol=0)
    assert gradient(out.loss, batch.logits).isfinite().all()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_float32_backends(backend, penalty):
    config = dataclasses.replace(CONFIG, penalty=penalty)
    truth = make_batch(5, 300)
    loss, mask, _ = reference_loss(truth, config)
    batch = make_batch(5, 300, dtype=torch.float32)
    out = anchored(config, backend=backend)(batch.stats, batch.valid)
    torch.testing.assert_close(out.loss, loss.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.mask, mask.float(), rtol=1e-4, atol=1e-5)
    grad, true_grad = gradient(out.loss, batch.logits), gradient(loss, truth.logits)
    torch.testing.assert_close(grad, true_grad.float(), rtol=1e-4, atol=1e-8)


def test_same_bits_in_every_run(backend):
    batch = make_batch(5, 700, dtype=torch.float32)
    paec = anchored(backend=backend)
    first, second = paec(batch.stats, batch.valid), paec(batch.stats, batch.valid)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(gradient(first.loss, batch.logits), gradient(second.loss, batch.logits))


def test_score_and_mask_are_constants_of_the_gradient():
    # d loss / d H_t = g m_t / sum(m), and nothing flows through the nucleus entropy.
    batch = make_batch(3, 40)
    stats = batch.stats
    nucleus_entropy = stats.nucleus_entropy.detach().requires_grad_()
    entropy = stats.entropy.detach().requires_grad_()
    out = anchored()(stats._replace(entropy=entropy, nucleus_entropy=nucleus_entropy), batch.valid)
    assert not out.mask.requires_grad
    assert not any(value.requires_grad for value in out.metrics.values())
    grad, nucleus_grad = torch.autograd.grad(out.loss, [entropy, nucleus_entropy], allow_unused=True)
    assert nucleus_grad is None
    shortfall = out.metrics["floor"] - out.metrics["mean_entropy"]
    slope = -CONFIG.beta - 2 * CONFIG.lam * shortfall
    torch.testing.assert_close(grad, slope * out.mask / out.mask.sum(), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: 1 / 0
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 7)])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_no_valid_token_is_exactly_nothing(shape, backend, penalty):
    batch = make_batch(*shape, dtype=torch.float32, p_valid=0)
    out = anchored(dataclasses.replace(CONFIG, penalty=penalty), backend=backend)(batch.stats, batch.valid)
    assert out.loss == 0
    assert out.mask.shape == shape
    assert torch.equal(gradient(out.loss, batch.logits), torch.zeros_like(batch.logits))
    assert out.metrics["mean_entropy"] == out.metrics["penalty"] == out.metrics["pull"] == out.metrics["mask_sum"] == 0
    undefined = ("threshold", "mean_mask", "mask_on_certain", "floor_ratio", "bonus_per_token", "penalty_per_token")
    assert all(out.metrics[name].isnan() for name in undefined)
    assert out.metrics["penalty_active"] == 0


# Diagnostics


def test_diagnostics_by_hand():
    # A mask of 1/2 on each of 8 valid tokens, 6 of which are certain, and two that are not valid.
    entropy = torch.tensor([0.0, 0.01, 0.019, 0.01, 0.01, 0.01, 0.021, 0.5, 0.01, math.nan], dtype=torch.float64)
    valid = torch.arange(10) < 8
    zero = torch.zeros_like(entropy)
    stats = TokenStats(None, entropy, zero, zero, zero, zero.int())
    config = PAECConfig(tau_m=1e30, beta=0.01, lam=0.5, rho_min=0.5)
    h = entropy[:8].mean().item()
    for penalty in SQUARES:
        metrics = anchored(dataclasses.replace(config, penalty=penalty), 2.0)(stats, valid).metrics
        assert {name: metrics[name].item() for name in list(metrics)[7:]} == pytest.approx(
            {
                "mean_mask": 0.5,
                "mask_on_certain": 0.75,
                "floor_ratio": h,
                "penalty_active": 1.0,
                "bonus_per_token": 0.01 * 2,
                "penalty_per_token": 2 * 0.5 * (1.0 - h) * 2,  # the floor is 1
            }
        )
    above = anchored(config, h)(stats, valid).metrics
    assert (above["floor_ratio"].item(), above["penalty_active"]) == (pytest.approx(2.0), 0)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_weights_per_token_are_those_of_the_gradient(penalty):
    # The policy gradient of one token has the weight 1 / N, and the entropy of one -dL/dH.
    batch = make_batch(4, 60)
    entropy = batch.stats.entropy.detach().requires_grad_()
    out = anchored(dataclasses.replace(CONFIG, penalty=penalty))(batch.stats._replace(entropy=entropy), batch.valid)
    per_token = (out.metrics["bonus_per_token"] + out.metrics["penalty_per_token"]) * out.mask
    torch.testing.assert_close(-gradient(out.loss, entropy) * batch.valid.sum(), per_token, rtol=1e-12, atol=0)


def test_the_floor_has_no_ratio_before_it_is_set():
    batch = make_batch(4, 60)
    metrics = PAEC(CONFIG)(batch.stats, batch.valid).metrics
    assert metrics["floor_ratio"].isnan()
    assert metrics["penalty_active"] == 0


def test_a_mask_that_passes_every_token_is_warned_of_once():
    paec = PAEC(PAECConfig(tau_m=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for threshold in (math.nan, 0.9, 0.31):
            paec.warn_unless_selective(threshold)
    with pytest.warns(UserWarning, match="not selective: .* q = 0.299 with tau_m = 0.1. Set a smaller tau_m") as found:
        paec.warn_unless_selective(0.299)
    assert [warning.filename for warning in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paec.warn_unless_selective(0.1)


# Micro-batches


RAGGED = [(3, 17), (1, 5), (2, 0), (4, 40)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_micro_batches_add_up_to_the_whole_batch(config):
    micro_batches = [make_batch(*shape, seed=i) for i, shape in enumerate(RAGGED)]
    micro_batches.append(make_batch(2, 9, seed=9, p_valid=0))
    whole = flattened(micro_batches)
    loss, _, metrics = reference_loss(whole, config)
    plan, total, grads = in_micro_batches(anchored(config), micro_batches)
    for name, value in metrics.items():
        torch.testing.assert_close(getattr(plan, name), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(total, loss.detach(), rtol=1e-12, atol=0)
    grad = torch.cat([g.reshape(-1, VOCAB) for g in grads])
    torch.testing.assert_close(grad, gradient(loss, whole.logits), rtol=1e-9, atol=1e-15)
    assert (grads[-1] == 0).all()


def test_that_check_rejects_a_threshold_per_micro_batch():
    micro_batches = [make_batch(*shape, seed=i) for i, shape in enumerate(RAGGED)]
    whole = flattened(micro_batches)
    true_grad = gradient(reference_loss(whole, CONFIG)[0], whole.logits)
    grads = []
    for batch in micro_batches:
        share = batch.valid.sum() / whole.valid.sum()
        grads.append(gradient(share * anchored()(batch.stats, batch.valid).loss, batch.logits))
    grad = torch.cat([g.reshape(-1, VOCAB) for g in grads])
    assert (grad - true_grad).norm() > 0.05 * true_grad.norm()


def test_one_micro_batch_is_forward(backend):
    batch = make_batch(3, 50, dtype=torch.float32)
    out = anchored(backend=backend)(batch.stats, batch.valid)
    plan, total, _ = in_micro_batches(anchored(backend=backend), [batch])
    assert torch.equal(total, out.loss.detach())
    assert all(torch.equal(value, out.metrics[name]) for name, value in plan._asdict().items())


# Anchor


def test_the_anchor_is_the_mean_of_the_first_steps():
    config = dataclasses.replace(CONFIG, anchor_steps=3, rho_min=1.5)
    paec = PAEC(config)
    means = []
    for step in range(5):
        batch = make_batch(2, 30, seed=step)
        out = paec(batch.stats, batch.valid)
        means.append(out.metrics["mean_entropy"])
        if step < 3:
            assert out.metrics["anchor"].isnan()
            assert out.metrics["floor"] == out.metrics["penalty"] == 0
            torch.testing.assert_close(out.loss.detach(), -config.beta * means[-1])
        else:
            anchor = torch.stack(means[:3]).mean()
            torch.testing.assert_close(out.metrics["anchor"], anchor, rtol=1e-6, atol=0)
            torch.testing.assert_close(out.metrics["floor"], 1.5 * anchor, rtol=1e-6, atol=0)
            expected, _, _ = reference_loss(batch, config, anchor=float(out.metrics["anchor"]))
            torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
        paec.step()


def test_a_step_of_micro_batches_counts_once():
    micro_batches = [make_batch(2, 10, seed=i) for i in range(3)]
    paec = PAEC(CONFIG)
    plan, _, _ = in_micro_batches(paec, micro_batches)
    paec.step()
    assert paec.anchor_count == 1
    assert paec.anchor_sum == plan.mean_entropy.float()


def test_only_the_last_forward_of_a_step_is_committed():
    paec = PAEC(CONFIG)
    for seed in range(2):
        batch = make_batch(2, 10, seed=seed)
        out = paec(batch.stats, batch.valid)
    paec.step()
    assert paec.anchor_sum == out.metrics["mean_entropy"].float()


@pytest.mark.parametrize("make", [PAEC, PAECLoss])
def test_the_anchor_of_rollout_batches_is_the_mean_of_all_their_steps(make):
    config = dataclasses.replace(CONFIG, anchor_steps=2, anchor_unit="rollout_batch")
    made = make(config, steps_per_batch=3)
    paec = getattr(made, "paec", made)
    means = []
    for step in range(7):
        batch = make_batch(2, 30, seed=step)
        out = paec(batch.stats, batch.valid)
        assert out.metrics["anchor"].isnan() == (step < 6)
        means.append(out.metrics["mean_entropy"])
        paec.step()
    torch.testing.assert_close(out.metrics["anchor"], torch.stack(means[:6]).mean(), rtol=1e-6, atol=0)
    state = paec.state_dict()
    PAEC(config, steps_per_batch=3).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"another PAECConfig \(anchor_steps: checkpoint 6, here 4\)"):
        PAEC(config, steps_per_batch=2).load_state_dict(state)


def test_steps_per_batch_matter_to_no_other_anchor():
    state = PAEC(CONFIG, steps_per_batch=3).state_dict()
    PAEC(CONFIG).load_state_dict(state)
    assert PAEC(CONFIG, steps_per_batch=3).anchor_steps == CONFIG.anchor_steps


# Checkpoints


def test_a_checkpoint_without_later_fields_was_made_with_their_defaults():
    state = anchored().state_dict()
    later = ("penalty", "anchor_unit", "anchored")
    old = {name: x for name, x in state["_extra_state"]["config"].items() if name not in later}
    assert len(old) == 12
    state["_extra_state"] = {"config": old}
    restored = PAEC(CONFIG)
    restored.load_state_dict(state)
    assert restored.anchor == ANCHOR
    for here, value in zip(later, ("relative", "rollout_batch", "scores"), strict=True):
        other = PAEC(dataclasses.replace(CONFIG, **{here: value}), steps_per_batch=1)
        with pytest.raises(RuntimeError, match=f"another PAECConfig .{here}: checkpoint '.*', here '{value}'"):
            other.load_state_dict(state)
        assert other.anchor_count == 0


# Misuse


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (None, ValueError, "steps_per_batch is None, but anchor_unit='rollout_batch' needs an int >= 1"),
        (0, ValueError, "steps_per_batch must be >= 1, got 0"),
        (2.0, TypeError, "steps_per_batch must be an int, got 2.0"),
    ],
)
def test_steps_per_batch_are_needed_for_an_anchor_of_batches(steps, error, message):
    with pytest.raises(error, match=message):
        PAEC(dataclasses.replace(CONFIG, anchor_unit="rollout_batch"), steps_per_batch=steps)


def test_forward_among_observed_micro_batches():
    batch = make_batch(2, 10)
    paec = PAEC(CONFIG)
    paec.observe(batch.stats, batch.valid)
    with pytest.raises(RuntimeError, match="1 observed micro-batches await"):
        paec(batch.stats, batch.valid)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, v: (tuple(s), v), TypeError, "stats must be a TokenStats, got tuple"),
        (lambda s, v: (s._replace(entropy=s.entropy.half()), v), TypeError, "float32 or float64, got .*16"),
        (
            lambda s, v: (s._replace(nucleus_entropy=s.nucleus_entropy.half()), v),
            TypeError,
            "float32 or float64, got .*16",
        ),
        (lambda s, v: (s._replace(margin=None), v), TypeError, "stats.margin must be a tensor, got None"),
        (
            lambda s, v: (s._replace(margin=s.margin[:1]), v),
            ValueError,
            r"stats.margin must .* \(2, 10\), got \(1, 10\)",
        ),
        (
            lambda s, v: (s._replace(nucleus_size=s.nucleus_size.to("meta")), v),
            ValueError,
            "stats.nucleus_size must .*meta",
        ),
        (lambda s, v: (s, v.int()), TypeError, "valid must be a bool tensor, got torch.int32"),
        (lambda s, v: (s, None), TypeError, "valid must be a tensor, got None"),
        (lambda s, v: (s, v[:, :-1]), ValueError, r"valid must .* \(2, 10\), got \(2, 9\)"),
        (lambda s, v: (s, v.to("meta")), ValueError, "valid must be on the device of stats.entropy, .*, got meta"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change, error, message):
    batch = make_batch(2, 10)
    paec = PAEC(CONFIG)
    stats, valid = change(batch.stats, batch.valid)
    for call in (paec, paec.observe, lambda s, v: paec.term(s, v, anchored().plan())):
        with pytest.raises(error, match=message):
            call(stats, valid)
    assert not paec._observed
    with pytest.raises(RuntimeError):
        paec.step()


def test_the_backend_is_one_of_four():
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'x'"):
        PAEC(CONFIG, backend="x")


# Compilation and the device


def test_compiles_into_one_graph_for_all_shapes(backend):
    torch._dynamo.reset()
    eager, paec = anchored(backend=backend), anchored(backend=backend)
    compiled = torch.compile(paec, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, shape in enumerate([(3, 20), (2, 35), (5, 400)]):
        # Shapes seen once are compiled for; the others must not be.
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            batch = make_batch(*shape, dtype=torch.float32, seed=step)
            expected = eager(batch.stats, batch.valid)
            out = compiled(batch.stats, batch.valid)
            paec.step()
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
        expected_grad = gradient(expected.loss, batch.logits)
        torch.testing.assert_close(gradient(out.loss, batch.logits), expected_grad, rtol=1e-6, atol=1e-9)


class NoHostSync(TorchDispatchMode):
    """Refuses what would read a GPU's values on the host, or make a shape from them."""

    SYNCS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        waits = masked or func.overloadpacket in self.SYNCS
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(backend):
    batch = make_batch(3, 20, dtype=torch.float32)
    stats, paec = batch.stats, anchored(backend=backend)
    with NoHostSync():
        out = paec(stats, batch.valid)
        paec.step()
        paec.observe(stats, batch.valid)
        loss = out.loss + paec.term(stats, batch.valid, paec.plan())
        gradient(loss, stats.entropy)
        paec.step()
        with pytest.raises(AssertionError, match="waits for the device"):
            float(loss.detach())


def test_the_state_follows_the_statistics():
    x = torch.rand(4, device="meta")
    paec = PAEC(CONFIG, backend="torch")
    paec(TokenStats(None, x, x, x, x, x.int()), x < 0.5)
    assert paec.anchor_sum.device.type == "meta"
