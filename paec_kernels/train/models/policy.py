"""What the loop asks of a language model, whatever it is built from."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Rollout(NamedTuple):
    """B sequences: prompts padded on the left to P tokens, then answers padded on the right to T tokens."""

    sequences: Tensor  # int64 [B, P + T]
    attention_mask: Tensor  # int64 [B, P + T]
    prompt_length: int  # P
    valid: Tensor  # bool [B, T]: an answer's tokens up to and with its end token
    roles: Tensor | None = None  # int64 [B, T]: each place's index in `tasks.task.ROLES`, where a task knows roles

    @property
    def token_ids(self) -> Tensor:
        """Return the answers' tokens, int64 [B, T]."""
        return self.sequences[:, self.prompt_length :]

    def answers(self) -> list[list[int]]:
        """Return each answer's token ids, its end token's too."""
        return [ids[valid].tolist() for ids, valid in zip(self.token_ids, self.valid, strict=True)]

    def rows(self, rows: slice | Tensor) -> "Rollout":
        """Return the sequences of one micro-batch, cut after its longest answer."""
        valid = self.valid[rows]
        length = max(1, int(valid.sum(1).max()))
        end = self.prompt_length + length
        roles = None if self.roles is None else self.roles[rows, :length]
        return Rollout(
            self.sequences[rows, :end], self.attention_mask[rows, :end], self.prompt_length, valid[:, :length], roles
        )


class Policy(Protocol):
    """A model with its tokenizer. Sampling depends on its arguments and the weights alone, never on a global state."""

    @property
    def module(self) -> nn.Module:
        """The module holds all parameters. Called with a rollout's (sequences, attention_mask, prompt_length), it gives
        the last hidden states that each answer token is predicted from, ``[B, T, D]``."""
        ...

    def sample(
        self, prompts: Sequence[str], answers: int, *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Rollout:
        """Sample ``answers`` in a row for each prompt, from the whole distribution; greedily at temperature 0.

        Args:
            seeds: one for each prompt.
        """
        ...

    def texts(self, rollout: Rollout) -> list[str]:
        """Return each answer as text, without its end token."""
        ...

    def tokens(self, rollout: Rollout) -> list[list[str]]:
        """Return the text of each of an answer's tokens, its end token's too."""
        ...

    @property
    def head(self) -> Tensor:
        """Return the weight ``[V, D]`` that turns hidden states into logits."""
        ...
