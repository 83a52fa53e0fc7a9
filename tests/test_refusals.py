"""Bad arguments, by the hundred: each is refused by a TypeError or ValueError that names it, and nothing changes, or it
works: what comes back is of the same kind as of good arguments, and the same where the argument means the same.

``PAEC_FUZZ_EXAMPLES`` sets how many calls are made of each function; the first ones are always the same.
"""

import dataclasses
import fractions
import math
import numbers
import os
import random
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import paec_kernels as pk
from paec_kernels.losses.entropy_term import EntropyTerm
from paec_kernels.train.algorithms import ALGORITHMS, Algorithm, MicroBatch
from paec_kernels.train.config import CompareConfig, EvalConfig, EvalOptions, ExportConfig, TrainConfig
from paec_kernels.train.models.policy import Rollout
from paec_kernels.train.models.warm_start import WarmStart

EXAMPLES = int(os.environ.get("PAEC_FUZZ_EXAMPLES", "12"))
B, T, V, D = 2, 3, 7, 4

NUMBERS = [
    *(10**30, -(10**30), 10**400, -(10**400), 10**5000, 2**63, -(2**63) - 1, -1, 0, 1, 2, 10**6),
    *(0.0, -0.0, 0.5, 1.5, -0.5, 1e39, 1e-50, 1e300, 5e-324, math.nan, math.inf, -math.inf),
    *(True, False, 1j, fractions.Fraction(1, 3)),
    *(np.float64(0.5), np.float32(math.nan), np.int64(3), np.int64(-3), np.bool_(True), np.uint8(2)),
]
OBJECTS = [
    *("x", "", "0.5", "auto", b"x", None, [], [0.5], (), (1, 2), {}, {"a": 1}, set(), object()),
    *(range(0), range(3), np.array(0.5), np.array([0.5, 1.5]), np.zeros((0,))),
]
MADE = [lambda: iter(()), lambda: (x for x in ()), lambda: iter([torch.zeros(B, T)])]
ODD_TENSORS: list[Callable[[], Tensor]] = [
    lambda: torch.tensor(0.5),
    lambda: torch.tensor(3),
    lambda: torch.tensor(True),
    lambda: torch.zeros(0),
    lambda: torch.zeros(B, T, V, 1),
    lambda: torch.zeros(B, T).to_sparse(),
    lambda: torch.ones(B, T).to_sparse_csr(),
    lambda: torch.ones(B, T, V).to_sparse(),
    lambda: torch.zeros(B, T, device="meta"),
    lambda: torch.zeros((), device="meta"),
    lambda: torch.quantize_per_tensor(torch.ones(B, T), 0.1, 0, torch.quint8),
    lambda: torch.quantize_per_tensor(torch.ones(B, T, V), 0.1, 0, torch.qint8),
    lambda: torch.nested.nested_tensor([torch.ones(2, V), torch.ones(3, V)]),
    lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    lambda: torch.nn.Parameter(torch.zeros(B, T)),
    lambda: torch.zeros(B, T).expand(4, B, T),
]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn),
    *(torch.complex64, torch.complex128, torch.bool, torch.uint8, torch.int16, torch.int64, torch.uint64),
]


def changed(x: Tensor) -> list[Callable[[], Any]]:
    """A good tensor made bad: another type, shape, place or kind of tensor, or bad values."""
    plain = x.detach()
    return [
        *(lambda dtype=dtype: plain.to(dtype) for dtype in DTYPES),
        *(lambda n=n: torch.full_like(plain, n) for n in (0, -1, -100, 10**6) if plain.dtype != torch.bool),
        *(lambda n=n: plain * n for n in (math.nan, math.inf, -math.inf) if plain.is_floating_point()),
        lambda: plain.to("meta"),
        lambda: plain.to_sparse(),
        lambda: plain.tolist(),
        lambda: plain.numpy(),
        lambda: list(plain) if plain.dim() else [plain],
        lambda: plain[None],
        lambda: plain[..., None],
        lambda: plain.flatten(),
        lambda: plain[:0] if plain.dim() else plain,
        lambda: plain[..., :1] if plain.dim() else plain,
        lambda: plain.transpose(0, -1) if plain.dim() else plain,
        lambda: plain.sum(),
        lambda: plain.float().requires_grad_(),
        lambda: plain.clone().requires_grad_() if plain.is_floating_point() else plain,
    ]


