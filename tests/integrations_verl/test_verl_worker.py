"""PAECTrainingWorker in one process: verl's engine, losses, mini-batches and checkpoints, on a tiny model."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: its transformers is an older one, see make test-verl")
import hydra
import verl
from helpers import DAMAGES, free_port, relative_error
from integrations_verl import tiny_verl
from integrations_verl.tiny_verl import PAEC, batch, sequences, take, worker
from verl.trainer.distillation import distillation_ppo_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.workers.config import PolicyLossConfig
from verl.workers.config.engine import AutomodelEngineConfig, McoreEngineConfig
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from paec_kernels import PAECConfig, reference
from paec_kernels.integrations.verl import LOGITS_TO_THE_LOSS, PAECPolicyLossConfig
from paec_kernels.losses.paec import Plan
from paec_kernels.saved_state import UnreadableFileError

OFF = PAECPolicyLossConfig(paec={"beta": 0.0, "lam": 0.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    tiny_verl.save_model(folder)
    tiny_verl.start_process_group(0, 1, free_port())
    yield folder
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("temperature", [0.8, 1.0])  # verl divides the logits, or leaves them as the model made them
@pytest.mark.parametrize("packed", [True, False])
def test_the_engine_hands_over_its_logits(folder: Path, packed: bool, temperature: float) -> None:
    one = worker(folder, PAECPolicyLossConfig(paec=PAEC | {"top_p": 0.8}))
    flags = LOGITS_TO_THE_LOSS | {"use_remove_padding": packed, "temperature": temperature}
    data = batch(sequences(5, seed=1), **flags)
    ids = data["input_ids"]
    lengths = ids.offsets().diff().tolist()
    shape = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    leaf = (3 * torch.randn(*shape, tiny_verl.VOCABULARY)).requires_grad_()
    _, output_args = one.engine.prepare_model_inputs(data)
    output = one.engine.prepare_model_outputs(SimpleNamespace(logits=leaf * 1), output_args, data, one.loss_fn)

    # Row t predicts token t + 1; the last row of a sequence predicts nothing that counts.
    rows = leaf[0].split(lengths) if packed else [row[:length] for row, length in zip(leaf, lengths, strict=True)]
    counted = torch.cat([torch.arange(length) < length - 1 for length in lengths])
    token_ids = torch.cat([one_ids.roll(-1) for one_ids in ids.unbind()])
    true = reference.token_stats(torch.cat(rows).double(), token_ids, top_p=0.8, temperature=temperature)
    weights = [torch.randn(sum(lengths)) * counted for _ in range(3)]
    ours, theirs = [], []
    for name, value in true._asdict().items():
        arrived = output[f"paec_{name}"].values()
        torch.testing.assert_close(arrived[counted].double(), value[counted].double(), rtol=1e-5, atol=1e-5)
        if name in ("logp", "entropy", "nucleus_entropy"):
            ours.append((arrived * weights[len(ours)]).sum())
            theirs.append((value * weights[len(theirs)]).sum())
    assert torch.equal(output["log_probs"].values(), output["paec_logp"].values())
    assert torch.equal(output["entropy"].values(), output["paec_entropy"].values())
    (expected,) = torch.autograd.grad(sum(theirs), leaf)
    (gradient,) = torch.autograd.grad(sum(ours), leaf)
    assert gradient.abs().max() > 0.1
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-5, atol=1e-5)


def test_without_coefficients_it_is_verl(folder: Path) -> None:
    actor = {"entropy_coeff": 0.01}
    ours = worker(folder, OFF, actor=actor)
    stock = worker(folder, PolicyLossConfig(), TrainingWorker, actor=actor)
    for seed in range(3):
        rows = sequences(6, seed)
        data = [batch(rows, calculate_entropy=True, global_token_num=None) for _ in range(2)]
        one, other = take(ours, data[0]), take(stock, data[1])
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-5)
        assert relative_error(one.gradients, other.gradients) < 1e-5
    ends = [{name: tiny_verl.whole(p) for name, p in w.engine.module.named_parameters()} for w in (ours, stock)]
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def test_the_policy_loss_is_kept_and_the_term_added(folder: Path) -> None:
    with_term, without = worker(folder), worker(folder, OFF)
    data = [batch(sequences(6, seed=2), global_token_num=None) for _ in range(2)]
    one, other = take(with_term, data[0]).metrics, take(without, data[1]).metrics
    assert one["paec/loss"] < -0.01
    assert one["loss"] == pytest.approx(other["loss"] + one["paec/loss"], rel=1e-5)


def test_the_plan_does_not_depend_on_the_split(folder: Path) -> None:
    def metrics_of(options: dict, flags: dict) -> list[float]:
        one = worker(folder, **options)
        steps = [take(one, batch(sequences(6, seed=3), global_token_num=None, **flags)).metrics for _ in range(2)]
        return [step[name] for step in steps for name in ("loss", "grad_norm", "paec/threshold", "paec/mask_sum")]

    by_rows = metrics_of({}, {})
    assert by_rows == pytest.approx(metrics_of({"micro_batch_size_per_gpu": 6}, {}), rel=1e-4)
    assert by_rows == pytest.approx(metrics_of({"use_dynamic_bsz": True, "max_token_len_per_gpu": 20}, {}), rel=1e-4)
    assert by_rows == pytest.approx(metrics_of({}, {"use_remove_padding": True}), rel=1e-4)


def test_a_pass_that_failed_leaves_nothing_to_the_next_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, fresh = worker(folder), worker(folder)
    observe, observed = one.paec.observe, []

    def fail_at_the_second(stats, valid):
        if observed:
            raise RuntimeError("the second micro-batch")
        observed.append(observe(stats, valid))

    with monkeypatch.context() as patch:
        patch.setattr(one.paec, "observe", fail_at_the_second)
        with pytest.raises(RuntimeError, match="the second micro-batch"):
            take(one, batch(sequences(6, seed=11), global_token_num=None))
    steps = [take(each, batch(sequences(6, seed=12), global_token_num=None)).metrics for each in (one, fresh)]
    for name in ("loss", "paec/threshold", "paec/mask_sum"):
        assert steps[0][name] == steps[1][name], name


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}},
        {"model": {"lora_rank": 4}},
        {"model": {"enable_gradient_checkpointing": False}},
        {"param_offload": True, "optimizer_offload": True},
    ],
    ids=["bf16", "lora", "no checkpointing", "offload"],
)
def test_in_verls_other_ways_to_train_the_term_is_there(folder: Path, options: dict) -> None:
    rows = sequences(6, seed=9, advantage=0.0)
    plain = take(worker(folder), batch(rows, global_token_num=None)).metrics
    metrics = take(worker(folder, **options), batch(rows, global_token_num=None)).metrics
    assert metrics["loss"] == pytest.approx(metrics["paec/loss"], rel=1e-2)
    assert metrics["paec/loss"] == pytest.approx(plain["paec/loss"], rel=2e-2)
    assert metrics["grad_norm"] > 1e-3


def test_mini_batches_are_steps_of_their_own(folder: Path) -> None:
    one = worker(folder)
    data = batch(sequences(8, seed=4), mini_batch_size=4, epochs=2, dataloader_kwargs={"shuffle": False})
    hooks = len(one.engine.optimizer._optimizer_step_post_hooks)
    metrics = tu.get(one.train_mini_batch(data), "metrics")
    assert len(one.engine.optimizer._optimizer_step_post_hooks) == hooks
    assert one.paec.anchor_count == 1
    assert len(metrics["paec/threshold"]) == 4
    assert len(set(metrics["paec/threshold"])) == 4
    logged = reduce_metrics(rename_dict(metrics, "actor/"))  # as the trainer does
    assert logged["actor/paec/mean_entropy"] == pytest.approx(sum(metrics["paec/mean_entropy"]) / 4)


def test_a_checkpoint_holds_the_anchor(folder: Path, tmp_path: Path) -> None:
    one = worker(folder)
    take(one, batch(sequences(6, seed=5), global_token_num=None))
    one.save_checkpoint(str(tmp_path / "actor"), global_step=1)
    assert [path.name for path in (tmp_path / "actor").glob("paec*")] == ["paec.pt"]
    other = worker(folder)
    other.load_checkpoint(str(tmp_path / "actor"))
    assert other.paec.anchor_count == 1
    one_step, other_step = (take(w, batch(sequences(6, seed=6), global_token_num=None)).metrics for w in (one, other))
    assert one_step["paec/penalty"] > 0
    for name in ("loss", "paec/anchor", "paec/loss", "grad_norm"):
        assert one_step[name] == other_step[name], name


def test_a_checkpoint_without_paec_is_refused(folder: Path, tmp_path: Path) -> None:
    worker(folder, PolicyLossConfig()).save_checkpoint(str(tmp_path / "actor"), global_step=1)
    with pytest.raises(FileNotFoundError, match=r"actor/paec.pt is missing.* another checkpoint of a run with PAEC"):
        worker(folder).load_checkpoint(str(tmp_path / "actor"))


def test_a_damaged_state_is_refused_before_anything_changes(folder: Path, tmp_path: Path) -> None:
    one = worker(folder)
    take(one, batch(sequences(6, seed=5), global_token_num=None))
    one.save_checkpoint(str(tmp_path / "actor"), global_step=1)
    other = worker(folder)
    before = {name: tiny_verl.whole(value) for name, value in other.engine.module.state_dict().items()}
    for damage in DAMAGES.values():
        damage(tmp_path / "actor" / "paec.pt")
        with pytest.raises(UnreadableFileError, match=r"actor/paec.pt must be PAEC's state.* Resume from another"):
            other.load_checkpoint(str(tmp_path / "actor"))
        one.save_checkpoint(str(tmp_path / "actor"), global_step=1)
    with pytest.raises(RuntimeError, match=r"actor/paec.pt does not fit: .*beta: checkpoint 0.1, here 0.0"):
        worker(folder, OFF).load_checkpoint(str(tmp_path / "actor"))
    assert other.paec.anchor_count == 0
    for name, value in other.engine.module.state_dict().items():
        assert torch.equal(tiny_verl.whole(value), before[name])
    other.load_checkpoint(str(tmp_path / "actor"))
    assert other.paec.anchor_count == 1


@pytest.mark.parametrize(
    ("scaled", "optimizer"),
    [(False, {}), (True, {}), (True, {"override_optimizer_config": {"fused": True}})],
    ids=["verl's own check", "fp16's scaler", "fused optimiser"],
)
def test_a_skipped_step_leaves_the_anchor_as_it_was(folder: Path, scaled: bool, optimizer: dict) -> None:
    one = worker(folder, PAECPolicyLossConfig(paec=PAEC | {"anchor_steps": 3}), optimizer=optimizer)
    if scaled:
        one.engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    clip = one.engine.optimizer_step

    def overflow() -> float:
        gradient = next(one.engine.module.parameters()).grad
        gradient.to_local()[0] = torch.inf
        return clip()

    states, metrics = [], []
    for seed in range(5):
        one.engine.optimizer_step = overflow if seed == 1 else clip
        metrics.append(take(one, batch(sequences(6, seed), global_token_num=None)).metrics)
        weights = {name: tiny_verl.whole(value) for name, value in one.engine.module.state_dict().items()}
        states.append(weights | {name: value.clone() for name, value in one.paec.named_buffers() if "anchor" in name})
    assert all(torch.equal(value, states[0][name]) for name, value in states[1].items())
    assert not torch.equal(states[2]["lm_head.weight"], states[1]["lm_head.weight"])
    assert [state["anchor_count"].item() for state in states] == [1, 1, 2, 3, 3]
    assert [step["paec/step_skipped"] for step in metrics] == [0.0, 1.0, 0.0, 0.0, 0.0]
    anchor = sum(metrics[seed]["paec/mean_entropy"] for seed in (0, 2, 3)) / 3
    assert metrics[4]["paec/anchor"] == pytest.approx(anchor, rel=1e-6)


def test_the_anchor_of_rollout_batches_takes_all_their_steps(folder: Path) -> None:
    options = PAEC | {"anchor_unit": "rollout_batch", "penalty": "relative"}
    one = worker(folder, PAECPolicyLossConfig(paec=options, steps_per_batch=2))
    metrics = [take(one, batch(sequences(6, seed), global_token_num=None)).metrics for seed in range(3)]
    anchor = sum(step["paec/mean_entropy"] for step in metrics[:2]) / 2
    assert [step.get("paec/anchor") for step in metrics] == [None, None, pytest.approx(anchor, rel=1e-6)]
    ratio = metrics[2]["paec/mean_entropy"] / (1.2 * anchor)
    assert metrics[2]["paec/floor_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert metrics[2]["paec/penalty"] == pytest.approx(max(0.0, 1 - ratio) ** 2, rel=1e-4)


def test_an_anchor_of_rollout_batches_needs_their_steps(folder: Path) -> None:
    with pytest.raises(ValueError, match="steps_per_batch is None, but anchor_unit='rollout_batch'"):
        worker(folder, PAECPolicyLossConfig(paec=PAEC | {"anchor_unit": "rollout_batch"}))


def test_the_mask_is_in_the_log_and_warned_of_where_it_is_not_selective(folder: Path) -> None:
    one = worker(folder, PAECPolicyLossConfig(paec=PAEC | {"tau_m": 0.5}))
    with pytest.warns(UserWarning, match="PAEC's mask is not selective") as found:
        metrics = [take(one, batch(sequences(6, seed), global_token_num=None)).metrics for seed in range(2)]
    assert sum("not selective" in str(warning.message) for warning in found) == 1
    assert metrics[1].keys() >= {f"paec/{name}" for name in Plan._fields}


def test_unless_asked_for_it_is_verls_worker(folder: Path, tmp_path: Path) -> None:
    one = worker(folder, PolicyLossConfig())
    assert one.paec is None
    metrics = take(one, batch(sequences(4, seed=7), global_token_num=None)).metrics
    assert not [name for name in metrics if "paec" in name]
    one.save_checkpoint(str(tmp_path / "actor"), global_step=1)
    assert not list((tmp_path / "actor").glob("paec*"))


def test_verls_actor_runs_from_verls_own_configuration(folder: Path) -> None:
    overrides = [
        "actor_rollout_ref.actor.policy_loss._target_=paec_kernels.integrations.verl.PAECPolicyLossConfig",
        "+actor_rollout_ref.actor.policy_loss.paec.beta=0.02",
        "+actor_rollout_ref.actor.policy_loss.paec.anchor_unit=rollout_batch",
        "+actor_rollout_ref.actor.policy_loss.steps_per_batch=2",
        # and what any run on this model, and on a CPU, needs
        f"actor_rollout_ref.model.path={folder}",
        "+actor_rollout_ref.model.load_tokenizer=false",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.actor.optim.total_training_steps=10",
        "actor_rollout_ref.rollout.name=hf",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
    ]
    configurations = Path(verl.__file__).parent / "trainer" / "config"
    with hydra.initialize_config_dir(str(configurations), version_base=None):
        config = hydra.compose("ppo_trainer", overrides)
    actor = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor")
    actor.init_model()
    assert actor.actor.paec.config == PAECConfig(beta=0.02, anchor_unit="rollout_batch")
    assert actor.actor.paec.anchor_steps == 2 * PAECConfig().anchor_steps
    data = batch(sequences(8, seed=10), mini_batch_size=4, epochs=1, dataloader_kwargs={"shuffle": False})
    metrics = tu.get(actor.update_actor(data), "metrics")
    assert len(metrics["paec/threshold"]) == len(metrics["actor/pg_loss"]) == 2


def test_another_loss_later_keeps_paec(folder: Path) -> None:
    one = worker(folder)
    one.set_loss_fn(lambda model_output, data, dp_group: (0 * model_output["log_probs"].values().sum(), {}))
    metrics = take(one, batch(sequences(4, seed=8), global_token_num=None)).metrics
    assert metrics["loss"] == pytest.approx(metrics["paec/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": {"use_fused_kernels": True}}, "use_fused_kernels=False"),
        ({"pad_to_length": True}, "pad_to_length=False"),
        ({"override": {"attention_dropout": 0.1}}, "attention_dropout=0.1"),
    ],
)
def test_what_cannot_work_is_refused(folder: Path, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        worker(folder, **options)


@pytest.mark.parametrize("kind", [McoreEngineConfig, AutomodelEngineConfig])
def test_an_engine_without_logits_is_refused(folder: Path, kind: type) -> None:
    one = worker(folder, PolicyLossConfig())
    one.engine_config = kind()  # its own engine needs packages, or a GPU
    with pytest.raises(ValueError, match=f"actor.strategy fsdp or fsdp2, got '{one.engine_config.strategy}'"):
        one.set_loss_fn(worker(folder, OFF).loss_fn.loss_fn)


def test_distillation_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="distillation"):
        worker(folder, loss_fn=partial(distillation_ppo_loss, distillation_config=object()))


def test_values_of_the_configuration_are_checked() -> None:
    with pytest.raises(ValueError, match="rho"):
        PAECPolicyLossConfig(paec=PAEC | {"rho": 2.0})
    with pytest.raises(TypeError, match="tau"):
        PAECPolicyLossConfig(paec={"tau": 1.0})
    with pytest.raises(ValueError, match=r"paec.anchored must be 'mean' in verl, .*, got 'scores'"):
        PAECPolicyLossConfig(paec=PAEC | {"anchored": "scores"})
