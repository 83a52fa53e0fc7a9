"""PAECGRPOTrainer in one process: against the stock trainer without PAEC, against the reference with it."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'paec-kernels[trl]'")
from datasets import Dataset
from helpers import DAMAGES, relative_error
from integrations import tiny_trl
from integrations.tiny_trl import PAEC_OFF, PAEC_ON, logged, recorded, trainer, truths
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)
from trl import TrlParser
from trl.trainer import utils

from paec_kernels.integrations import trl as integration
from paec_kernels.integrations.trl import PAECGRPOConfig, PAECGRPOTrainer
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.ops.linear import linear_token_stats
from paec_kernels.saved_state import UnreadableFileError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, of options that TRL sets


def altered(change: Callable[[dict], dict]) -> type[PAECGRPOTrainer]:
    """A trainer whose batches are changed after they are generated."""

    class Altered(PAECGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return change(super()._generate_and_score_completions(inputs))

    return Altered


# -- without PAEC: the stock trainer's run --------------------------------------------------------------------------

SMALL = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, **HEADS, num_local_experts=4, router_aux_loss_coef=0.1))


def gemma() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, **HEADS, head_dim=16, final_logit_softcapping=2.0))


def cohere() -> CohereForCausalLM:
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SMALL, **HEADS, logit_scale=0.25))


def lora(**options):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"]} | options)


def saved_llama(folder: Path) -> LlamaForCausalLM:
    """From a folder, where TRL finds the reference model of ``beta > 0``."""
    tiny_trl.llama().save_pretrained(folder / "model")
    return LlamaForCausalLM.from_pretrained(folder / "model")


CASES = {
    "plain": lambda folder: {},
    "one micro-batch": lambda folder: {"gradient_accumulation_steps": 1},
    "two steps a generation": lambda folder: {"steps_per_generation": 4},
    "num_iterations": lambda folder: {"num_iterations": 2},
    "kl": lambda folder: {"model": saved_llama(folder), "beta": 0.1, "num_iterations": 2},
    "temperature": lambda folder: {"temperature": 0.7},
    "dr_grpo": lambda folder: {"loss_type": "dr_grpo"},
    "entropy bonus": lambda folder: {"entropy_coef": 0.1},
    "gradient checkpointing": lambda folder: {"gradient_checkpointing": True},
    "truncated completions masked": lambda folder: {"mask_truncated_completions": True},
    "peft": lambda folder: {"peft_config": lora()},
    "peft, kl": lambda folder: {"peft_config": lora(), "beta": 0.1, "num_iterations": 2},
    "tied head": lambda folder: {"model": tiny_trl.llama(tie_word_embeddings=True)},
    "soft-capped logits": lambda folder: {"model": gemma()},
    "scaled logits": lambda folder: {"model": cohere()},
    "mixture of experts": lambda folder: {"model": mixtral()},
}


@pytest.mark.parametrize("case", CASES)
def test_without_coefficients_the_run_is_the_stock_trainers(case: str, tmp_path: Path) -> None:
    # SGD, since Adam divides by gradients that are 0 up to rounding.
    options = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    stock = trainer(tmp_path, stock=True, **options, **CASES[case](tmp_path))
    before = {name: value.clone() for name, value in stock.model.named_parameters()}
    stock.train()
    ours = trainer(tmp_path, **options, **PAEC_OFF, **CASES[case](tmp_path))
    ours.train()
    for key in ("loss", "entropy", "kl", "aux_loss"):
        values = logged(stock, key)
        assert len(values) in (0, 3)
        assert logged(ours, key) == pytest.approx(values, rel=1e-5, abs=1e-5)
    assert len(logged(stock, "loss")) == 3
    assert len(logged(stock, "kl")) == 3 * ("kl" in case)
    assert len(logged(stock, "aux_loss")) == 3 * ("experts" in case)
    moved = 0.0
    for (name, value), expected in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        moved = max(moved, (expected - before[name]).abs().max().item())
    assert moved > 1e-3


# -- with PAEC: the reference's loss of the whole optimiser step ----------------------------------------------------

EXACT = {
    "plain": {},
    "one micro-batch": {"gradient_accumulation_steps": 1},
    "old log-probs seen": {"steps_per_generation": 4, "max_steps": 4},
    "num_iterations": {"num_iterations": 2, "max_steps": 4},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "temperature": {"temperature": 0.7},
    "relative": {"paec_penalty": "relative"},
    "proportional": {"paec_penalty": "proportional"},
    "nucleus": {"paec_entropy_support": "nucleus", "paec_top_p": 0.8},
    "log_vocab": {"paec_nucleus_norm": "log_vocab", "paec_vocab_size": 32, "paec_alpha": 0.9},
}


@pytest.mark.parametrize("case", EXACT)
def test_plan_and_gradient_are_those_of_the_whole_step(case: str, tmp_path: Path) -> None:
    options = PAEC_ON | EXACT[case]
    run, steps = recorded(tmp_path, reward=tiny_trl.constant, **options)
    run.train()
    assert len(steps) == run.args.max_steps
    assert not run._scored
    exacts = truths(steps, run.args.paec_config(), temperature=run.args.temperature)
    for name in exacts[0].metrics:
        expected = [value for exact in exacts if not math.isnan(value := exact.metrics[name].item())]
        assert logged(run, f"paec/{name}") == pytest.approx(expected, rel=1e-5), name
    for name in ("paec/loss", "loss"):
        assert logged(run, name) == pytest.approx([exact.loss.item() for exact in exacts], abs=1e-5), name
    anchor = exacts[0].metrics["mean_entropy"].item()
    assert logged(run, "paec/anchor") == pytest.approx([anchor] * (len(steps) - 1), rel=1e-5)
    for step, exact in zip(steps, exacts, strict=True):
        assert len(step.pieces) == run.args.gradient_accumulation_steps
        assert relative_error(step.gradients, exact.gradients) < 1e-5
    assert all(exact.metrics["penalty"] > 0.01 for exact in exacts[1:])
    lengths = {int(n) for step in steps for piece in step.pieces for n in piece.completion_mask.sum(1)}
    assert len(lengths) > 2


ANCHORED = {
    "scores": {"paec_anchored": "scores"},
    "positions": {"paec_anchored": "positions"},
    "one micro-batch": {"paec_anchored": "positions", "gradient_accumulation_steps": 1},
    "old log-probs seen": {"paec_anchored": "positions", "num_iterations": 2, "max_steps": 4},
    "adapters": {"paec_anchored": "positions", "num_iterations": 2, "max_steps": 4},
    "bfloat16": {"paec_anchored": "positions", "bf16": True},
    "compiled": {"paec_anchored": "positions", "torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.parametrize("case", ANCHORED)
def test_the_reference_model_is_the_anchor_policy(case: str, tmp_path: Path) -> None:
    """The weight of the KL term is so small that it leaves the gradient as it is."""
    options, exact_options = PAEC_ON | ANCHORED[case] | {"beta": 1e-9}, {}
    if case == "adapters":
        options["peft_config"] = lora()
        from peft import get_peft_model

        exact_options["model"] = get_peft_model(tiny_trl.llama(), lora())
    else:
        options["model"] = saved_llama(tmp_path)
    run, steps = recorded(tmp_path, reward=tiny_trl.constant, learning_rate=0.1, **options)
    run.train()
    exacts = truths(steps, run.args.paec_config(), bfloat16=case == "bfloat16", **exact_options)
    tolerance = 0.05 if case == "bfloat16" else 1e-4
    for name in ("threshold", "mask_sum", "penalty"):
        expected = [exact.metrics[name].item() for exact in exacts]
        assert logged(run, f"paec/{name}") == pytest.approx(expected, rel=tolerance), name
    for step, exact in zip(steps, exacts, strict=True):
        assert relative_error(step.gradients, exact.gradients) < tolerance
    assert all(exact.metrics["penalty"] > 0.01 for exact in exacts[1:])


def test_without_a_reference_model_there_is_no_anchor_policy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"beta must not be 0 with paec_anchored='positions', .*, got 0.0"):
        tiny_trl.config(tmp_path, paec_anchored="positions")
    with pytest.raises(ValueError, match=r"sync_ref_model must be False with paec_anchored='scores', .*, got True"):
        tiny_trl.config(tmp_path, paec_anchored="scores", beta=0.1, sync_ref_model=True)


def test_the_anchor_of_rollout_batches_takes_all_their_steps(tmp_path: Path) -> None:
    """Two optimiser steps on each generation, twice."""
    options = PAEC_ON | {"paec_anchor_unit": "rollout_batch", "steps_per_generation": 4, "num_iterations": 2}
    run = trainer(tmp_path, **options, max_steps=5)
    run.train()
    anchor = sum(logged(run, "paec/mean_entropy")[:4]) / 4
    assert logged(run, "paec/anchor") == [pytest.approx(anchor)]


def test_a_mask_that_is_not_selective_is_warned_of_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, **PAEC_ON, paec_tau_m=0.5)
    with pytest.warns(UserWarning, match="PAEC's mask is not selective") as found:
        run.train()
    assert sum("not selective" in str(warning.message) for warning in found) == 1


def test_adapters_get_the_gradient_of_the_whole_step(tmp_path: Path) -> None:
    peft_config = lora()
    from peft import get_peft_model

    run, steps = recorded(tmp_path, reward=tiny_trl.constant, peft_config=peft_config, **PAEC_ON)
    run.train()
    exacts = truths(steps, run.args.paec_config(), model=get_peft_model(tiny_trl.llama(), lora()))
    for step, exact in zip(steps, exacts, strict=True):
        assert len(exact.gradients) == 8
        assert relative_error(step.gradients, exact.gradients) < 1e-5


def test_a_reference_pass_through_the_same_model_is_not_taken_for_the_policys(tmp_path: Path) -> None:
    """The third step uses the statistics of the old log-probs' pass, which the one without adapters follows."""
    options = PAEC_ON | {"beta": 0.1, "num_iterations": 2}
    run, steps = recorded(tmp_path, peft_config=lora(), learning_rate=0.1, **options)
    run.train()
    from peft import get_peft_model

    exacts = truths(steps, run.args.paec_config(), model=get_peft_model(tiny_trl.llama(), lora()))
    thresholds = [exact.metrics["threshold"].item() for exact in exacts]
    assert logged(run, "paec/threshold") == pytest.approx(thresholds, rel=1e-5)