def bad_value(rng: random.Random, good: Any) -> Any:
    if isinstance(good, Tensor) and rng.random() < 0.5:
        return rng.choice(changed(good))()
    if isinstance(good, list) and good and rng.random() < 0.5:
        spoilt = [bad_value(rng, good[0]), *good[1:]]
        return rng.choice((spoilt, good[0], good[:-1], tuple(good), spoilt[:1]))
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(NUMBERS)
    return rng.choice(OBJECTS) if kind < 0.75 else rng.choice([*MADE, *ODD_TENSORS])()


# The argument that an error may name in place of one that it does not fit.
FITS = {
    **{"logits": ("vocab_size", "token_ids", "inplace_backward"), "weight": ("vocab_size", "token_ids")},
    **{"vocab_size": ("token_ids",), "algo": ("method",), "model": ("chat",), "run": ("chat",)},
}


class Case(NamedTuple):
    """A function and good arguments for it; ``self`` is never replaced, and its state is watched."""

    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]


def backward(result: Any) -> None:
    """Take the gradient of all that a call returned: an argument may break there."""
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else [result]
    tensors = [x for x in parts if isinstance(x, Tensor) and x.requires_grad]
    if tensors:
        torch.autograd.backward([x.sum() for x in tensors])


def stats_options(**options: Any) -> dict[str, Any]:
    return {
        "token_ids": torch.tensor([[0, 1, -100], [2, 3, 4]]),
        "valid": torch.tensor([[True, True, False], [True, True, True]]),
        "top_p": 0.9,
        "temperature": torch.full((B, T), 0.7),
        "softcap": None,
        "vocab_size": V - 1,
        **options,
    }


def logits_arguments(backend: str) -> dict[str, Any]:
    leaf = torch.randn(B, T, V).requires_grad_()
    return {"logits": leaf * 1.0, "inplace_backward": True, **stats_options(backend=backend, temperature=0.7)}


def linear_arguments(backend: str) -> dict[str, Any]:
    hidden, weight, bias = (torch.randn(shape).requires_grad_() for shape in ((B, T, D), (V, D), (V,)))
    return {"hidden": hidden, "weight": weight, "bias": bias, "chunk_rows": 2, **stats_options(backend=backend)}


def tokens(**more: Any) -> dict[str, Any]:
    return {
        "logp": -torch.rand(B, T).requires_grad_(),
        "old_logp": -torch.rand(B, T),
        "advantages": torch.randn(B, 1),
        "valid": torch.rand(B, T) > 0.3,
        **more,
    }


POLICY = {"clip_low": 0.2, "clip_high": 0.3, "normalizer": torch.tensor(5.0)}


def selection(*names: str, **options: Any) -> dict[str, Any]:
    steps = [tokens(), tokens()]
    return {name: [step[name].detach() for step in steps] for name in names} | options


STATS = ("logp", "entropy", "nucleus_entropy", "margin", "lse", "nucleus_size")


def make_stats() -> pk.TokenStats:
    return pk.token_stats(torch.randn(B, T, V).requires_grad_() * 1.0, torch.zeros(B, T, dtype=torch.long))


def observed(term: EntropyTerm) -> EntropyTerm:
    for _ in range(2):
        term.observe(make_stats(), torch.ones(B, T, dtype=torch.bool))
        term.plan()
        term.step()
    return term


def term_arguments(term: EntropyTerm, **more: Any) -> dict[str, Any]:
    return {"self": observed(term), "valid": torch.rand(B, T) > 0.3, **make_stats()._asdict(), **more}


def observe(self: EntropyTerm, valid: Any, **stats: Any) -> Any:
    self.observe(pk.TokenStats(**stats), valid)
    return self.plan()


def forward(self: pk.PAEC, valid: Any, **stats: Any) -> Any:
    return self(pk.TokenStats(**stats), valid)


