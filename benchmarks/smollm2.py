"""The demo's model and answers that it samples itself, for what is measured on real hidden states and real steps."""

import functools
from itertools import cycle, islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paec_kernels.demo import rollout
from paec_kernels.demo.questions import QUESTIONS, messages
from paec_kernels.train.models import smollm2

MAX_NEW_TOKENS = 48
TOKENS_OF_AN_ANSWER = 12  # at least, on average


def sampled(device: str, answers: int) -> tuple[PreTrainedModel, rollout.Rollout]:
    """SmolLM2-135M-Instruct in float32, and so many answers to the demo's questions, each in its turn."""
    policy, tokenizer = _model(device)
    chats = [messages(question) for question in islice(cycle(QUESTIONS), answers)]
    torch.manual_seed(0)
    return policy, rollout.sample(policy, tokenizer, chats, 1, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0)


@functools.cache
def _model(device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return smollm2.load(torch.device(device))


def hidden_states(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU, float32: hidden states ``[n, 576]`` of sampled tokens, the head ``[49152, 576]``, the tokens."""
    policy, answers = sampled("cpu", answers=-(-n // TOKENS_OF_AN_ANSWER))
    with torch.no_grad():
        hidden = rollout.answer_hidden(policy, answers)[answers.valid]
    if len(hidden) < n:
        raise ValueError(f"the model stopped after {len(hidden)} tokens, {n} were asked for")
    return hidden[:n].clone(), policy.lm_head.weight.detach().clone(), answers.token_ids[answers.valid][:n].clone()