def test_bfloat16(tmp_path: Path) -> None:
    """Autocast caches cast weights: the pass without gradients must not leave any to the pass with them."""
    run, steps = recorded(tmp_path, reward=tiny_trl.constant, bf16=True, **PAEC_ON)
    run.train()
    for step, exact in zip(steps, truths(steps, run.args.paec_config(), bfloat16=True), strict=True):
        assert relative_error(step.gradients, exact.gradients) < 0.05


def count_passes(run: PAECGRPOTrainer) -> list[str]:
    """Fills with the optimiser step and the kind of each scoring pass of the policy, while ``run`` trains."""
    passes: list[str] = []

    def note(_, __, options) -> None:
        if options.get("fused_lm_head"):
            kind = "training" if torch.is_grad_enabled() else "no-grad"
            passes.append(f"{run.state.global_step} {kind}")

    run.model.register_forward_pre_hook(note, with_kwargs=True)
    return passes


def test_a_scoring_pass_is_one_call_of_the_operator_and_no_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    longest: list[int] = []  # logits of a sequence, which generation alone asks of the head

    def counted(hidden, *arguments, **options):
        rows.append(len(hidden))
        return linear_token_stats(hidden, *arguments, **options)

    monkeypatch.setattr(integration, "linear_token_stats", counted)
    run, steps = recorded(tmp_path, max_steps=1, **PAEC_ON)
    passes = count_passes(run)
    run.model.lm_head.register_forward_hook(lambda _, __, logits: longest.append(logits.shape[1]))
    run.train()
    tokens = [int(piece.completion_mask.sum()) for piece in steps[0].pieces]
    assert passes == ["0 no-grad"] * 2 + ["0 training"] * 2
    assert rows == tokens * 2
    assert set(longest) == {1}