def share(self: EntropyTerm, valid: Any, plan: Any, accuracy: Any, plan_fields: Any = None, **stats: Any) -> Any:
    return self.term(pk.TokenStats(**stats), valid, plan, accuracy)


def share_arguments(make: Callable[[], EntropyTerm]) -> dict[str, Any]:
    arguments = term_arguments(make(), accuracy=torch.rand(B, 1))
    term = arguments["self"]
    term.observe(pk.TokenStats(**{name: arguments[name] for name in STATS}), arguments["valid"])
    return arguments | {"plan": term.plan()}


def share_of_plan(self: EntropyTerm, made: Any, **fields: Any) -> Any:
    valid, plan = torch.ones(B, T, dtype=torch.bool), self.PLAN(**fields)
    return self.term(made, valid, plan, torch.rand(B, 1))


def plan_arguments(make: Callable[[], EntropyTerm]) -> dict[str, Any]:
    term = observed(make())
    stats = make_stats()
    term.observe(stats, torch.ones(B, T, dtype=torch.bool))
    return {"self": term, **term.plan()._asdict()}


def drop_in_arguments() -> dict[str, Any]:
    loss_fn = pk.PAECLoss(pk.PAECConfig(), kl_coef=0.1)
    good = tokens(logits=torch.randn(B, T, V).requires_grad_() * 1.0, token_ids=torch.zeros(B, T, dtype=torch.long))
    del good["logp"]
    return {"self": loss_fn, **good, "ref_logp": -torch.rand(B, T)}


def micro_batch() -> MicroBatch:
    ids, valid = torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool)
    rollout = Rollout(*(valid if name == "valid" else ids for name in Rollout._fields))
    return MicroBatch(rollout, torch.randn(B, 1), torch.rand(B, 1), make_stats(), -torch.rand(B, T))


def config_case(kind: type) -> Case:
    def arguments() -> dict[str, Any]:
        good = kind()
        return {field.name: getattr(good, field.name) for field in dataclasses.fields(good)}

    return Case(kind, arguments)


TERMS: dict[str, Callable[[], EntropyTerm]] = {
    "PAEC": lambda: pk.PAEC(pk.PAECConfig()),
    "GlobalEntropy": pk.GlobalEntropy,
    "AER": pk.AER,
    "SIREN": pk.SIREN,
}
CONFIGS = {"PAEC": pk.PAECConfig, "GlobalEntropy": pk.GlobalEntropyConfig, "AER": pk.AERConfig, "SIREN": pk.SIRENConfig}


