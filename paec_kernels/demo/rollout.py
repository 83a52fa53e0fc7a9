"""Sampled answers to chats, batched, with a key-value cache."""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paec_kernels.train.models import hugging_face
from paec_kernels.train.models.policy import Rollout

__all__ = ["Rollout", "answer_hidden", "part", "sample"]


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[list[dict[str, str]]],
    answers: int,
    *,
    max_new_tokens: int,
    temperature: float,
    on_token: Callable[[], None] = lambda: None,
) -> Rollout:
    """``answers`` samples for each chat by torch's global generator; ``on_token`` is called at each step."""
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    return hugging_face.sample(
        model,
        tokenizer,
        prompts,
        answers,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        on_token=on_token,
    )


def part(rollout: Rollout, rows: slice) -> Rollout:
    """A micro-batch as wide as the whole: the demo shows all answers' statistics as one tensor."""
    sequences, attention_mask, prompt_length, valid = rollout
    return Rollout(sequences[rows], attention_mask[rows], prompt_length, valid[rows])


def answer_hidden(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """The last hidden states that each answer token was sampled from, [B, T, D]; the head turns them into logits."""
    return hugging_face.HiddenStates(model)(rollout.sequences, rollout.attention_mask, rollout.prompt_length)
