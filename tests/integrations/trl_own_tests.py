"""TRL's own tests of GRPOTrainer, with the stock trainer and with PAEC's in its place, as a table.

    PYTHONPATH=tests python -m integrations.trl_own_tests REPOSITORY --out bench_results/trust/trl.json

REPOSITORY is a copy of https://github.com/huggingface/trl, best at the tag of the installed version; the installed trl
is what is tested. No network is needed: the tiny models and the datasets that the tests take from the Hugging Face hub
are made by the scripts of that repository, with tokenizers and configurations made here in place of those that the
scripts download. What cannot be made here is left out, and named. GPUs are hidden, so that the table is the same on
every machine; what needs one is skipped, and named too.

It fails where a test passes with the stock trainer alone, and where too little ran to tell: see `shortcomings`.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import datasets
import transformers
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from paec_kernels.saved_state import write_json

PACKAGE = Path(__file__).parents[2]
TESTS = Path(__file__).parents[1]
REVISION = "0" * 40

# By the scripts' own names. Those of models that no test of GRPOTrainer takes are not run.
SCRIPTS = [
    *("for_causal_lm." + name for name in (
        "cohere2_for_causal_lm", "gemma2_for_causal_lm", "glm4_moe_for_causal_lm", "gpt_oss_for_causal_lm",
        "llama_for_causal_lm_3_2", "mistral_for_causal_lm_0_2", "nemotron_3_nano_for_causal_lm",
        "qwen2_for_causal_lm_2_5", "qwen3_for_causal_lm", "qwen3_moe_for_causal_lm", "remote_for_causal_lm",
    )),
    *("for_sequence_classification." + name for name in (
        "llama_for_sequence_classification_3_2", "qwen2_for_sequence_classification_2_5",
        "qwen3_for_sequence_classification",
    )),
]  # fmt: skip

# Qwen's ids, which the tests write where they stand in for generation, and what the tests say there that these mean.
# Here they are the last ids of a vocabulary of some 300: with 150,000 the tests would take hours on a CPU.
WORDS = {
    4913: '{"', 606: "name", 788: '":', 330: ' "', 64648: "multiply", 22785: "_tool", 497: '",', 16370: "arguments",
    5212: ' {"', 11248: "}}\n", 7692: "async", 93054: "_multiply", 1513: " don", 944: "'t", 1414: " know", 894: " any",
    5392: " tool", 17453: "Done", 35744: "increment", 9520: "step", 2765: " won", 927: "sh", 411: "out", 1318: "text",
    6023: "hi", 95642: '"}}\n', 450: "dec", 13477: "rement", 16252: " increment", 14172: "tool", 6659: "call",
    397: ">\n", 522: "</", 314: " {", 293: " b",
}  # fmt: skip
SPECIAL = {
    151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151657: "<tool_call>",
    151658: "</tool_call>", 151665: "<tool_response>", 151666: "</tool_response>", 151667: "<think>",
    151668: "</think>",
}  # fmt: skip
SPOKEN = tuple(SPECIAL.values())[3:]  # kept where special tokens are left out of a text
IDS = {qwens: 256 + i for i, qwens in enumerate([*WORDS, *SPECIAL])}
TEMPLATES = {"Qwen/Qwen2.5": "qwen2_5", "Qwen/Qwen3": "qwen3", "meta-llama/Llama-3.2": "llama3_2"}
CONFIGS = {"Qwen/Qwen2.5": "Qwen2Config", "Qwen/Qwen3": "Qwen3Config", "meta-llama": "LlamaConfig"}

# Of the tests that are not skipped: those of TRL 1.10 are 130, of which the stock trainer of 1.16 passed 118.
LEAST_PASSED = 0.5
NOT_RUN = ("not run", "not run")


def by_prefix(table: dict[str, str], model_id: str, otherwise: str = "") -> str:
    return next((value for prefix, value in table.items() if model_id.startswith(prefix)), otherwise)


def tokenizer(model_id: str, **_) -> PreTrainedTokenizerFast:
    """Bytes, the tests' own words and the special tokens at Qwen's ids; the chat template is TRL's for the model."""
    spelling = letters_of_bytes()
    spelled = {i: "".join(spelling[byte] for byte in word.encode()) for i, word in WORDS.items()}
    letters = {letter: i for i, letter in enumerate(sorted(spelling))}
    backend = Tokenizer(models.BPE(letters | {word: IDS[i] for i, word in spelled.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, special=name not in SPOKEN, normalized=False) for name in SPECIAL.values()])
    template = Path(trl.__file__).parent / "chat_templates" / f"{by_prefix(TEMPLATES, model_id, 'qwen2_5')}.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        model_max_length=32768, chat_template=template.read_text(),
    )  # fmt: skip


