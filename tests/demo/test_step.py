"""The step on a tiny random Llama: padding, micro-batches, and what the step does to the policy."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the demo's packages: pip install 'paec-kernels[demo]'")
import transformers

import paec_kernels as pk
from paec_kernels.demo.rollout import Rollout, answer_hidden, part
from paec_kernels.demo.step import Head, score, take_step

PROMPT_LENGTHS, ANSWER_LENGTHS = (5, 3, 4), (2, 4, 3)
P, T, V = max(PROMPT_LENGTHS), max(ANSWER_LENGTHS), 50


@pytest.fixture
def policy() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def answers() -> Rollout:
    sequences = torch.randint(V, (3, P + T))
    prompt_mask = torch.arange(P) >= P - torch.tensor(PROMPT_LENGTHS)[:, None]
    valid = torch.arange(T) < torch.tensor(ANSWER_LENGTHS)[:, None]
    return Rollout(sequences, torch.cat([prompt_mask, valid], dim=1).long(), P, valid)


def micro_batches(answers: Rollout, sizes: tuple[int, ...]) -> list[Rollout]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [part(answers, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def test_hidden_states_do_not_depend_on_the_padding(policy, answers: Rollout) -> None:
    with torch.no_grad():
        logits = policy.lm_head(answer_hidden(policy, answers))
        assert logits.shape == (3, T, V)
        for row, (prompt, length) in enumerate(zip(PROMPT_LENGTHS, ANSWER_LENGTHS, strict=True)):
            alone = policy(answers.sequences[row : row + 1, P - prompt : P + length]).logits[0]
            torch.testing.assert_close(logits[row, :length], alone[prompt - 1 : -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_rows", [0, 2])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1)])
def test_micro_batches_take_the_step_of_the_whole_batch(policy, answers: Rollout, sizes, chunk_rows: int) -> None:
    advantages = torch.tensor([1.0, -0.5, -0.5])
    weights = {name: weight.clone() for name, weight in policy.state_dict().items()}
    results, updated = [], []
    heads = (Head(0.7, 0.95), Head(0.7, 0.95, chunk_rows))
    for batches, head in zip(([answers], micro_batches(answers, sizes)), heads, strict=True):
        policy.load_state_dict(weights)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        paec = pk.PAEC(pk.PAECConfig(beta=0.5))
        scored = score(policy, head, paec, batches, lambda *_: None)
        results.append(take_step(policy, head, optimizer, paec, batches, advantages, scored, lambda: None))
        updated.append(torch.cat([parameter.detach().flatten() for parameter in policy.parameters()]))
        assert paec.anchor_count == 1
    assert results[0].policy_loss == pytest.approx(results[1].policy_loss, abs=1e-6)
    assert results[0].entropy_bonus == pytest.approx(results[1].entropy_bonus, rel=1e-5)
    assert results[0].gradient_norm == pytest.approx(results[1].gradient_norm, rel=1e-4)
    torch.testing.assert_close(updated[1], updated[0], rtol=1e-5, atol=1e-6)


def test_step_makes_the_rewarded_answer_likelier(policy, answers: Rollout) -> None:
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    paec = pk.PAEC(pk.PAECConfig(beta=0.0))
    advantages = torch.tensor([1.0, -0.5, -0.5])
    before = score(policy, Head(1.0, 0.95), paec, [answers], lambda *_: None)
    take_step(policy, Head(1.0, 0.95), optimizer, paec, [answers], advantages, before, lambda: None)
    after = score(policy, Head(1.0, 0.95), paec, [answers], lambda *_: None)
    change = ((after.logp - before.logp) * answers.valid).sum(1)
    assert change[0] > 0
    assert (change[1:] < change[0]).all()


def test_score_hands_over_each_micro_batch_with_its_hidden_states(policy, answers: Rollout) -> None:
    seen: list[tuple[int, ...]] = []
    paec = pk.PAEC(pk.PAECConfig())
    batches = micro_batches(answers, (2, 1))
    scored = score(policy, Head(1.0, 0.95), paec, batches, lambda _, hidden: seen.append(hidden.shape))
    assert seen == [(2, T, 32), (1, T, 32)]
    assert scored.logp.shape == (3, T)
    assert (scored.stats.entropy[~answers.valid] == 0).all()
