"""The policy on tiny random models of Hugging Face: sampling, hidden states, head, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from paec_kernels.saved_state import write_saved
from paec_kernels.train.config import TrainConfig, plain
from paec_kernels.train.models.hugging_face import HFPolicy, load
from paec_kernels.train.models.policy import Policy, Rollout
from paec_kernels.train.policies import autocast_dtype, starting_policy, trained_policy

WORDS = ["<pad>", "<bos>", "<end>", "<turn>", *"abcdefghijklmnop"]
PAD, BOS, END, TURN = range(4)
CHAT_TEMPLATE = (
    "{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<turn>{% endif %}"
)
PROMPTS = ("abc", "d", "efgh")
SEEDS = (11, 22, 33)


def make_tokenizer(chat_template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """A letter a token; <bos> ahead of plain text, as Llama's has."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="p"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    inner.add_special_tokens(WORDS[:4])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<end>", padding_side="left"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(tied: bool = False, **changed) -> transformers.PreTrainedModel:
    """Large random weights, so that what it says depends on what it reads."""
    config = transformers.LlamaConfig(
        **{
            "vocab_size": len(WORDS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
            "tie_word_embeddings": tied,
            "eos_token_id": END,
            "bos_token_id": BOS,
            "pad_token_id": PAD,
        }
        | changed
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def policy(request: pytest.FixtureRequest) -> HFPolicy:
    return HFPolicy(make_model(tied=request.param), make_tokenizer())


def draw(policy: Policy, prompts=PROMPTS, answers: int = 3, seeds=SEEDS, **changed) -> Rollout:
    options = {"max_new_tokens": 8, "temperature": 1.0} | changed
    return policy.sample(prompts, answers, seeds=seeds, **options)


def hidden(policy: Policy, rollout: Rollout) -> torch.Tensor:
    return policy.module(rollout.sequences, rollout.attention_mask, rollout.prompt_length)


def test_a_rollouts_shape(policy: HFPolicy) -> None:
    rollout = draw(policy)
    p = 5  # <bos> and the longest prompt
    assert rollout.prompt_length == p
    assert rollout.sequences.shape == rollout.attention_mask.shape
    assert rollout.valid.shape == rollout.token_ids.shape == (9, rollout.sequences.shape[1] - p)
    prompts = [[BOS, 4, 5, 6], [BOS, 7], [BOS, 8, 9, 10, 11]]
    for row, ids in enumerate(prompt for prompt in prompts for _ in range(3)):
        assert rollout.sequences[row, :p].tolist() == [PAD] * (p - len(ids)) + ids
        assert rollout.attention_mask[row, :p].tolist() == [0] * (p - len(ids)) + [1] * len(ids)
        answer, valid = rollout.token_ids[row].tolist(), rollout.valid[row].tolist()
        length = answer.index(END) + 1 if END in answer else len(answer)
        assert valid == [True] * length + [False] * (len(answer) - length)
        assert rollout.attention_mask[row, p:].bool().tolist() == valid
        assert policy.texts(rollout)[row] == " ".join(WORDS[i] for i in answer[:length] if i > TURN)
        assert policy.tokens(rollout)[row] == [WORDS[i] for i in answer[:length]]
    assert (rollout.token_ids == END).any(), "no answer ended, so nothing was tested"
    assert not rollout.valid.all()


def test_sampling_depends_on_nothing_but_its_arguments(policy: HFPolicy) -> None:
    rollout = draw(policy)
    torch.rand(7)
    before = torch.get_rng_state()
    assert draw(policy).sequences.equal(rollout.sequences)
    assert torch.get_rng_state().equal(before)
    assert not draw(policy, seeds=(1, 2, 3)).sequences.equal(rollout.sequences)
    alone = policy.texts(draw(policy, PROMPTS[1:2], seeds=SEEDS[1:2]))
    assert alone == policy.texts(rollout)[3:6]  # whatever else is in the batch
    assert len(set(alone)) > 1  # a prompt's answers differ


def test_samples_follow_the_softmax() -> None:
    policy = HFPolicy(make_model(initializer_range=0.15), make_tokenizer())
    n, temperature = 20_000, 0.7
    first = draw(policy, ["ab"], n, seeds=[5], max_new_tokens=1, temperature=temperature).token_ids[:, 0]
    with torch.no_grad():
        logits = policy.module.model(torch.tensor([[BOS, 4, 5]])).logits[0, -1]
    p = (logits / temperature).softmax(0)
    frequency = first.bincount(minlength=len(WORDS)) / n
    assert ((frequency - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1e-6).all()
    assert p.max() < 0.6, "too peaked to test anything"


def test_greedy_is_the_likeliest_token(policy: HFPolicy) -> None:
    rollout = draw(policy, answers=1, temperature=0.0)
    assert draw(policy, answers=1, temperature=0.0, seeds=(1, 2, 3)).sequences.equal(rollout.sequences)
    logits = hidden(policy, rollout) @ policy.head.T
    assert logits.argmax(-1)[rollout.valid].equal(rollout.token_ids[rollout.valid])


def absolute_positions() -> transformers.PreTrainedModel:
    """Unlike Llama's, its states change where padding moves a token."""
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=END
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [make_model, absolute_positions])
def test_hidden_states_and_head_give_the_models_logits_whatever_the_padding(make) -> None:
    policy = HFPolicy(make(), make_tokenizer())
    rollout = draw(policy)
    logits = hidden(policy, rollout) @ policy.head.T
    for row in range(9):
        read = rollout.attention_mask[row].bool()
        alone = policy.module.model(rollout.sequences[row : row + 1, read]).logits[0]
        length = int(rollout.valid[row].sum())
        torch.testing.assert_close(logits[row, :length], alone[-length - 1 : -1], rtol=1e-4, atol=1e-4)


def test_the_module_holds_every_parameter(policy: HFPolicy) -> None:
    rollout = draw(policy)
    (hidden(policy, rollout) @ policy.head.T).logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.module.parameters())
    assert any(parameter is policy.head for parameter in policy.module.parameters())
    assert not policy.module.training


def test_the_models_own_generation_settings_are_not_inherited() -> None:
    model = make_model()
    plain = policy_texts(model)
    model.generation_config = transformers.GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, top_k=1, eos_token_id=END
    )
    assert policy_texts(model) == plain


