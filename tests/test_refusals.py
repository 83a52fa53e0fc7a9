"""Bad arguments, by the hundred: each works, or is refused by a TypeError or ValueError that names it; nothing changes.

``PAEC_FUZZ_EXAMPLES`` sets how many calls are made of each function; the first ones are always the same.
"""

import dataclasses
import fractions
import math
import os
import random
import re
import warnings
from collections.abc import Callable
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
    **dict.fromkeys(("logits", "weight"), ("vocab_size", "token_ids")),
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
                "backend": "auto",
            },
        ),
        "PAECLoss.forward": Case(lambda self, **arguments: self(**arguments), drop_in_arguments),
        "PAEC.forward": Case(forward, lambda: term_arguments(TERMS["PAEC"]())),
        "Algorithm": Case(Algorithm, lambda: {"options": ALGORITHMS["aer"](), "monitored": True}),
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
        config = {"config": CONFIGS[name](), "process_group": None} | ({"backend": "auto"} if name == "PAEC" else {})
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


def failure(case: Case, rng: random.Random) -> str | None:
    """Make one call with one or two arguments replaced; say what was wrong with the answer."""
    arguments = case.arguments()
    replaced = rng.sample(sorted(arguments.keys() - {"self"}), k=1 if len(arguments) < 3 else rng.choice((1, 1, 1, 2)))
    good = {name: value for name, value in arguments.items() if name not in replaced}
    before = {name: snapshot(value) for name, value in good.items()}
    bad = {name: bad_value(rng, arguments[name]) for name in replaced}
    try:
        backward(case.call(**good, **bad))
    except (TypeError, ValueError, NotImplementedError) as error:
        names = {other for name in replaced for other in (name, *FITS.get(name, ()))}
        if not any(re.search(rf"\b{name}\b", str(error)) for name in names):
            return f"{bad_text(bad)}: {type(error).__name__} names none of them: {error}"
    except Exception as error:
        return f"{bad_text(bad)}: {type(error).__name__}: {error}"
    else:
        return None
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
            texts.append(f"{name} = 10 ** {len(bin(value)) * 0.30103:.0f}")
        else:
            texts.append(f"{name} = {value!r}"[:150])
    return ", ".join(texts)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_bad_arguments_work_or_are_named(name):
    rng = random.Random(name)
    failures = []
    for _ in range(EXAMPLES):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = failure(CASES[name], rng)
        failures += [found] if found else []
    assert not failures, f"{len(failures)} of {EXAMPLES} calls:\n" + "\n".join(failures[:20])


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", CASES)
def test_good_arguments_work(name):
    """Else the test above would see nothing but refusals."""
    backward(CASES[name].call(**CASES[name].arguments()))


def test_every_public_name_is_called():
    """A new one belongs among the cases; a type is called as its config or its methods."""
    called = {re.split(r"[.,]", name)[0] for name in CASES}
    assert set(pk.__all__) - called == {"TokenStats", "reference", "__version__"} & set(pk.__all__)