@pytest.mark.parametrize("biased", [True, False])
def test_the_head_gives_what_trls_kernel_gives(biased: bool) -> None:
    """With all that a model may do to its logits at once; no model at hand does."""
    inputs = [torch.randn(7, 8), torch.randn(11, 8)] + [torch.randn(11)] * biased
    token_ids = torch.randint(11, (7,))
    found = []
    for kernel in (integration._Head(0.95), utils._ChunkedLogProbFunction):
        leaves = [value.clone().requires_grad_() for value in inputs]
        hidden, weight, bias = leaves if biased else [*leaves, None]
        logp, entropy, *_ = kernel.apply(hidden, weight, bias, token_ids, 0.7, 256, 2.0, 0.5, ("log_probs", "entropy"))
        found.append([logp, entropy, *torch.autograd.grad((logp + 2 * entropy).sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


TWO_TRAINING_PASSES = ["training"] * 2
PASSES = {
    # With one micro-batch the training pass is enough.
    "one micro-batch": ({"gradient_accumulation_steps": 1}, [["training"]] * 3),
    # Two micro-batches, looked at before.
    "plain": ({}, [["no-grad"] * 2 + TWO_TRAINING_PASSES] * 3),
    # TRL's old log-probs of four micro-batches; the first optimiser step uses them, the second looks for itself.
    "two steps a generation": (
        {"steps_per_generation": 4, "max_steps": 2},
        [["no-grad"] * 4 + TWO_TRAINING_PASSES, ["no-grad"] * 2 + TWO_TRAINING_PASSES],
    ),
    "num_iterations": (
        {"num_iterations": 2},
        [["no-grad"] * 2 + TWO_TRAINING_PASSES, ["no-grad"] * 2 + TWO_TRAINING_PASSES] * 2,
    ),
}


@pytest.mark.parametrize("case", PASSES)
def test_no_pass_is_made_for_what_another_has_seen(case: str, tmp_path: Path) -> None:
    options, expected = PASSES[case]
    run = trainer(tmp_path, **PAEC_ON, **options)
    passes = count_passes(run)
    run.train()
    assert passes == [f"{i} {kind}" for i, kinds in enumerate(expected[: run.args.max_steps]) for kind in kinds]


def test_with_vllm_the_old_log_probs_pass_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself is a stub: only generation is its own, and TRL then always computes old log-probs."""

    class Generation:
        def __init__(self, **_) -> None: ...

        def sync_weights(self) -> None: ...

        def generate(self, prompts, images, num_generations, profiler):
            lengths = torch.randint(2, 12, (len(prompts),)).tolist()
            ids = [torch.randint(2, 32, (n,)).tolist() for n in lengths]
            return prompts, ids, [[[-3.0]] * n for n in lengths], None

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Generation)
    run, steps = recorded(tmp_path, reward=tiny_trl.constant, use_vllm=True, **PAEC_ON)
    passes = count_passes(run)
    run.train()
    assert passes == [f"{i} {kind}" for i in range(3) for kind in ["no-grad"] * 2 + TWO_TRAINING_PASSES]
    exacts = truths(steps, run.args.paec_config())
    thresholds = [exact.metrics["threshold"].item() for exact in exacts]
    assert logged(run, "paec/threshold") == pytest.approx(thresholds, rel=1e-5)
    for step, exact in zip(steps, exacts, strict=True):
        assert relative_error(step.gradients, exact.gradients) < 1e-5


def test_tool_tokens_do_not_count(tmp_path: Path) -> None:
    def counts(position: torch.Tensor) -> torch.Tensor:
        return position % 3 > 0

    def with_tools(batch: dict) -> dict:
        return batch | {"tool_mask": counts(torch.arange(batch["completion_ids"].shape[1])).long().expand(8, -1)}

    run, steps = recorded(tmp_path, kind=altered(with_tools), max_steps=1, **PAEC_ON)
    run.train()
    (plain,) = truths(steps, run.args.paec_config())
    (without,) = truths(steps, run.args.paec_config(), counted=counts)
    assert logged(run, "paec/mask_sum") == [pytest.approx(without.metrics["mask_sum"].item(), rel=1e-5)]
    assert logged(run, "paec/mask_sum") != [pytest.approx(plain.metrics["mask_sum"].item(), rel=1e-2)]


def test_vision_inputs_reach_every_pass(tmp_path: Path) -> None:
    """Only their way is checked, with the one that a language model takes without harm."""

    def multimodal(batch: dict) -> dict:
        width = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
        return batch | {"mm_token_type_ids": torch.arange(8)[:, None].expand(-1, width)}

    run = trainer(tmp_path, kind=altered(multimodal), max_steps=1, **PAEC_ON)
    seen: list[list[int]] = []
    run.model.register_forward_pre_hook(
        lambda _, __, options: (
            seen.append(options["mm_token_type_ids"][:, 0].tolist()) if "labels" in options else None
        ),
        with_kwargs=True,
    )
    run.train()
    assert len(seen) == 4
    assert seen[:2] == seen[2:]
    assert sorted(seen[0] + seen[1]) == list(range(8))


def test_a_micro_batch_without_a_token(tmp_path: Path) -> None:
    def without(batch: dict) -> dict:
        return batch | {"completion_mask": torch.zeros_like(batch["completion_mask"])}

    run = trainer(tmp_path, kind=altered(without), max_steps=1, **PAEC_ON)
    before = [value.clone() for value in run.model.parameters()]
    run.train()
    assert logged(run, "loss") == [0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert run.paec.anchor_count == 0


def test_evaluation_is_the_stock_trainers(tmp_path: Path) -> None:
    stock = trainer(tmp_path, stock=True, per_device_eval_batch_size=4)
    expected = stock.evaluate(tiny_trl.prompts())
    ours = trainer(tmp_path, per_device_eval_batch_size=4)
    found = ours.evaluate(tiny_trl.prompts())
    assert abs(expected["eval_loss"]) < 10
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert found["eval_entropy"] == pytest.approx(expected["eval_entropy"], rel=1e-5)
    assert not any("paec" in key for key in found)
    assert ours.paec.anchor_count == 0


def test_evaluation_amid_training_changes_nothing(tmp_path: Path) -> None:
    """It generates too, with old log-probs that no training step may take for its own."""

    class SameRandomNumbers(PAECGRPOTrainer):
        def evaluate(self, *arguments, **options):
            with torch.random.fork_rng():
                return super().evaluate(*arguments, **options)

    runs = []
    for eval_strategy in ("no", "steps"):
        options = PAEC_ON | {"num_iterations": 2, "steps_per_generation": 4, "max_steps": 5}
        options |= {"eval_strategy": eval_strategy, "eval_steps": 1, "per_device_eval_batch_size": 4}
        runs.append(trainer(tmp_path, kind=SameRandomNumbers, eval_dataset=tiny_trl.prompts(), **options))
        runs[-1].train()
    assert len(logged(runs[1], "eval_loss")) == 5
    for key in ("loss", "paec/threshold"):
        assert len(logged(runs[0], key)) == 5
        assert logged(runs[1], key) == logged(runs[0], key)


# -- the anchor in checkpoints --------------------------------------------------------------------------------------

RESUMED = PAEC_ON | {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "paec_anchor_steps": 3}

KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from integrations import test_trl, tiny_trl

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 4:  # its checkpoint is not written yet
            os.kill(os.getpid(), signal.SIGKILL)

tiny_trl.trainer(Path(sys.argv[1]), callbacks=[Kill()], **test_trl.RESUMED).train()
"""


def test_a_killed_run_goes_on_with_the_same_anchor_and_loss(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", **RESUMED)
    whole.train()
    tests = Path(__file__).parents[1]
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-2"]

    resumed = trainer(tmp_path / "killed", **RESUMED)
    resumed.train(resume_from_checkpoint=True)
    for key in ("loss", "paec/mean_entropy", "paec/threshold"):
        assert len(logged(whole, key)) == 5
        assert logged(resumed, key) == pytest.approx(logged(whole, key), rel=1e-6)
    # Two steps of the anchor's three were saved, the third is of the resumed run.
    assert resumed.paec.anchor_count == 3
    assert resumed.paec.anchor_sum == pytest.approx(whole.paec.anchor_sum.item(), rel=1e-6)
    assert logged(whole, "paec/anchor") == [pytest.approx(sum(logged(whole, "paec/mean_entropy")[:3]) / 3)] * 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, **RESUMED | {"max_steps": 2}).train()
    return folder / "checkpoint-2"


def test_the_anchor_is_written_whole_and_before_what_makes_a_checkpoint_one(checkpoint: Path) -> None:
    state, mark = checkpoint / "paec.pt", checkpoint / "trainer_state.json"
    assert state.stat().st_mtime_ns <= mark.stat().st_mtime_ns
    assert not list(checkpoint.glob("*.partial"))
    assert torch.load(state, weights_only=True)["anchor_count"] == 2


def test_a_checkpoint_of_another_config_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, **RESUMED | {"paec_rho": 0.5})
    with pytest.raises(
        RuntimeError, match=r"paec.pt does not fit.* another PAECConfig \(rho: checkpoint 0.8, here 0.5\)"
    ):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert run.paec.anchor_count == 0


def test_a_stock_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, stock=True, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-1/paec.pt is missing.* another checkpoint of PAECGRPO"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_before_anything_changes(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    DAMAGES[damage](copy / "paec.pt")
    run = trainer(tmp_path, **RESUMED)
    before = [value.clone() for value in run.model.parameters()]
    with pytest.raises(UnreadableFileError, match=r"checkpoint-2/paec.pt must be PAEC's state.* Resume from another"):
        run.train(resume_from_checkpoint=str(copy))
    assert all(torch.equal(*pair) for pair in zip(before, run.model.parameters(), strict=True))
    assert run.paec.anchor_count == 0
    run.train()


@pytest.mark.parametrize("written", [0, 20])
def test_a_trainers_state_that_was_being_written_is_named(written: int, checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    state = copy / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:written])
    with pytest.raises(UnreadableFileError, match=r"checkpoint-2/trainer_state.json must be the state of a trainer"):
        trainer(tmp_path, **RESUMED).train(resume_from_checkpoint=True)


# -- the log and the config -----------------------------------------------------------------------------------------


def test_metrics_reach_a_reporting_backend(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(tmp_path, **PAEC_ON, report_to="tensorboard")
    run.train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    for name in ("threshold", "mean_entropy", "mask_sum", "floor", "penalty", "loss"):
        values = [event.value for event in log.Scalars(f"train/paec/{name}")]
        assert values == pytest.approx(logged(run, f"paec/{name}"))
        assert len(values) == 3


def test_yaml_sets_the_fields(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: out\nuse_cpu: true\nbf16: false\nreport_to: [tensorboard, wandb]\n"
        "paec_rho: 0.9\npaec_lam: 1e-3\npaec_anchor_steps: 2\n"
    )
    (config,) = TrlParser(PAECGRPOConfig).parse_args_and_config(["--config", str(path), "--paec_beta", "0.25"])
    assert config.report_to == ["tensorboard", "wandb"]
    found = config.paec_config()
    assert (found.rho, found.lam, found.anchor_steps, found.beta) == (0.9, 0.001, 2, 0.25)
    assert found == PAECConfig(rho=0.9, lam=0.001, anchor_steps=2, beta=0.25)
    assert (config.beta, config.top_p) == (0.0, 1.0)  # TRL's own


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("paec_roh: 0.9", "Unknown arguments from config file: .*paec_roh"),
        ("paec_rho: [0.9]", r"PAECConfig.rho must be a number, got \[0.9\]"),
    ],
)
def test_yaml_that_does_not_fit_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: out\nuse_cpu: true\nbf16: false\n{line}\n")
    with pytest.raises((TypeError, ValueError), match=message):
        TrlParser(PAECGRPOConfig).parse_args_and_config(["--config", str(path)])


