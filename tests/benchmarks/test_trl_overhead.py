"""The trainers' turns are timed apart, the pass before the training passes too; another loss gets no number."""

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'paec-kernels[trl]'")
pytest.importorskip("gguf", reason="needs the demo's packages: pip install 'paec-kernels[demo]'")
from integrations import tiny_trl

from benchmarks import trl_overhead

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, of options that TRL sets


@pytest.fixture(scope="module")
def made() -> list[trl_overhead.Contender]:
    tokenizer = tiny_trl.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return trl_overhead.contenders(tiny_trl.llama(), tokenizer, micro_batches=2, tokens=12)


def test_each_trainer_gets_its_row(made) -> None:
    assert trl_overhead.check(made) < 1e-5
    stock, answers_only, paec = trl_overhead.measure(made, repeats=3)
    assert [row["trainer"] for row in (stock, answers_only, paec)] == ["stock", "stock, answers only", "PAEC"]
    assert stock["times_stock"] == answers_only["times_answers_only"] == 1
    assert paec["before_seconds"] > 10 * stock["before_seconds"]  # a forward pass, and a look into a list
    assert paec["times_answers_only_without_its_pass"] < paec["times_answers_only"]


def test_another_loss_gets_no_number(made, monkeypatch: pytest.MonkeyPatch) -> None:
    term = made[-1].run.paec.term
    monkeypatch.setattr(made[-1].run.paec, "term", lambda *arguments: 2 * term(*arguments))
    with pytest.raises(SystemExit, match="losses without PAEC's term differ"):
        trl_overhead.check(made)
