"""SmolLM2-135M's own answers, for what is measured on real hidden states and in real steps."""

import functools

import torch
from torch import Tensor

from paec_kernels.train.models.hugging_face import HFPolicy, load
from paec_kernels.train.presets import PRESETS
from paec_kernels.train.tasks.by_name import load_tasks

MAX_NEW_TOKENS = 48
TOKENS_OF_AN_ANSWER = 12  # at least, on average


@functools.cache
def policy(device: str) -> HFPolicy:
    return load("smollm2", torch.device(device))


def hidden_states(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states ``[n, 576]`` of sampled tokens, the head ``[49152, 576]``, the ids; float32 on a CPU."""
    model, ((task, *_), _) = policy("cpu"), load_tasks(PRESETS["smollm2"].tasks)
    places = range(-(-n // TOKENS_OF_AN_ANSWER))
    prompts = [task.train_problem(place).prompt for place in places]
    answers = model.sample(prompts, 1, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seeds=list(places))
    with torch.no_grad():
        hidden = model.module(answers.sequences, answers.attention_mask, answers.prompt_length)[answers.valid]
    if len(hidden) < n:
        raise ValueError(f"the model stopped after {len(hidden)} tokens, {n} were asked for")
    return hidden[:n].clone(), model.head.detach().clone(), answers.token_ids[answers.valid][:n].clone()