def test_every_field_of_paec_is_a_field_of_the_config_with_its_default() -> None:
    ours = {field.name.removeprefix("paec_"): field for field in fields(PAECGRPOConfig) if field.name[:5] == "paec_"}
    assert {name: field.default for name, field in ours.items()} == asdict(PAECConfig())
    assert all(field.metadata["help"] for field in ours.values())
    assert json.dumps(tiny_trl.config(Path("out"), paec_rho=0.7).to_dict())


# -- refusals -------------------------------------------------------------------------------------------------------

REFUSED = {
    "out of range": ({"paec_rho": 1.5}, r"PAECConfig.rho must be in \[0, 1\], got 1.5"),
    "steps not generated yet": (
        {"steps_per_generation": 2, "gradient_accumulation_steps": 4},
        "steps_per_generation must be a multiple of gradient_accumulation_steps, .* got 2 and 4",
    ),
    "dropout": (
        {"model": lambda: tiny_trl.llama(attention_dropout=0.1)},
        r"must be without noise .*layers.0.self_attn.attention_dropout=0.1",
    ),
    "adapters' dropout": ({"peft_config": lambda: lora(lora_dropout=0.1)}, r"lora_dropout.default.p=0.1"),
    "neftune": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
    "fused loss": (
        {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
        "fused_linear_cross_entropy.* is not supported",
    ),
    "adapter on the head": ({"peft_config": lambda: lora(target_modules=["lm_head"])}, "adapter to `lm_head`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_at_construction(case: str, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    made = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **made)


def test_dropout_that_is_disabled_or_seen_once_is_accepted(tmp_path: Path) -> None:
    trainer(tmp_path, peft_config=lora(lora_dropout=0.1), disable_dropout=True)
    model = tiny_trl.llama(attention_dropout=0.1)
    run = trainer(tmp_path, model=model, gradient_accumulation_steps=1, max_steps=1, **PAEC_ON)
    run.train()
    assert len(logged(run, "paec/threshold")) == 1


def test_a_forward_that_is_not_trls_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.grpo_trainer.add_fused_lm_head", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"model.forward must be the scoring forward of trl 1.16, .*LlamaForCausalLM"):
        trainer(tmp_path)


def test_a_forward_replaced_later_is_refused_at_its_first_use(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    trainer(tmp_path, stock=True, model=run.model)  # gives the model TRL's own forward again
    with pytest.raises(RuntimeError, match=r"model.forward was replaced after PAECGRPOTrainer was constructed"):
        run.train()


def test_training_that_was_left_within_an_optimiser_step_is_not_taken_up(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            raise KeyboardInterrupt

    run = trainer(tmp_path, callbacks=[Interrupt()], **PAEC_ON)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.raises(RuntimeError, match=r"left within an optimiser step.* construct the trainer again"):
        run.train()


# -- a head that DeepSpeed ZeRO-3 has split -------------------------------------------------------------------------


def test_a_split_head_is_gathered_for_backward_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed is a stand-in: outside the context the head has no elements, as under ZeRO-3."""
    kept: dict[int, torch.Tensor] = {}
    gathers: list[bool] = []

    class Gathered:
        def __init__(self, weight, bias) -> None:
            self.weight = weight

        def __enter__(self) -> None:
            gathers.append(torch.is_grad_enabled())
            self.weight.data = kept[id(self.weight)]

        def __exit__(self, *_) -> None:
            self.weight.data = self.weight.data.new_empty(0)

    def gradients(split: bool) -> dict[str, torch.Tensor]:
        run = trainer(tmp_path, max_steps=1, **PAEC_ON)
        ids = torch.arange(2, 32).view(2, 15)
        if split:
            weight = run.model.lm_head.weight
            kept[id(weight)] = weight.data
            weight.data = weight.data.new_empty(0)
        logps, _, _ = run._get_per_token_logps_and_entropies(run.model, ids, torch.ones_like(ids), 10)
        stats = run._scored.pop()[1]
        names, parameters = zip(*run.model.named_parameters(), strict=True)
        # Into no .grad, which DeepSpeed itself sees to.
        found = torch.autograd.grad(logps.sum() + stats.nucleus_entropy.sum(), parameters)
        return dict(zip(names, found, strict=True))

    whole = gradients(split=False)
    monkeypatch.setattr("trl.trainer.utils.maybe_gather_lm_head_ctx", Gathered)
    monkeypatch.setattr(integration, "maybe_gather_lm_head_ctx", Gathered)
    split = gradients(split=True)
    assert len(gathers) == 2
    assert whole.keys() == split.keys()
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=0)


# -- a real model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("_smollm2")
def test_smollm2(tmp_path: Path) -> None:
    from paec_kernels.train.models import smollm2

    questions = ("What is 9 + 6?", "What is 6 * 7?", "How many pens do 3 boxes of 4 pens hold?", "What is 5 * 3?")
    policy, tokenizer = smollm2.load(torch.device("cpu"))
    policy.is_quantized = False  # its file is, its weights were dequantised
    run = PAECGRPOTrainer(
        model=policy,
        reward_funcs=lambda completions, **_: [float(any(c.isdigit() for c in x[0]["content"])) for x in completions],
        args=tiny_trl.config(
            tmp_path,
            max_steps=2, per_device_train_batch_size=2, num_generations=2, max_completion_length=16,
            learning_rate=1e-5, paec_beta=0.05, paec_anchor_steps=1, paec_rho_min=1.5,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in questions]),
        processing_class=tokenizer,
    )  # fmt: skip
    before = policy.lm_head.weight.detach().clone()
    run.train()
    first, second = logged(run, "paec/mean_entropy")
    assert 0 < first < 11
    assert 0 < second < 11
    assert logged(run, "paec/anchor") == [first]
    assert logged(run, "paec/penalty") == [0.0, pytest.approx(max(0, 1.5 * first - second) ** 2, rel=1e-4)]
    assert not torch.equal(before, policy.lm_head.weight)