def letters_of_bytes() -> list[str]:
    """The letter by which a byte-level tokenizer spells each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def generation_config(model_id: str, **_) -> GenerationConfig:
    return GenerationConfig(eos_token_id=[IDS[151645], IDS[151643]], pad_token_id=IDS[151643])


def config(model_id: str, **options):
    return getattr(transformers, by_prefix(CONFIGS, model_id))(vocab_size=256 + len(IDS), **options)


def make_hub(repository: Path, hub: Path) -> dict[str, str]:
    """Run the repository's scripts, with the hub replaced by a folder; return why those failed that did."""
    failed = {}
    with scripts_of(repository, hub):
        for script in SCRIPTS:
            try:
                importlib.import_module(f"generate_tiny_models.{script}")
            except Exception as error:
                failed[script] = f"{type(error).__name__}: {error}".split("\n")[0]
        for script in ("generate_zen_dataset", "generate_zen_image_dataset", "generate_zen_multi_image_dataset"):
            module = importlib.import_module(script)
            name = script.removeprefix("generate_").removesuffix("_dataset").replace("_", "-")
            module.main(test_size=0.1, push_to_hub=True, repo_id=f"trl-internal-testing/{name}")
    return failed


@contextlib.contextmanager
def scripts_of(repository: Path, hub: Path) -> Iterator[None]:
    """Let the repository's scripts be imported, which run by that; what they would upload is written to ``hub``."""

    def save_model(model, tokenizer, generation_config, prefix=None, suffix=None, **_) -> None:
        name = "-".join(part for part in (prefix, type(model).__name__, suffix) if part)
        folder = hub / "hub" / f"models--trl-internal-testing--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        model.resize_token_embeddings(256 + len(IDS))  # where a script has left it a default
        for part in (model, tokenizer, generation_config):
            if part is not None:
                part.save_pretrained(folder / "snapshots" / REVISION)

    def save_dataset(dataset, repo_id: str, config_name: str = "default") -> None:
        if config_name.endswith("prompt_only"):  # what GRPOTrainer takes
            dataset.save_to_disk(str(hub / "datasets" / repo_id / config_name))

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(sys, "path", [str(repository / "scripts"), *sys.path]))
        patches.enter_context(mock.patch("datasets.DatasetDict.push_to_hub", save_dataset))
        for name, made in (
            ("AutoTokenizer", tokenizer), ("GenerationConfig", generation_config), ("AutoConfig", config),
        ):  # fmt: skip
            patches.enter_context(mock.patch(f"transformers.{name}.from_pretrained", made))
        common = importlib.import_module("generate_tiny_models._common")
        common.push_to_hub = save_model
        for name in ("check_transformers_version", "check_dtype_pattern", "print_config_diff"):
            setattr(common, name, lambda *_, **__: None)
        yield


def rewrite_ids(tests: Path) -> None:
    """Replace Qwen's ids by those of the tokenizers made here, in the lists of ids that the tests write."""

    def ours(line: re.Match) -> str:
        return re.sub(r"\d+", lambda found: str(IDS.get(int(found[0]), found[0])), line[0])

    tests.write_text(re.sub(r"^ *\[[\d, ]+\]", ours, tests.read_text(), flags=re.MULTILINE))


