"""A small character-level transformer with a KV cache, and the policy on it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paec_kernels.train.models.policy import Rollout
from paec_kernels.train.tasks.families import ALPHABET, END

PAD_ID, END_ID = 0, 1
LETTERS = "_" + END + ALPHABET  # token i is LETTERS[i]
TOKEN = {letter: i for i, letter in enumerate(LETTERS)}
MAX_POSITIONS = 64
N_HEADS = 4

Cache = dict[int, tuple[Tensor, Tensor]]  # by layer, keys and values so far, [B, heads, length, head size]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if layer in cache:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[layer], (k, v), strict=True))
            cache[layer] = k, v
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, heads, T, head size]
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class TinyModel(nn.Module):
    """Learned positions, tied embeddings, no dropout."""

    def __init__(self, width: int = 96, n_layers: int = 3, n_heads: int = N_HEADS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), width)
        self.position = nn.Embedding(MAX_POSITIONS, width)
        blocks = [Block(width, n_heads) for _ in range(n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in blocks:  # GPT-2's scaling of what enters the residual stream
            nn.init.normal_(block.out.weight, std=0.02 / (2 * n_layers) ** 0.5)
            nn.init.normal_(block.down.weight, std=0.02 / (2 * n_layers) ** 0.5)

    def states(self, token_ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the last T tokens' hidden states [B, T, D]; attention_mask [B, past + T] covers cached ones too."""
        n_new, n_all = token_ids.shape[1], attention_mask.shape[1]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -n_new:]
        causal = torch.ones(n_all, n_all, dtype=torch.bool, device=token_ids.device).tril()[-n_new:]
        itself = torch.eye(n_all, dtype=torch.bool, device=token_ids.device)[-n_new:]  # no row of a softmax is empty
        mask = (causal & attention_mask.bool()[:, None] | itself)[:, None]  # [B, 1, T, past + T]
        x = self.embedding(token_ids) + self.position(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        return self.norm(x)

    def forward(self, sequences: Tensor, attention_mask: Tensor, prompt_length: int) -> Tensor:
        """Return the states that each token from prompt_length on is predicted from, [B, T, D]."""
        return self.states(sequences[:, :-1], attention_mask[:, :-1])[:, prompt_length - 1 :]


class TinyPolicy:
    """``Policy`` on a TinyModel; one letter a token."""

    def __init__(self, model: TinyModel) -> None:
        self.module = model

    @property
    def head(self) -> Tensor:
        return self.module.embedding.weight

    def texts(self, rollout: Rollout) -> list[str]:
        return ["".join(letters).removesuffix(END) for letters in self.tokens(rollout)]

    def tokens(self, rollout: Rollout) -> list[list[str]]:
        return [[LETTERS[i] for i in answer] for answer in rollout.answers()]

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], answers: int, *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Rollout:
        device = self.head.device
        prompt_ids, prompt_mask = (x.to(device).repeat_interleave(answers, dim=0) for x in encode(prompts))
        prompt_length = prompt_ids.shape[1]
        known = MAX_POSITIONS - prompt_length
        if max_new_tokens > known:
            raise ValueError(
                f"max_new_tokens must be at most {known} after a prompt of {prompt_length} letters, "
                f"as the tiny model knows {MAX_POSITIONS} positions, got {max_new_tokens}"
            )
        # Numbers of a prompt's own seed: a row's samples do not depend on the other rows of the batch.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        of_prompts = [torch.rand(answers, max_new_tokens, generator=g, dtype=torch.float64) for g in generators]
        uniform = torch.cat(of_prompts).to(device)

        cache: Cache = {}
        sequences, mask, new_ids = prompt_ids, prompt_mask, prompt_ids
        alive = torch.ones(len(prompt_ids), 1, dtype=torch.bool, device=device)
        for place in range(max_new_tokens):
            logits = self.module.states(new_ids, mask, cache)[:, -1] @ self.head.T
            new_ids = torch.where(alive, _pick(logits, temperature, uniform[:, place])[:, None], PAD_ID)
            sequences = torch.cat((sequences, new_ids), dim=1)
            mask = torch.cat((mask, alive.long()), dim=1)
            alive = alive & (new_ids != END_ID)
            if not alive.any():
                break
        return Rollout(sequences, mask, prompt_length, mask[:, prompt_length:].bool())


def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, int64 [B, P], padded on the left.

    Raises:
        ValueError: a letter that the tiny model does not have.
    """
    if unknown := {letter for text in texts for letter in text} - TOKEN.keys():
        raise ValueError(
            f"prompts must be of the letters {ALPHABET} for the tiny model, got {''.join(sorted(unknown))!r}"
        )
    width = max(map(len, texts))
    ids = torch.tensor([[PAD_ID] * (width - len(text)) + [TOKEN[letter] for letter in text] for text in texts])
    return ids, (ids != PAD_ID).long()


def _pick(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Invert the distribution function at uniform [B] in [0, 1); at temperature 0 take the likeliest token."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    return (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
