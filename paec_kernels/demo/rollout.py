"""Sampled answers, batched, with a key-value cache."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList


class Rollout(NamedTuple):
    """B sequences: prompts padded on the left to P tokens, then answers padded on the right to T tokens."""

    sequences: Tensor  # int64 [B, P + T]
    attention_mask: Tensor  # int64 [B, P + T]
    prompt_length: int  # P
    valid: Tensor  # bool [B, T]: an answer's tokens up to and with its end token

    @property
    def token_ids(self) -> Tensor:
        """The answers' tokens, int64 [B, T]."""
        return self.sequences[:, self.prompt_length :]

    def rows(self, rows: slice) -> "Rollout":
        """The sequences of one micro-batch."""
        return Rollout(self.sequences[rows], self.attention_mask[rows], self.prompt_length, self.valid[rows])


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
    """``answers`` samples for each chat, from the whole distribution; ``on_token`` is called at each step."""
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    sequences = model.generate(
        **inputs,
        num_return_sequences=answers,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        stopping_criteria=StoppingCriteriaList([_Tick(on_token)]),
    )
    prompt_length = inputs["input_ids"].shape[1]
    is_end = sequences[:, prompt_length:] == tokenizer.eos_token_id  # also fills the places after the end
    valid = is_end.cumsum(1) - is_end.long() == 0
    prompt_mask = inputs["attention_mask"].repeat_interleave(answers, dim=0)
    return Rollout(sequences, torch.cat([prompt_mask, valid.long()], dim=1), prompt_length, valid)


def answer_hidden(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """The last hidden states that each answer token was sampled from, [B, T, D]; the head turns them into logits."""
    output = model.model(
        input_ids=rollout.sequences,
        attention_mask=rollout.attention_mask,
        position_ids=(rollout.attention_mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    )
    return output.last_hidden_state[:, rollout.prompt_length - 1 : -1]


class _Tick(StoppingCriteria):
    """Never stops; tells that another token was sampled."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self._on_token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
