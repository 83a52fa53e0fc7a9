"""Writes real_logits.pt: 32 rows of next-token logits of SmolLM2-135M-Instruct, for the tests.

    .venv/bin/python tests/data/make_real_logits.py

The model answers short maths questions at temperature 1; 32 of its 1,437 positions are kept so that the
nucleus (top_p 0.95) ranges from one token to thousands, and many rows tie at the nucleus' threshold. The
file holds ``logits`` (bfloat16 [32, 49152]) and ``token_ids`` (int64 [32], the tokens sampled there).
"""

from pathlib import Path

import torch
from torch import Tensor

from paec_kernels.demo import model as smollm2
from paec_kernels.demo import questions, rollout

PROMPTS = (
    "What is 17 + 25?",
    "Tom has 12 apples and gives 5 away. How many are left? Think step by step.",
    "What is the sum of the first five odd numbers? Explain briefly.",
    "If 3x + 4 = 19, what is x?",
)
ROWS_BY_SIZE, ROWS_BY_TIES, SMALL_NUCLEUS = 22, 10, 100


def choose(logits: Tensor) -> Tensor:
    """32 row indices: nucleus sizes even on a log scale, then the small nuclei with most tokens tied."""
    sorted_logits = logits.float().sort(dim=-1, descending=True).values
    size = (sorted_logits.softmax(-1).cumsum(-1) < 0.95).sum(-1) + 1  # [N]
    threshold = sorted_logits.gather(-1, size[:, None] - 1)
    n_tied = (sorted_logits == threshold).sum(-1)

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


def main() -> None:
    torch.manual_seed(0)
    model, tokenizer = smollm2.load(torch.device("cpu"))
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    chats += [questions.messages(question) for question in questions.QUESTIONS]
    answers = rollout.sample(model, tokenizer, chats, answers=4, max_new_tokens=64, temperature=1.0)
    with torch.no_grad():
        logits = rollout.answer_logits(model, answers)[answers.valid].bfloat16()  # [N, 49152]
    token_ids = answers.token_ids[answers.valid]
    print(f"{len(logits)} positions")
    chosen = choose(logits)
    path = Path(__file__).parent / "real_logits.pt"
    torch.save({"logits": logits[chosen].clone(), "token_ids": token_ids[chosen].clone()}, path)
    print(f"wrote {path}, {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
