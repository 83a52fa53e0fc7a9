import math

import pytest
import torch

from paec_kernels.train.models.tiny import END_ID, LETTERS, MAX_POSITIONS, PAD_ID, TinyModel, TinyPolicy, encode

PROMPTS = ["a47+38:", "o3142:", "p0110100:"]


@pytest.fixture
def policy() -> TinyPolicy:
    torch.manual_seed(0)
    model = TinyModel(width=32, n_layers=2, n_heads=2)
    with torch.no_grad():
        model.embedding.weight *= 10  # an untrained head says nothing: make it decided
    return TinyPolicy(model)


def sample(policy, prompts=PROMPTS, answers=3, temperature=1.0, seeds=(5, 6, 7), max_new_tokens=12):
    return policy.sample(prompts, answers, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)


def test_cached_states_are_those_of_the_whole_sequence(policy):
    ids, mask = encode(PROMPTS)
    whole = policy.module.states(ids, mask)
    cache = {}
    pieces = [
        policy.module.states(ids[:, :4], mask[:, :4], cache),
        policy.module.states(ids[:, 4:5], mask[:, :5], cache),
        policy.module.states(ids[:, 5:], mask, cache),
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1)[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(policy):
    alone = policy.module.states(*encode(PROMPTS[1:2]))[0]
    padded = policy.module.states(*encode(PROMPTS))[1, -len(PROMPTS[1]) :]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_samples_of_a_prompt_do_not_depend_on_the_others(policy):
    together = policy.texts(sample(policy))
    alone = policy.texts(sample(policy, PROMPTS[1:2], seeds=[6]))
    assert together[3:6] == alone
    assert len(set(together)) > 3


def test_samples_follow_the_distribution(policy):
    ids, mask = encode(PROMPTS[:1])
    logits = policy.module.states(ids, mask)[0, -1] @ policy.head.T
    expected = (logits / 0.7).softmax(-1)
    n = 20_000
    drawn = policy.sample(PROMPTS[:1], n, max_new_tokens=1, temperature=0.7, seeds=[1]).token_ids[:, 0]
    share = torch.bincount(drawn, minlength=len(LETTERS)) / n
    assert ((share - expected).abs() < 5 * (expected / n).sqrt() + 1 / n).all()


def test_valid_ends_with_the_end_token(policy):
    with torch.no_grad():
        policy.module.embedding.weight[END_ID] += policy.module.embedding.weight.abs().max() / 20
    rollout = sample(policy, answers=40)
    assert torch.equal(rollout.attention_mask[:, rollout.prompt_length :].bool(), rollout.valid)
    assert (rollout.token_ids[~rollout.valid] == PAD_ID).all()
    assert (rollout.valid[:, 1:] <= rollout.valid[:, :-1]).all()  # no gap
    lengths, texts, tokens_of_each = rollout.valid.sum(1), policy.texts(rollout), policy.tokens(rollout)
    for ids, length, text, tokens in zip(rollout.token_ids.tolist(), lengths, texts, tokens_of_each, strict=True):
        assert END_ID not in ids[: length - 1]
        assert ids[length - 1] == END_ID or length == len(ids)
        assert tokens == [LETTERS[i] for i in ids[:length]]
        assert text == "".join(tokens).removesuffix(LETTERS[END_ID])
    assert (rollout.token_ids == END_ID).any()


def test_greedy_is_the_likeliest_token(policy):
    rollout = sample(policy, answers=1, temperature=0.0)
    assert sample(policy, answers=1, temperature=0.0, seeds=(8, 9, 10)).sequences.equal(rollout.sequences)
    hidden = policy.module(rollout.sequences, rollout.attention_mask, rollout.prompt_length)
    before = policy.module.states(rollout.sequences, rollout.attention_mask)[:, rollout.prompt_length - 1 : -1]
    torch.testing.assert_close(hidden[rollout.valid], before[rollout.valid], rtol=1e-4, atol=1e-5)
    logits = hidden @ policy.head.T  # [B, T, V]
    assert torch.equal(logits.argmax(-1)[rollout.valid], rollout.token_ids[rollout.valid])


def test_what_the_model_cannot_read_or_write_is_refused(policy):
    with pytest.raises(ValueError, match=r"prompts must be of the letters .* got ' A'"):
        sample(policy, ["a4 7:A"], seeds=[1])
    with pytest.raises(ValueError, match=r"max_new_tokens must be at most 55 after a prompt of 9 letters.* got 56"):
        sample(policy, max_new_tokens=56)
    sample(policy, answers=1, max_new_tokens=55)


def test_rows_are_cut_to_the_longest_answer(policy):
    rollout = sample(policy)
    shorter = rollout.valid.clone()
    shorter[:, 4:] = False
    part = rollout._replace(valid=shorter).rows(slice(0, 2))
    assert part.token_ids.shape == (2, 4)
    assert torch.equal(part.token_ids, rollout.token_ids[:2, :4])
    assert part.attention_mask.shape == part.sequences.shape


def test_tied_weights_and_size():
    model = TinyModel()
    assert sum(p.numel() for p in model.parameters()) < 400_000
    assert math.prod(model.position.weight.shape) == MAX_POSITIONS * 96