def run(trainer: str, tests: Path, hub: Path, selected: list[str]) -> tuple[int, dict[str, tuple[str, str]]]:
    """Pytest's exit status, and the outcome and reason of each test by name."""
    report = tests.parent / f"{trainer}.xml"
    environment = os.environ | {
        "TRL_OWN_TESTS_HUB": str(hub), "TRL_OWN_TESTS_TRAINER": trainer, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [
        *(sys.executable, "-m", "pytest", "-p", "integrations.trl_own_tests_plugin", "tests/test_grpo_trainer.py"),
        *("-q", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore", f"--junitxml={report}", *selected),
    ]
    status = subprocess.run(command, cwd=tests.parent, env=environment, check=False).returncode
    outcomes: dict[str, tuple[str, str]] = {}
    for case in ET.parse(report).iter("testcase") if report.exists() else ():
        name = f"{case.get('classname').split('.')[-1]}::{case.get('name')}"
        outcome, reason = "passed", ""
        for kind in ("failure", "error", "skipped"):
            for found in case.iter(kind):
                outcome = "skipped" if kind == "skipped" else "failed"
                reason = re.sub(r"\s+", " ", found.get("message") or found.text or "")[:300]
        outcomes[name] = (outcome, reason)
    return status, outcomes


def table(stock: dict[str, tuple[str, str]], ours: dict[str, tuple[str, str]]) -> dict:
    passed = [name for name, (outcome, _) in stock.items() if outcome == "passed"]
    return {
        "tests": len(stock),
        "passed_by_stock": len(passed),
        "passed_by_ours": sum(outcome == "passed" for outcome, _ in ours.values()),
        "passed_by_stock_alone": {
            name: reason for name in passed for outcome, reason in [ours.get(name, NOT_RUN)] if outcome != "passed"
        },
        "skipped": {name: reason for name, (outcome, reason) in stock.items() if outcome == "skipped"},
        "failed_by_stock": {name: reason for name, (outcome, reason) in stock.items() if outcome == "failed"},
    }


def shortcomings(found: dict) -> list[str]:
    """Say what keeps the table from showing that PAEC's trainer does what the stock one does."""
    ran, passed = found["tests"] - len(found["skipped"]), found["passed_by_stock"]
    said = [
        f"pytest ended with status {status} with the trainer {trainer}"
        for trainer, status in found["pytest_status"].items()
        if status not in (0, 1)
    ]
    if passed == 0 or passed < LEAST_PASSED * ran:
        said.append(f"the stock trainer passed {passed} of the {ran} tests that were not skipped")
    if found["models_not_made"]:
        said.append(f"{len(found['models_not_made'])} models were not made")
    if found["passed_by_stock_alone"]:
        said.append(f"{len(found['passed_by_stock_alone'])} tests passed with the stock trainer alone")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description="TRL's own tests of GRPOTrainer with PAECGRPOTrainer in its place")
    parser.add_argument("repository", type=Path, help="a copy of TRL's repository")
    parser.add_argument("--out", type=Path, help="a JSON file for the table")
    parser.add_argument("-k", dest="selected", help="only tests that match, as pytest takes it")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    tests_version = (options.repository / "VERSION").read_text().strip()
    with tempfile.TemporaryDirectory() as name:
        hub, copy = Path(name) / "hub", Path(name) / "copy"
        failed = make_hub(options.repository, hub)
        # Beside the tests stands TRL's source, which must not be imported in place of the installed package.
        shutil.copytree(options.repository / "tests", copy / "tests")
        rewrite_ids(copy / "tests" / "test_grpo_trainer.py")
        selected = ["-k", options.selected] if options.selected else []
        with ThreadPoolExecutor() as both:
            runs = both.map(lambda trainer: run(trainer, copy / "tests", hub, selected), ("stock", "ours"))
            (stock_status, stock), (our_status, ours) = runs
    names = ("trl", "transformers", "accelerate", "peft", "torch", "datasets")
    found = {
        "versions": {name: version(name) for name in names},
        "tests_are_of_trl": tests_version,
        "models_not_made": failed,
        "pytest_status": {"stock": stock_status, "ours": our_status},
        **table(stock, ours),
    }
    print(json.dumps(found, indent=1))
    if options.out:
        from benchmarks.provenance import provenance  # reads which files are loaded, so last

        write_json(options.out, provenance() | found)
    for text in shortcomings(found):
        print(text, file=sys.stderr)
    return int(bool(shortcomings(found)))


if __name__ == "__main__":
    sys.exit(main())