def policy_texts(model: transformers.PreTrainedModel) -> list[str]:
    policy = HFPolicy(model, make_tokenizer())
    return [text for t in (0.0, 1.0) for text in policy.texts(draw(policy, temperature=t))]


def test_every_end_token_of_the_model_ends_an_answer() -> None:
    model = make_model()
    model.generation_config.eos_token_id = end_ids = [END, WORDS.index("c"), WORDS.index("d")]
    policy = HFPolicy(model, make_tokenizer())
    rollout = draw(policy, answers=20)
    assert (rollout.token_ids[~rollout.valid] == PAD).all()
    assert not any({"c", "d"} & set(text) for text in policy.texts(rollout))
    assert {answer[-1] for answer in rollout.answers() if len(answer) < 8} == set(end_ids)
    assert not any(set(end_ids) & set(answer[:-1]) for answer in rollout.answers())


@pytest.mark.parametrize(("chat", "expected"), [(None, [TURN, 7, TURN]), (True, [TURN, 7, TURN]), (False, [BOS, 7])])
def test_prompts_go_into_the_chat_template(chat: bool | None, expected: list[int]) -> None:
    policy = HFPolicy(make_model(), make_tokenizer(CHAT_TEMPLATE), chat=chat)
    rollout = draw(policy, ["d"], seeds=[1])
    assert rollout.sequences[0, : rollout.prompt_length].tolist() == expected


def test_sampling_dtype() -> None:
    model = make_model()
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    policy = HFPolicy(model, make_tokenizer(), sampling_dtype=torch.bfloat16)
    seen.clear()
    draw(policy)
    assert set(seen) == {torch.bfloat16}
    assert policy.head.dtype == torch.float32