def cases() -> dict[str, Case]:
    found = {
        "grpo_loss": Case(pk.grpo_loss, lambda: tokens(**POLICY, ref_logp=-torch.rand(B, T), kl_coef=0.1)),
        "cispo_loss": Case(pk.cispo_loss, lambda: tokens(**POLICY)),
        "clip_cov_loss": Case(pk.clip_cov_loss, lambda: tokens(**POLICY, removed=torch.rand(B, T) > 0.8)),
        "kl_cov_loss": Case(
            pk.kl_cov_loss, lambda: tokens(penalised=torch.rand(B, T) > 0.8, kl_coef=1.0, normalizer=5)
        ),
        "clip_cov_selection": Case(
            pk.clip_cov_selection,
            lambda: selection(
                *("logp", "old_logp", "advantages", "valid"),
                **{"seed": 0, "fraction": 0.5, "cov_low": -1.0, "cov_high": 5.0, "clip_low": 0.5, "clip_high": 0.5},
                process_group=None,
            ),
        ),
        "kl_cov_selection": Case(
            pk.kl_cov_selection,
            lambda: selection("logp", "advantages", "valid", fraction=0.5, process_group=None),
        ),
        "group_advantages": Case(pk.group_advantages, lambda: {"rewards": torch.rand(B, T)}),
        "one_pass_loss": Case(
            pk.one_pass_loss,
            lambda: linear_arguments("torch") | {"chunk_loss": lambda stats, rows: stats.entropy.sum()},
        ),
        "PAECLoss": Case(
            pk.PAECLoss,
            lambda: {
                **{"config": pk.PAECConfig(), "clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.0, "temperature": 1.0},
                **{"softcap": None, "vocab_size": None, "inplace_backward": False, "process_group": None},
                **{"steps_per_batch": 2, "backend": "auto"},
            },
        ),
        "PAECLoss.forward": Case(lambda self, **arguments: self(**arguments), drop_in_arguments),
        "PAEC.forward": Case(forward, lambda: term_arguments(TERMS["PAEC"]())),
        "Algorithm": Case(Algorithm, lambda: {"options": ALGORITHMS["aer"](), "monitored": True, "steps_per_batch": 2}),
        "Algorithm.plan": Case(
            lambda self, **arguments: self.plan(**arguments),
            lambda: {
                "self": Algorithm(ALGORITHMS["clip-cov"]()),
                "micro_batches": [micro_batch(), micro_batch()],
                "seed": 1,
            },
        ),
    }
    for backend in ("torch", "triton", "reference"):
        found[f"token_stats, {backend}"] = Case(pk.token_stats, lambda backend=backend: logits_arguments(backend))
        found[f"linear_token_stats, {backend}"] = Case(
            pk.linear_token_stats, lambda backend=backend: linear_arguments(backend)
        )
    for name, make in TERMS.items():
        config = {"config": CONFIGS[name](), "process_group": None}
        config |= {"steps_per_batch": 2, "backend": "auto"} if name == "PAEC" else {}
        found |= {
            name: Case(type(make()), config.copy),
            f"{name}.observe": Case(observe, lambda make=make: term_arguments(make())),
            f"{name}.term": Case(share, lambda make=make: share_arguments(make)),
            f"{name}.term, plan": Case(
                lambda self, **fields: share_of_plan(self, make_stats(), **fields),
                lambda make=make: plan_arguments(make),
            ),
        }
    configs = (
        *CONFIGS.values(),
        *ALGORITHMS.values(),
        TrainConfig,
        EvalConfig,
        ExportConfig,
        CompareConfig,
        EvalOptions,
        WarmStart,
    )
    return found | {kind.__name__: config_case(kind) for kind in configs}


CASES = cases()


def snapshot(value: Any) -> Any:
    """What a refused call must not change, as something that compares."""
    if isinstance(value, torch.nn.Module):
        return repr(value.state_dict()), len(getattr(value, "_observed", ()))
    if isinstance(value, list):
        return [snapshot(x) for x in value]
    return repr(value.detach().tolist()) if isinstance(value, Tensor) else None  # as text NaN equals itself


def is_named(name: str, message: str) -> bool:
    """Tell whether an error is about the argument: as what must be so, or as what that is held against.

    Elsewhere it may be prose, as in "for a valid row".
    """
    subject, *rest = re.split(" must | needs ", message, maxsplit=1)
    held_against = rf"^{name}, got | (of|and|<=) (stats\.)?{name}(, | = | ?\[)"
    return bool(rest) and (name in re.split(r"\W+", subject) or re.search(held_against, rest[0]) is not None)


def is_plain(value: Any) -> bool:
    """Tell whether it is a tensor whose values are at hand; another can only work where it is not looked at."""
    return (
        isinstance(value, Tensor)
        and (value.device.type, value.layout) == ("cpu", torch.strided)
        and not value.is_quantized
        and not value.is_nested
    )


def is_tame(value: Any) -> bool:
    """Tell whether floats cannot overflow, or divide by 0, for what is in a value."""
    if is_plain(value) and value.is_floating_point():
        sizes = value.detach().double().abs()
        return bool(((sizes >= 1e-6) & (sizes <= 10)).all())
    if isinstance(value, list | tuple):
        return all(map(is_tame, value))
    return not isinstance(value, numbers.Real) or 1e-6 <= abs(value) <= 10


def means_the_same(value: Any, good: Any) -> bool:
    if is_plain(value) and isinstance(good, Tensor) and not value.is_complex():
        return value.shape == good.shape and torch.equal(value.detach().double(), good.detach().double())
    return isinstance(value, numbers.Real) and isinstance(good, numbers.Real) and value == good


def oddities(found: Any, good: Any, bad: dict[str, Any], same: bool, where: str = "result") -> Iterator[str]:
    """Yield where what a call with bad arguments returned is of another kind than what one with good ones did.

    Args:
        same: the bad arguments mean the same, so that the results must agree too.
    """
    if found is None and bad.get("token_ids", 0) is None:
        return  # no tokens, no log-probs
    if type(found) is not type(good):
        yield f"{where} is a {type(found).__name__}, not a {type(good).__name__}"
    elif isinstance(good, dict):
        if found.keys() != good.keys():
            yield f"{where} has {list(found)}, not {list(good)}"
        for name in found.keys() & good.keys():
            yield from oddities(found[name], good[name], bad, same, f"{where}.{name}")
    elif isinstance(good, tuple | list):
        if len(found) not in (len(good), *(len(value) for value in bad.values() if isinstance(value, tuple | list))):
            yield f"{where} has {len(found)} items, not {len(good)}"
        for i, pair in enumerate(zip(found, good, strict=False)):
            yield from oddities(*pair, bad, same, f"{where}[{i}]")
    elif dataclasses.is_dataclass(good):
        for name, hint in typing.get_type_hints(type(good)).items():
            if not fits(getattr(found, name), hint):
                yield f"{where}.{name} is {getattr(found, name)!r:.80}, not a {hint}"
    elif isinstance(good, Tensor):
        given = [x for x in bad.values() if isinstance(x, Tensor) and not x.is_nested]
        if found.layout != good.layout or found.device not in (good.device, *(x.device for x in given)):
            yield f"{where} is a {found.layout} tensor on {found.device}, not a {good.layout} one on {good.device}"
        elif found.shape not in (good.shape, *(x.shape for x in given)):
            yield f"{where} has shape {tuple(found.shape)}, not {tuple(good.shape)}"
        elif found.is_floating_point() != good.is_floating_point() or found.is_complex():
            yield f"{where} is {found.dtype}, not {good.dtype}"
        elif found.is_meta:  # as a tensor that was given: it has no values
            return
        elif good.isfinite().all() and is_tame([*bad.values()]) and not found.isfinite().all():
            yield f"{where} is not finite"
        elif same and not torch.allclose(found.double(), good.double(), rtol=1e-3, atol=1e-5, equal_nan=True):
            yield f"{where} differs, though the arguments mean the same"


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a config's value is of the annotated type: of itself for plain values, and never NaN."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (tuple, list):
        return isinstance(value, origin) and all(fits(item, arguments[0]) for item in value)
    if hint in (bool, int, str, float):
        return type(value) is hint and value == value
    return isinstance(value, origin or hint)


def failure(case: Case, rng: random.Random, result: Any) -> str | None:
    """Make one call with one or two arguments replaced; say what was wrong with the answer.

    Args:
        result: of the same call with good arguments.
    """
    arguments = case.arguments()
    replaced = rng.sample(sorted(arguments.keys() - {"self"}), k=1 if len(arguments) < 3 else rng.choice((1, 1, 1, 2)))
    good = {name: value for name, value in arguments.items() if name not in replaced}
    before = {name: snapshot(value) for name, value in good.items()}
    bad = {name: bad_value(rng, arguments[name]) for name in replaced}
    try:
        found = case.call(**good, **bad)
        backward(found)
    except (TypeError, ValueError) as error:
        names = {other for name in replaced for other in (name, *FITS.get(name, ()))}
        if not any(is_named(name, str(error)) for name in names):
            return f"{bad_text(bad)}: {type(error).__name__} names none of them: {error}"
    except Exception as error:
        return f"{bad_text(bad)}: {type(error).__name__}: {error}"
    else:
        same = all(means_the_same(value, arguments[name]) for name, value in bad.items())
        odd = list(oddities(found, result, bad, same))
        return f"{bad_text(bad)}: works, but {'; '.join(odd)}" if odd else None
    if before != {name: snapshot(value) for name, value in good.items()}:
        return f"{bad_text(bad)}: refused, but something changed"
    return None


def bad_text(bad: dict[str, Any]) -> str:
    """The replaced arguments in short."""
    texts = []
    for name, value in bad.items():
        if isinstance(value, Tensor):
            texts.append(f"{name} = {value.layout} {value.dtype} tensor on {value.device}, {value.dim()} dimensions")
        elif isinstance(value, int) and abs(value) > 10**100:
            texts.append(f"{name} = {'-' if value < 0 else ''}10 ** {len(bin(value)) * 0.30103:.0f}")
        else:
            try:
                texts.append(f"{name} = {value!r}"[:150])
            except ValueError:  # of an integer that Python does not write out
                texts.append(f"{name} = a {type(value).__name__}")
    return ", ".join(texts)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_bad_arguments_work_or_are_named(name):
    rng = random.Random(name)
    torch.manual_seed(0)
    result = CASES[name].call(**CASES[name].arguments())
    failures = []
    for _ in range(EXAMPLES):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = failure(CASES[name], rng, result)
        failures += [found] if found else []
    assert not failures, f"{len(failures)} of {EXAMPLES} calls:\n" + "\n".join(failures[:20])


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", CASES)
def test_good_arguments_work(name):
    """Else the test above would see nothing but refusals."""
    backward(CASES[name].call(**CASES[name].arguments()))


@pytest.mark.parametrize(
    ("name", "message", "named"),
    [
        ("valid", "valid must be a tensor, got 3", True),
        ("valid", "logp, valid must have one tensor for each micro-batch", True),
        ("entropy", "stats.margin must have the shape of stats.entropy, (2, 3), got (2,)", True),
        ("valid", "token_ids must be below 7 in the rows of valid tokens, got 9", False),
        ("valid", "what is valid overflows", False),
        ("ref_logp", "kl_coef = 0.1 needs ref_logp, got None", True),
        ("logp", "old_logp must be a tensor, got logp", False),
    ],
)
def test_prose_names_no_argument(name: str, message: str, named: bool) -> None:
    assert is_named(name, message) == named


@pytest.mark.parametrize(
    ("found", "good", "bad", "said"),
    [
        (None, torch.ones(2), {}, "result is a NoneType, not a Tensor"),
        ((torch.ones(2),), (torch.ones(2), {}), {}, "result has 1 items, not 2"),
        ({"a": torch.ones(())}, {"a": torch.ones(2)}, {}, "result.a has shape (), not (2,)"),
        (torch.ones(3), torch.ones(2), {"x": torch.ones(3)}, None),
        (torch.ones(2, dtype=torch.int32), torch.ones(2), {}, "result is torch.int32, not torch.float32"),
        (torch.tensor(math.nan), torch.ones(()), {"x": 0.5}, "result is not finite"),
        (torch.tensor(math.nan), torch.ones(()), {"x": math.inf}, None),
        (torch.ones(()), torch.zeros(()), {"x": np.float64(0.5)}, "result differs, though the arguments mean the same"),
        (pk.AERConfig(), pk.AERConfig(), {}, None),
    ],
)
def test_what_is_returned_is_looked_at(found: Any, good: Any, bad: dict[str, Any], said: str | None) -> None:
    same = said is not None and said.endswith("mean the same")
    assert list(oddities(found, good, bad, same)) == ([said] if said else [])


@pytest.mark.parametrize(
    ("value", "hint", "fitting"),
    [
        (1, int, True), (np.int64(1), int, False), (True, int, False), (math.nan, float, False),
        (None, int | None, True), ("x", list[str], False), ((1, "x"), tuple[int, ...], False),
        ("b", typing.Literal["a"], False),
    ],
)  # fmt: skip
def test_a_configs_values_are_of_its_types(value: Any, hint: Any, fitting: bool) -> None:
    assert fits(value, hint) == fitting


def test_every_public_name_is_called():
    """A new one belongs among the cases; a type is called as its config or its methods."""
    called = {re.split(r"[.,]", name)[0] for name in CASES}
    assert set(pk.__all__) - called == {"TokenStats", "reference", "__version__"} & set(pk.__all__)
