"""A trained Hugging Face model is taken out again as such."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train.models.test_hugging_face import CHAT_TEMPLATE, END, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from paec_kernels.train import commands
from paec_kernels.train.config import EvalOptions, ExportConfig, TrainConfig
from paec_kernels.train.models.hugging_face import load
from paec_kernels.train.run_folder import read_checkpoint


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> TrainConfig:
    model = make_model(tied=request.param)
    model.generation_config.eos_token_id = [END, 7]
    model.generation_config.to_json_file(tmp_path / "start.json")
    model.save_pretrained(tmp_path / "start")
    # As some models come: settings that transformers would refuse to save once anything has touched them.
    settings = '{"do_sample": false, "temperature": 0.3, "eos_token_id": [2, 7]}'
    (tmp_path / "start" / "generation_config.json").write_text(settings)
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "start")
    return TrainConfig(
        out=tmp_path / "run",
        model=str(tmp_path / "start"),
        tasks=("parity",),
        steps=1,
        prompts=2,
        answers=4,
        max_new_tokens=4,
        learning_rate=1e-2,
        device="cpu",
        evaluate=EvalOptions(problems=2, samples=2),
    )


def assert_is_the_checkpoint(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto")
    trained = read_checkpoint(run / "checkpoint.pt")["model"]
    found = {f"model.{name}": x for name, x in model.state_dict().items()}
    assert found.keys() == trained.keys()
    assert all(torch.equal(x, trained[name]) for name, x in found.items())
    assert model.generation_config.eos_token_id == [END, 7]
    assert model.generation_config.temperature == 0.3
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer("abc").input_ids == make_tokenizer()("abc").input_ids


def test_it_is_written_at_the_end_and_on_request(config: TrainConfig, capsys: pytest.CaptureFixture) -> None:
    run = config.out
    start = load(config.model, torch.device("cpu")).module.state_dict()
    assert commands.train(config) == 0
    assert f"wrote {run / 'model'}" in capsys.readouterr().out
    assert_is_the_checkpoint(run)
    trained = read_checkpoint(run / "checkpoint.pt")["model"]
    assert any(not torch.equal(start[name], trained[name]) for name in start)

    commands.loop.train(replace(config, steps=2))  # the command's end is still to come
    assert not (run / "model").exists()
    assert (run / "model-1" / "model.safetensors").exists()
    assert commands.export(ExportConfig(run)) == 0
    assert_is_the_checkpoint(run)
    again = read_checkpoint(run / "checkpoint.pt")["model"]
    assert any(not torch.equal(again[name], trained[name]) for name in trained)
    assert not list(run.glob("*.partial"))
    (run / "model" / "model.safetensors").unlink()
    commands.export(ExportConfig(run))  # in place of one that is there
    assert_is_the_checkpoint(run)


def test_a_model_that_is_not_whole_is_not_there(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config.out
    commands.loop.train(config)

    def die(*args: object, **options: object) -> None:
        (partial,) = run.glob("model.*.partial")
        assert list(partial.glob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", die)
    with pytest.raises(KeyboardInterrupt):
        commands.export(ExportConfig(run))
    assert {path.name for path in run.iterdir()} == {"checkpoint.pt", "config.json", "log.jsonl", "tensorboard"}
    monkeypatch.undo()
    commands.export(ExportConfig(run))
    assert_is_the_checkpoint(run)