@pytest.mark.parametrize("kind", ["softcap", "scale", "bias"])
def test_logits_that_are_more_than_a_product_are_refused(kind: str) -> None:
    if kind == "softcap":
        size = {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = transformers.Gemma2Config(
            vocab_size=20, hidden_size=32, intermediate_size=48, final_logit_softcapping=5.0, **size
        )
        model: transformers.PreTrainedModel = transformers.Gemma2ForCausalLM(config)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    elif kind == "scale":
        config = transformers.GraniteConfig(
            vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=1, logits_scaling=4.0
        )
        model = transformers.GraniteForCausalLM(config)
    else:
        model = make_model()
        model.lm_head.bias = torch.nn.Parameter(torch.ones(len(WORDS)))
    with pytest.raises(ValueError, match=r"model must have logits that are hidden @ head.T, got \w+ForCausalLM"):
        HFPolicy(model, make_tokenizer())


def test_bad_input_is_refused() -> None:
    policy = HFPolicy(make_model(max_position_embeddings=12), make_tokenizer())
    with pytest.raises(ValueError, match=r"max_new_tokens must be at most 7 after a prompt of 5 tokens.* got 8"):
        draw(policy)
    draw(policy, max_new_tokens=7)
    with pytest.raises(ValueError, match="seeds must be one for each of the 3 prompts, got 1"):
        draw(policy, seeds=(1,))
    with pytest.raises(ValueError, match="chat must be False for a tokenizer without a chat template, got True"):
        HFPolicy(make_model(), make_tokenizer(), chat=True)


def test_a_folder_is_loaded_in_float32(tmp_path: Path) -> None:
    model = make_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path)
    policy = load(str(tmp_path), torch.device("cpu"))
    assert {parameter.dtype for parameter in policy.module.parameters()} == {torch.float32}
    assert policy.chat
    assert policy.texts(draw(policy)) == policy.texts(draw(HFPolicy(model.float(), make_tokenizer(CHAT_TEMPLATE))))


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ({"chat": None}, "chat", True),
        ({"chat": True}, "chat", True),
        ({"chat": False}, "chat", False),
        ({"precision": "auto"}, "sampling_dtype", None),
        ({"precision": "float32"}, "sampling_dtype", None),
        ({"precision": "bfloat16"}, "sampling_dtype", torch.bfloat16),
    ],
)
def test_a_run_and_its_checkpoint_sample_alike(tmp_path: Path, options: dict, name: str, expected: object) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "model")
    config = TrainConfig(model=str(tmp_path / "model"), **options)
    policy = starting_policy(config, torch.device("cpu"))
    assert getattr(policy, name) is expected
    write_saved(tmp_path / "checkpoint.pt", {"model": policy.module.state_dict()})
    (tmp_path / "config.json").write_text(json.dumps(plain(config)))
    assert getattr(trained_policy(tmp_path, torch.device("cpu")), name) is expected


@pytest.mark.parametrize(("precision", "expected"), [("auto", torch.bfloat16), ("float32", None)])
def test_a_gpu_with_bfloat16_uses_it_unless_told_otherwise(
    monkeypatch, precision: str, expected: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert autocast_dtype(precision, torch.device("cuda")) is expected


def test_a_name_of_nothing_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=f"model must be the id or the folder .* got '{missing}'"):
        load(missing, torch.device("cpu"))


def without(*names: str) -> transformers.PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    for name in names:
        setattr(tokenizer, name, None)
    return tokenizer


def make_model_naming(generation: object = None, config: object = None) -> transformers.PreTrainedModel:
    """A model whose generation settings and whose config name these tokens to end an answer."""
    model = make_model(eos_token_id=config, pad_token_id=None)
    model.generation_config = transformers.GenerationConfig(eos_token_id=generation)
    return model


@pytest.mark.parametrize(
    ("generation", "config", "end_ids"),
    [(END, None, [END]), ([END, 7], None, [END, 7]), (None, END, [END]), (None, [END, 7], [END, 7]), (7, END, [7])],
)
def test_a_tokenizer_without_special_tokens_takes_the_models(generation, config, end_ids: list[int]) -> None:
    tokenizer = without("pad_token", "eos_token", "bos_token")
    policy = HFPolicy(make_model_naming(generation, config), tokenizer)
    rollout = draw(policy, answers=20)
    assert {answer[-1] for answer in rollout.answers() if len(answer) < 8} <= set(end_ids)
    assert any(answer[-1] in end_ids for answer in rollout.answers())
    assert (rollout.token_ids[~rollout.valid] == end_ids[0]).all()
    again = HFPolicy(policy.module.model, tokenizer)  # what it needs is kept
    assert draw(again, answers=20).sequences.equal(rollout.sequences)


