"""Both trainers take their steps over the same answers; another loss gets no number."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'paec-kernels[trl]'")
pytest.importorskip("gguf", reason="needs the demo's packages: pip install 'paec-kernels[demo]'")
from integrations import tiny_trl

from benchmarks import trl_step
from benchmarks.parts import Part
from benchmarks.workload import Case
from paec_kernels import PAEC
from paec_kernels.train.models.hugging_face import HFPolicy

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, of options that TRL sets
PART = Part("trl", Case(0, 32, torch.float32, "tiny model", "cpu"), 2)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch) -> None:
    """In place of SmolLM2."""
    tokenizer = tiny_trl.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    monkeypatch.setattr(trl_step.smollm2, "policy", lambda device: HFPolicy(tiny_trl.llama(), tokenizer))


def test_each_trainer_gets_its_row() -> None:
    rows = list(trl_step.step_rows(PART))
    assert [row.implementation for row in rows] == 2 * ["GRPOTrainer", "PAECGRPOTrainer"]
    assert [row.logits[-1] for row in rows] == ["1", "1", "2", "2"]
    assert all(row.status == "ok" and row.turns == 2 and row.value_error < 1e-5 for row in rows)
    assert {row.anchor for row in rows} == {"GRPOTrainer"}
    assert 0 < rows[0].n < rows[2].n


def test_another_loss_gets_no_number(monkeypatch) -> None:
    term = PAEC.term
    monkeypatch.setattr(PAEC, "term", lambda *arguments, **options: 2 * term(*arguments, **options))
    assert [row.status for row in trl_step.step_rows(PART)] == 2 * ["ok", "wrong"]
