"""Writes rows of next-token logits of SmolLM2-135M-Instruct, for the tests, and how often each stands for the rest.

    .venv/bin/python tests/data/make_real_logits.py

The model answers short maths questions at temperature 1.

real_logits.pt            ``logits`` (bfloat16 [32, 49152]) and ``token_ids`` (int64 [32], the tokens sampled there):
                          positions kept so that the nucleus (top_p 0.95) ranges from one token to thousands, and many
                          rows tie at its threshold. Tests know these rows, so that a file that is there is kept.
real_logits_shares.json   for each row, the share of all sampled positions whose nucleus size is nearest to its own on
                          a log scale (rows of one size halve theirs); and, of those positions, how many they are
                          and what their nuclei are like.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from paec_kernels.train.models import smollm2
from paec_kernels.train.models.hugging_face import HiddenStates

HERE = Path(__file__).parent
ROWS, SHARES = HERE / "real_logits.pt", HERE / "real_logits_shares.json"
PROMPTS = (
    "What is 17 + 25?",
    "Tom has 12 apples and gives 5 away. How many are left? Think step by step.",
    "What is the sum of the first five odd numbers? Explain briefly.",
    "If 3x + 4 = 19, what is x?",
)
# Ahead of these four stand two worked examples.
EXAMPLES = (
    (
        "Mia has 6 pens and buys 5 more. How many pens does she have?",
        "She starts with 6 pens and adds 5, and 6 + 5 = 11. The answer is 11.",
    ),
    ("What is 4 * 3?", "4 * 3 means three fours, and 4 + 4 + 4 = 12. The answer is 12."),
)
PROMPTS_AFTER_EXAMPLES = (
    "What is 9 + 6?",
    "What is 6 * 7?",
    "A box holds 4 pens. How many pens do 3 boxes hold?",
    "What is 5 * 3?",
)
ANSWERS = 4  # to each
TOP_P = 0.95
ROWS_BY_SIZE, ROWS_BY_TIES, SMALL_NUCLEUS = 22, 10, 100


def nuclei(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Count each row's nucleus, and the tokens that tie at its threshold; [N]."""
    parts = [_nuclei(part) for part in logits.split(64)]
    size, n_tied = (torch.cat(column) for column in zip(*parts, strict=True))
    return size, n_tied


def _nuclei(logits: Tensor) -> tuple[Tensor, Tensor]:
    sorted_logits = logits.float().sort(dim=-1, descending=True).values
    size = (sorted_logits.softmax(-1).cumsum(-1) < TOP_P).sum(-1) + 1
    threshold = sorted_logits.gather(-1, size[:, None] - 1)
    return size, (sorted_logits == threshold).sum(-1)


def choose(size: Tensor, n_tied: Tensor) -> Tensor:
    """32 row indices: nucleus sizes even on a log scale, then the small nuclei with most tokens tied."""
    chosen: list[int] = []
    for log_size in torch.linspace(0, float(size.max().log()), ROWS_BY_SIZE):
        distance = (size.log() - log_size).abs()
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
    others = torch.where(size < SMALL_NUCLEUS, n_tied, 0)
    others[chosen] = 0
    chosen += others.topk(ROWS_BY_TIES).indices.tolist()
    print(f"nucleus sizes {sorted(size[chosen].tolist())}")
    print(f"tokens tied at the threshold {sorted(n_tied[chosen].tolist())}")
    return torch.tensor(chosen)


def shares_of(row_size: Tensor, size: Tensor) -> Tensor:
    """The share of positions, of nucleus sizes ``size`` [N], that each row stands for; float64, sums to 1."""
    distance = (size.double().log()[:, None] - row_size.double().log()).abs()  # [N, 32]
    nearest = (distance == distance.min(dim=1, keepdim=True).values).double()
    return (nearest / nearest.sum(dim=1, keepdim=True)).mean(0)


def chats() -> list[list[dict[str, str]]]:
    """Return the conversations whose next turn is the model's."""
    examples = [turn("user", asked) + turn("assistant", answered) for asked, answered in EXAMPLES]
    ahead = [message for example in examples for message in example]
    return [turn("user", prompt) for prompt in PROMPTS] + [ahead + turn("user", p) for p in PROMPTS_AFTER_EXAMPLES]


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Tensor, Tensor]:
    """Answer each chat: logits bfloat16 [N, 49152] at the answers' positions, and the tokens sampled there [N]."""
    torch.manual_seed(seed)
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats()]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    length = inputs["input_ids"].shape[1]
    ends = sorted({tokenizer.eos_token_id, model.generation_config.eos_token_id})
    settings = GenerationConfig(
        max_new_tokens=64, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends
    )
    sequences = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
    )
    answers = sequences[:, length:]
    is_end = torch.isin(answers, torch.tensor(ends))
    valid = is_end.cumsum(1) - is_end.long() == 0
    hidden = HiddenStates(model)(sequences, torch.cat([inputs["attention_mask"], valid.long()], dim=1), length)
    return model.lm_head(hidden[valid]).bfloat16(), answers[valid]


def main() -> None:
    model, tokenizer = smollm2.load(torch.device("cpu"))
    sampled = [sample(model, tokenizer, seed) for seed in range(ANSWERS)]
    logits, token_ids = (torch.cat(parts) for parts in zip(*sampled, strict=True))
    size, n_tied = nuclei(logits)
    if not ROWS.exists():
        chosen = choose(size, n_tied)
        torch.save({"logits": logits[chosen].clone(), "token_ids": token_ids[chosen].clone()}, ROWS)
        print(f"wrote {ROWS}, {ROWS.stat().st_size / 2**20:.1f} MiB")
    write_shares(size)


def write_shares(size: Tensor) -> None:
    row_size, _ = nuclei(torch.load(ROWS, weights_only=True)["logits"])
    found = {
        "positions": len(size),
        "median_nucleus": int(size.median()),
        "largest_nucleus": int(size.max()),
        "share_below_64": (size < 64).double().mean().item(),
        "row_nuclei": row_size.tolist(),
        "row_shares": shares_of(row_size, size).tolist(),
    }
    SHARES.write_text(json.dumps(found, indent=2) + "\n")
    print(f"wrote {SHARES}: {found}")


if __name__ == "__main__":
    main()
