"""The ways in which GRPOTrainer may be called and used: each must do the same with PAECGRPOTrainer."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'paec-kernels[trl]'")
from integrations import tiny_trl
from integrations.tiny_trl import PAEC_OFF, constant, logged, prompts, tokenizer, vowels
from transformers import LlamaForCausalLM, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from paec_kernels.integrations.trl import PAECGRPOConfig, PAECGRPOTrainer
from paec_kernels.losses.paec_config import PAECConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, of options that TRL sets

# SGD, since Adam divides by gradients that are 0 up to rounding.
SMALL = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_steps": 2,
    "per_device_eval_batch_size": 4,
    "max_completion_length": 6,
}


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A model and its tokenizer in a folder, as a model's id names them."""
    folder = tmp_path / "tiny-llama"
    tiny_trl.llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def lora():
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def positional(kind: type[GRPOTrainer], args: Callable[..., GRPOConfig], saved: str) -> GRPOTrainer:
    optimizers = (None, None)
    everything = (prompts(), prompts(), tokenizer(), None, [], optimizers, None, lora(), None, None, None)
    run = kind(saved, vowels, args(), *everything)
    run.train()
    return run


def several_rewards_and_evaluations(kind, args, saved):
    run = kind(
        model=saved, reward_funcs=[vowels, constant], args=args(reward_weights=[0.5, 2.0]), train_dataset=prompts(),
        eval_dataset={"one": prompts(), "two": prompts()},
    )  # fmt: skip
    run.train()
    assert {"eval_one_loss", "eval_two_loss"} < run.evaluate().keys()
    return run


def own_optimizer(kind, args, saved):
    model = tiny_trl.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run = kind(model, vowels, args(), prompts(), processing_class=tokenizer(), optimizers=(optimizer, scheduler))
    run.train()
    assert run.optimizer.optimizer is optimizer
    return run


def predictions_and_more_training(kind, args, saved):
    run = kind(saved, vowels, args(), prompts())
    run.train()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    prediction = run.predict(prompts())
    assert prediction.metrics["test_loss"] < 10
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    run.train()
    return run


def best_model(kind, args, saved):
    """The best by a reward that falls from the first evaluation on is the first checkpoint."""
    rewards = iter(range(100, 0, -1))

    def falling(completion_ids, **_):
        return [float(next(rewards))] * len(completion_ids)

    options = args(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_reward", greater_is_better=True, save_total_limit=2,
    )  # fmt: skip
    run = kind(saved, falling, options, prompts(), prompts())
    run.train()
    folder = Path(options.output_dir)
    assert run.state.best_model_checkpoint == str(folder / "checkpoint-1")
    run.save_model(str(folder / "best"))
    best = [LlamaForCausalLM.from_pretrained(folder / name) for name in ("checkpoint-1", "best")]
    assert all(torch.equal(*both) for both in zip(*(model.parameters() for model in best), strict=True))
    return run


def streamed_dataset(kind, args, saved):
    run = kind(saved, vowels, args(), prompts().to_iterable_dataset())
    run.train()
    return run


def adapted_model(kind, args, saved):
    from peft import get_peft_model

    torch.manual_seed(0)
    run = kind(
        get_peft_model(tiny_trl.llama(), lora()), vowels, args(beta=0.1), prompts(), processing_class=tokenizer()
    )
    run.train()
    return run


WAYS = [
    positional,
    several_rewards_and_evaluations,
    own_optimizer,
    predictions_and_more_training,
    best_model,
    streamed_dataset,
    adapted_model,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_using_the_trainer_is_the_stock_trainers(way: Callable, saved: str, tmp_path: Path) -> None:
    stock = way(GRPOTrainer, lambda **options: tiny_trl.config(tmp_path / "a", GRPOConfig, **SMALL | options), saved)
    ours = way(PAECGRPOTrainer, lambda **options: tiny_trl.config(tmp_path / "b", **SMALL | PAEC_OFF | options), saved)
    for key in ("loss", "eval_loss", "eval_one_loss", "test_loss", "reward", "learning_rate", "entropy"):
        assert logged(ours, key) == pytest.approx(logged(stock, key), rel=1e-5, abs=1e-5), key
    assert len(logged(stock, "loss")) >= 2


def test_without_args_paec_has_its_defaults(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # TRL's defaults are for a device with bfloat16.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    run = PAECGRPOTrainer(saved, vowels, train_dataset=prompts())
    assert run.paec.config == PAECConfig()
    stock = GRPOTrainer(saved, vowels, train_dataset=prompts())
    differing = {
        field.name for field in fields(GRPOConfig) if getattr(run.args, field.name) != getattr(stock.args, field.name)
    }
    assert differing == {"output_dir"}
    assert (run.args.output_dir, stock.args.output_dir) == ("tiny-llama-PAEC", "tiny-llama-GRPO")
    model = tiny_trl.llama()
    model.config._name_or_path = "someone/a-model"
    run = PAECGRPOTrainer(model, vowels, train_dataset=prompts(), processing_class=tokenizer())
    assert run.args.output_dir == "a-model-PAEC"


@pytest.mark.parametrize(
    ("args", "got"),
    [
        (lambda folder: tiny_trl.config(folder, GRPOConfig), "GRPOConfig"),
        (lambda folder: TrainingArguments(str(folder), use_cpu=True), "TrainingArguments"),
        (lambda folder: {"max_steps": 1}, "{'max_steps': 1}"),
        (lambda folder: PAECGRPOConfig, "<class"),
    ],
)
def test_other_args_are_refused(args: Callable, got: str, saved: str, tmp_path: Path) -> None:
    message = r"args must be a PAECGRPOConfig, which is a GRPOConfig with PAEC's options, got .*" + re.escape(got)
    with pytest.raises(TypeError, match=message):
        PAECGRPOTrainer(saved, vowels, args(tmp_path), prompts())


def test_the_saved_args_are_the_args(saved: str, tmp_path: Path) -> None:
    args = tiny_trl.config(tmp_path / "out", max_steps=1, save_strategy="steps", save_steps=1, paec_rho=0.7)
    run = PAECGRPOTrainer(saved, vowels, args, prompts())
    run.train()
    loaded = torch.load(tmp_path / "out" / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert type(loaded) is PAECGRPOConfig
    assert loaded.to_dict() == args.to_dict()
    assert loaded.paec_config() == PAECConfig(rho=0.7)


def test_a_checkpoint_of_the_model_alone_is_refused(saved: str, tmp_path: Path) -> None:
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    PAECGRPOTrainer(saved, vowels, tiny_trl.config(tmp_path, **options), prompts()).train()
    again = PAECGRPOTrainer(saved, vowels, tiny_trl.config(tmp_path, max_steps=2), prompts())
    with pytest.raises(FileNotFoundError, match=r"checkpoint-1/paec.pt is missing.* saved without save_only_model"):
        again.train(resume_from_checkpoint=True)