@pytest.mark.parametrize("named", [None, -1, len(WORDS), [len(WORDS), -1]])
def test_a_model_whose_answers_cannot_end_is_refused(named) -> None:
    with pytest.raises(ValueError, match=r"must name a token that ends an answer, .* among the model's 20, got "):
        HFPolicy(make_model_naming(named), without("pad_token", "eos_token"))


def test_a_pad_token_that_the_model_does_not_have_is_not_used() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == len(WORDS)
    rollout = draw(HFPolicy(make_model(), tokenizer))
    assert rollout.sequences.max() < len(WORDS)


def test_the_tokenizers_side_of_padding_does_not_matter() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    left = draw(HFPolicy(model, tokenizer))
    tokenizer.padding_side = "right"
    assert draw(HFPolicy(model, tokenizer)).sequences.equal(left.sequences)


def test_prompts_without_tokens_or_with_unknown_ones_are_refused() -> None:
    tokenizer = make_tokenizer()
    policy = HFPolicy(make_model(), tokenizer, chat=False)
    tokenizer.add_tokens(["z"])
    with pytest.raises(ValueError, match=r"ids below the 20 that the model knows, got 'az' with \[1, 4, 20\]"):
        draw(policy, ["az"], seeds=[1])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match=r"prompts must have tokens, .*, got '' with \[\]"):
        draw(policy, ["a", ""], seeds=[1, 2])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no\nsystem turn') }}", "its template fails with TemplateError: no system turn"),
        ("{{ messages[0].content.nothing.more }}", "its template fails with UndefinedError"),
        ("{% for m in messages %}", "its template fails with TemplateSyntaxError"),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", "makes of .* ''"),
        ("<turn>", "its template makes of 'What is 2 [+] 2[?]' '<turn>'"),
    ],
)
def test_a_chat_template_that_fails_is_refused_at_once(template: str, message: str) -> None:
    model = make_model().train()
    settings = model.generation_config
    with pytest.raises(ValueError, match=f"^tokenizer must have a chat template that .* {message}") as raised:
        HFPolicy(model, make_tokenizer(template))
    assert "\n" not in str(raised.value)
    assert model.training
    assert model.generation_config is settings
    HFPolicy(model, make_tokenizer(template), chat=False)


def test_a_chat_template_that_fails_on_a_prompt_says_so() -> None:
    template = "{% if 'x' in messages[0].content %}{{ raise_exception('x!') }}{% endif %}{{ messages[0].content }}"
    policy = HFPolicy(make_model(), make_tokenizer(template))
    with pytest.raises(ValueError, match="its template fails with TemplateError: x!"):
        draw(policy, ["abxc"], seeds=[1])


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Touch(folder / "run")}, folder / "pytorch_model.bin")


def remote_code(folder: Path) -> None:
    change(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text(f"open({str(folder / 'run')!r}, 'w')\n")


def change(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, "UnpicklingError: Weights only load failed"),
        (remote_code, "contains custom code which must be executed"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "SafetensorError"),
        (lambda folder: (folder / "model.safetensors").unlink(), "OSError"),
        (lambda folder: (folder / "config.json").write_text("{"), "OSError"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "JSONDecodeError"),
        (lambda folder: change(folder, model_type="nonsense"), "nonsense"),
        (lambda folder: change(folder, hidden_size=64), "RuntimeError"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused_in_one_line(tmp_path: Path, damage, message: str) -> None:
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=rf"model must be the id or the folder .* got '{tmp_path}': .*{message}") as e:
        load(str(tmp_path), torch.device("cpu"))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"all its weights, got '{tmp_path}' without 1 of them: lm_head.weight$"):
        load(str(tmp_path), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.usefixtures("_smollm2")
def test_smollm2() -> None:
    policy = load("smollm2", torch.device("cpu"))
    rollout = draw(policy, ["What is 2 + 2?"], 2, seeds=[3], max_new_tokens=24)
    greedy = draw(policy, ["What is 2 + 2?"], 1, seeds=[3], max_new_tokens=24, temperature=0.0)
    assert "4" in policy.texts(greedy)[0]
    with torch.no_grad():
        logits = hidden(policy, greedy) @ policy.head.T
    assert (logits.argmax(-1) == greedy.token_ids)[greedy.valid].all()
    assert len(policy.texts(rollout)) == 2
