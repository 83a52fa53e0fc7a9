import dataclasses

import pytest
import torch
from losses.batches import CONFIG, VOCAB, make_batch

from paec_kernels import reference
from paec_kernels.losses.drop_in import PAECLoss
from paec_kernels.losses.paec_config import PENALTIES

OPTIONS = {"temperature": 0.7, "softcap": 20.0, "vocab_size": VOCAB - 3}


def make_arguments(*shape: int, dtype: torch.dtype = torch.float32, p_valid: float = 0.7):
    batch = make_batch(*shape, dtype=dtype, p_valid=p_valid)
    token_ids = torch.randint(VOCAB - 3, shape)
    stats = reference.token_stats(batch.logits.detach(), token_ids, **OPTIONS)
    old_logp = stats.logp + 0.2 * torch.randn(shape)
    return batch.logits, token_ids, torch.randn(shape[0], 1), batch.valid, old_logp


def by_definition(logits, token_ids, advantages, valid, old_logp, ref_logp=None, kl_coef=0.0):
    stats = reference.token_stats(logits, token_ids, valid=valid, **OPTIONS)
    options = {"clip_low": 0.1, "clip_high": 0.3, "ref_logp": ref_logp, "kl_coef": kl_coef}
    policy = reference.grpo_loss(stats.logp, old_logp, advantages, valid, **options)
    return policy, *reference.paec_loss(stats, valid, CONFIG)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_equals_the_definitions(kl_coef, inplace):
    arguments = make_arguments(4, 50)
    ref_logp = arguments[-1] + 0.1 if kl_coef else None
    policy, paec, mask, expected_metrics = by_definition(*arguments, ref_logp=ref_logp, kl_coef=kl_coef)
    (expected_grad,) = torch.autograd.grad(policy + paec, arguments[0])
    options = {"clip_low": 0.1, "clip_high": 0.3, "kl_coef": kl_coef, "inplace_backward": inplace}
    logits = arguments[0].detach().requires_grad_() * 1
    out = PAECLoss(CONFIG, **options, **OPTIONS)(logits, *arguments[1:], ref_logp)
    torch.testing.assert_close(out.loss, policy + paec, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.mask, mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.metrics["policy_loss"], policy.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.metrics["paec_loss"], paec.detach(), rtol=1e-5, atol=1e-6)
    for name, value in expected_metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-5, atol=1e-6)
    assert {"clip_fraction", "approx_kl", "floor", "anchor"} <= out.metrics.keys()
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert (grad.data_ptr() == logits.data_ptr()) == inplace
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("anchored", ["scores", "positions"])
def test_an_anchor_policy(anchored):
    logits, token_ids, *others, old_logp = make_arguments(4, 50)
    valid, config = others[-1], dataclasses.replace(CONFIG, anchored=anchored, beta=0.1)
    options = {"top_p": config.top_p, "valid": valid}
    anchor_stats = reference.token_stats(2 * logits.detach().flip(0), token_ids, **options)
    out = PAECLoss(config)(logits, token_ids, *others, old_logp, anchor_stats=anchor_stats)
    stats = reference.token_stats(logits.detach(), token_ids, **options)
    expected, mask, _ = reference.paec_loss(stats, valid, config, anchor_stats=anchor_stats)
    torch.testing.assert_close(out.metrics["paec_loss"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.mask, mask, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="anchor_stats is None"):
        PAECLoss(config)(logits, token_ids, *others, old_logp)


def test_the_configs_top_p_is_used():
    arguments = make_arguments(4, 50)
    losses = [PAECLoss(dataclasses.replace(CONFIG, top_p=p))(*arguments) for p in (0.5, 0.95)]
    assert losses[0].metrics["threshold"] != losses[1].metrics["threshold"]


def test_the_anchor_is_set_by_steps_and_travels_in_the_state_dict():
    loss_fn = PAECLoss(CONFIG)
    means = []
    for _ in range(CONFIG.anchor_steps):
        means.append(loss_fn(*make_arguments(2, 20)).metrics["mean_entropy"])
        loss_fn.step()
    restored = PAECLoss(CONFIG)
    restored.load_state_dict(loss_fn.state_dict())
    anchor = restored(*make_arguments(2, 20)).metrics["anchor"]
    torch.testing.assert_close(anchor, torch.stack(means).mean())
    other = PAECLoss(dataclasses.replace(CONFIG, beta=0.5))
    with pytest.raises(RuntimeError, match=r"beta: checkpoint 0.03, here 0.5"):
        other.load_state_dict(loss_fn.state_dict())
    assert other.paec.anchor_count == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits(dtype):
    arguments = make_arguments(2, 20, dtype=dtype)
    out = PAECLoss(CONFIG)(*arguments)
    assert out.loss.dtype == torch.float32
    assert torch.autograd.grad(out.loss, arguments[0])[0].dtype == dtype


def test_bad_input_changes_nothing():
    logits, token_ids, advantages, valid, old_logp = make_arguments(2, 20)
    loss_fn = PAECLoss(CONFIG)
    for arguments, name in (
        ((logits, token_ids[:1], advantages, valid, old_logp), "token_ids"),
        ((logits, token_ids, advantages[:, 0], valid, old_logp), "advantages"),
        ((logits, token_ids, advantages, valid[:, 1:], old_logp), "valid"),
        ((logits, token_ids, advantages, valid, old_logp[0]), "old_logp"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must"):
            loss_fn(*arguments)
    with pytest.raises(RuntimeError):
        loss_fn.step()


@pytest.mark.parametrize("name", ["token_ids", "valid"])
def test_what_token_stats_may_lack_must_be_here(name):
    names = ("logits", "token_ids", "advantages", "valid", "old_logp")
    arguments = dict(zip(names, make_arguments(2, 20), strict=True)) | {name: None}
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
        PAECLoss(CONFIG)(**arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip_high": -1}, ValueError, "clip_high must be >= 0, got -1"),
        ({"clip_low": -1}, ValueError, r"clip_low must be in \[0, 1\], got -1"),
        ({"kl_coef": -1.0}, ValueError, "kl_coef must be >= 0, got -1.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be > 0 and finite, got -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap must be > 0 and finite, got 0.0"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be >= 1, got 0"),
        ({"inplace_backward": "yes"}, TypeError, "inplace_backward must be a bool, got 'yes'"),
        ({"backend": "x"}, ValueError, "backend must be one of .*, got 'x'"),
    ],
)
def test_a_wrong_option_is_named_when_it_is_made(options, error, message):
    with pytest.raises(error, match=message):
        PAECLoss(CONFIG, **options)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_compiles_into_one_graph_for_all_shapes(penalty):
    torch._dynamo.reset()
    config = dataclasses.replace(CONFIG, penalty=penalty)
    compiled = torch.compile(PAECLoss(config), fullgraph=True, dynamic=True, backend="aot_eager")
    for step, shape in enumerate([(3, 20), (2, 35)]):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            arguments = make_arguments(*shape)
            out = compiled(*arguments)
            expected = PAECLoss(config)(*arguments)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(o.loss, arguments[0])[0] for o in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)
