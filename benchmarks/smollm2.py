"""The demo's model and answers that it samples itself, for what is measured on real hidden states and real steps."""

import functools

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paec_kernels.demo import model, rollout
from paec_kernels.demo.questions import QUESTIONS, messages

MAX_NEW_TOKENS = 48


@functools.cache
def sampled(device: str, answers: int) -> tuple[PreTrainedModel, rollout.Rollout]:
    """SmolLM2-135M-Instruct in float32, and ``answers`` to each of the demo's questions."""
    torch.manual_seed(0)
    policy, tokenizer = model.load(torch.device(device))
    chats = [messages(question) for question in QUESTIONS]
    found = rollout.sample(policy, tokenizer, chats, answers, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0)
    return policy, found


def hidden_states(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU, float32: hidden states ``[n, 576]`` of sampled tokens, the head ``[49152, 576]``, the tokens."""
    policy, answers = sampled("cpu", answers=-(-n // 64))
    with torch.no_grad():
        hidden = rollout.answer_hidden(policy, answers)[answers.valid]
    if len(hidden) < n:
        raise ValueError(f"the model stopped after {len(hidden)} tokens, {n} were asked for")
    return hidden[:n].clone(), policy.lm_head.weight.detach().clone(), answers.token_ids[answers.valid][:n].clone()
