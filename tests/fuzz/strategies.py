"""What the properties are drawn from: small plain records, which print and shrink well, and make their tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from paec_kernels.checks import SMALLEST
from paec_kernels.types import IGNORE_INDEX

INF = math.inf
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Both sides of what the code counts in: a block of 64, a short list of 128, 512 gathered places, 2,048 lanes.
EDGES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1023, 1025, 2047, 2048, 2049, 4095, 4097, 4500)

# Normal noise ``[..., V]`` and a generator -> rows of mean 0 and spread 1, before scale and shift.
VALUES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": lambda noise, g: noise,
    "three values": lambda noise, g: noise.round().clamp(-1, 1),
    "two values": lambda noise, g: (noise > 1).float(),
    "many ties": lambda noise, g: (4 * noise).round() / 4,
    "all equal": lambda noise, g: torch.zeros_like(noise),
    "zeros of both signs": lambda noise, g: torch.where(noise > 0, 0.0, -0.0),
    "zeros of both signs on top": lambda noise, g: torch.where(
        noise.abs() < 1, torch.where(noise > 0, 0.0, -0.0), -noise.abs()
    ),
    "one far above": lambda noise, g: at_random(noise, g, 20.0),
    "two equal maxima": lambda noise, g: at_random(at_random(noise, g, 8.0), g, 8.0),
    "descending": lambda noise, g: torch.linspace(3, -3, noise.shape[-1]).expand(noise.shape).clone(),
    "ascending": lambda noise, g: torch.linspace(-3, 3, noise.shape[-1]).expand(noise.shape).clone(),
    "geometric": lambda noise, g: -0.7 * torch.arange(float(noise.shape[-1])).expand(noise.shape),
    "heavy tails": lambda noise, g: noise**3,
}
# What becomes of some logits after scale and shift. Rows of "broken" hold NaN, +inf or nothing finite.
MASKS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": lambda z, g: z,
    "one": lambda z, g: kept_somewhere(z, at_random(torch.zeros(z.shape), g, 1.0) > 0, g),
    "some": lambda z, g: kept_somewhere(z, uniform(z.shape, g) < 0.3, g),
    "most": lambda z, g: kept_somewhere(z, uniform(z.shape, g) < 0.95, g),
    "all but one": lambda z, g: kept_somewhere(z, (uniform(z.shape[:-1], g) < 0.5)[..., None].expand(z.shape), g),
    "the first part": lambda z, g: kept_somewhere(z, torch.arange(z.shape[-1]) < 0.7 * z.shape[-1], g),
    "with the lowest float": lambda z, g: z.masked_fill(uniform(z.shape, g) < 0.3, torch.finfo(z.dtype).min),
    "broken": lambda z, g: torch.where(uniform(z.shape[:-1], g)[..., None] < 0.5, broken(z, g), z),
}
# The same values ``[..., V]`` elsewhere in memory, among NaN. "one row for all" repeats the first instead.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda z: z,
    "odd offset": lambda z: placed(z, (*z.shape[:-1], z.shape[-1]), offset=3),
    "columns sliced": lambda z: placed(z, (*z.shape[:-1], z.shape[-1] + 5))[..., 2 : z.shape[-1] + 2].copy_(z),
    "columns apart": lambda z: placed(z, (*z.shape[:-1], 2 * z.shape[-1]))[..., ::2].copy_(z),
    "every other row": lambda z: z.repeat_interleave(2, -2)[..., 1::2, :] if z.dim() > 1 else z,
    "a column of columns": lambda z: z.transpose(0, -1).contiguous().transpose(0, -1),
    "leading dimensions turned": lambda z: z.transpose(0, -2).contiguous().transpose(0, -2) if z.dim() > 1 else z,
    "one row for all": lambda z: z[(slice(0, 1),) * (z.dim() - 1)].expand(z.shape),
}


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def at_random(z: Tensor, generator: torch.Generator, value: float) -> Tensor:
    """Put the value at one column of each row."""
    columns = (uniform(z.shape[:-1], generator) * z.shape[-1]).long()[..., None]
    return z.scatter(-1, columns, value)


def kept_somewhere(z: Tensor, masked: Tensor, generator: torch.Generator) -> Tensor:
    """Mask logits, but not every one of a row."""
    kept = at_random(torch.zeros(z.shape), generator, 1.0) > 0
    return z.masked_fill(masked & ~kept, -INF)


def broken(z: Tensor, generator: torch.Generator) -> Tensor:
    kind = (uniform(z.shape[:-1], generator) * 3).long()[..., None]
    some = torch.where(kind == 0, math.nan, INF)
    return torch.where(kind == 2, -INF, torch.where(at_random(z * 0 + 1, generator, 0.0) == 0, some, z))


def placed(z: Tensor, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    """Memory of that shape behind an offset, all NaN; where the shape is z's it holds z."""
    memory = torch.full((offset + math.prod(shape),), math.nan, dtype=z.dtype)[offset:].view(shape)
    return memory.copy_(z) if shape == z.shape else memory


@dataclass(frozen=True)
class Logits:
    """How rows of logits are made."""

    shape: tuple[int, ...] = (1,)
    width: int = 1
    dtype: torch.dtype = torch.float32
    values: str = "noise"
    scale: float = 1.0
    shift: float = 0.0
    mask: str = "none"
    view: str = "contiguous"
    seed: int = 0

    def make(self) -> Tensor:
        """Return ``[*shape, width]``, finite but where the mask says otherwise."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(*self.shape, self.width, generator=generator)
        z = VALUES[self.values](noise, generator) * self.scale + self.shift
        most = torch.finfo(self.dtype).max
        z = MASKS[self.mask](z.clamp(-most, most).to(self.dtype), generator)
        return VIEWS[self.view](z)

    def padded(self, n: int) -> Tensor:
        """Return them with n more columns of what must not be read."""
        z = self.make()
        rubbish = torch.tensor([math.nan, INF, -INF, 7.0], dtype=z.dtype)
        return torch.cat([z, rubbish[torch.arange(n) % 4].expand(*z.shape[:-1], n)], dim=-1)


@dataclass(frozen=True)
class Options:
    """The keyword arguments of ``token_stats``; what has a value for each row comes of a seed."""

    top_p: float = 0.95
    temperature: float = 1.0
    softcap: float | None = None
    row_temperature: bool = False
    valid: str = "not given"
    tokens: str = "some"
    padding: int = 0
    seed: int = 0

    def for_rows(self, shape: tuple[int, ...], width: int) -> tuple[Tensor | None, dict[str, Any]]:
        """Return token ids, or None, and the keyword arguments for rows of that many columns."""
        generator = torch.Generator().manual_seed(self.seed)
        temperature: float | Tensor = self.temperature
        if self.row_temperature:
            temperature = self.temperature * (0.5 + uniform(shape, generator))
        options: dict[str, Any] = {"top_p": self.top_p, "temperature": temperature, "softcap": self.softcap}
        ids = (uniform(shape, generator) * width).long()
        if self.tokens == "some ignored":
            ids = ids.masked_fill(uniform(shape, generator) < 0.5, IGNORE_INDEX)
        if self.valid != "not given":
            share = {"all": 1.0, "some": 0.6, "none": 0.0}[self.valid]
            valid = uniform(shape, generator) < share
            options["valid"] = valid
            ids = torch.where(valid, ids, 10**6)  # where a row is not valid, any id may stand
        return (None if self.tokens == "none" else ids), options


def float32s(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


def evenly(*strategies: st.SearchStrategy) -> st.SearchStrategy:
    """Draw from each equally often, and from one that stands there more than once as much more often.

    ``st.one_of`` drops repetitions, and draws the first far oftener than the others.
    """
    return st.sampled_from(strategies).flatmap(lambda strategy: strategy)


def mostly(common: st.SearchStrategy, rare: st.SearchStrategy) -> st.SearchStrategy:
    """Draw from the first nine times in ten."""
    return evenly(*[common] * 9, rare)


def sizes(low: int, high: int) -> st.SearchStrategy[int]:
    """Draw each size equally often; ``st.integers`` draws the lowest in half of all examples."""
    return st.sampled_from(range(low, high + 1))


class Level(NamedTuple):
    """Of logits, and the softcap beside it: one far above the logits changes nothing, one far below leaves nothing."""

    scale: float
    shift: float
    softcap: float | None


near_softcaps = st.builds(
    lambda scale, share: Level(scale, 0.0, scale * share), float32s(0.5, 16.0), st.sampled_from([1.0, 0.5, 2.0, 4.0])
)
powers = sizes(-4, 3).map(lambda power: 2.0**power) | st.sampled_from([1.0, 3.0])
far_powers = sizes(-13, 13).map(lambda power: 2.0**power) | st.sampled_from([1e-4, 1e4])
plain = st.builds(Level, mostly(powers, far_powers), st.just(0.0), st.none())
shifted = st.builds(Level, powers, st.sampled_from([5000.0, -5000.0]) | float32s(-5000.0, 5000.0), st.none())
far_softcaps = st.builds(Level, mostly(powers, far_powers), float32s(-50.0, 50.0), float32s(0.5, 1000.0))
levels = st.shared(evenly(plain, plain, near_softcaps, shifted, far_softcaps), key="level")  # of logits and options

# What is common is drawn often, so that few inputs are empty, masked or one-hot in every row.
seeds = st.integers(0, 2**20)
shapes = mostly(
    st.sampled_from([(2,), (1,), (3,), (5,), (2, 2), (3, 2), (2, 1, 3), (2, 3, 2)]), st.sampled_from([(), (2, 0), (0,)])
)
narrow = sizes(2, 12)
widths = mostly(evenly(narrow, sizes(2, 300), st.sampled_from(EDGES[2:])), st.just(1))
masses = evenly(
    st.just(0.95),
    st.floats(0.05, 0.99),
    st.sampled_from([0.5, 1.0, 1e-9, 1 - 1e-7, math.nextafter(1, 0), SMALLEST]),
)
temperatures = mostly(st.sampled_from([1.0, 0.5, 2.0]) | float32s(0.25, 4.0), float32s(2.0**-6, 100.0))


def some_logits(shape=shapes, width=widths, mask=tuple(MASKS), view=tuple(VIEWS)) -> st.SearchStrategy[Logits]:
    return st.builds(
        Logits,
        shape=shape,
        width=width,
        dtype=st.sampled_from(FLOATS),
        values=st.sampled_from(tuple(VALUES)),
        scale=levels.map(lambda level: level.scale),
        shift=levels.map(lambda level: level.shift),
        mask=st.sampled_from(mask),
        view=st.sampled_from(view),
        seed=seeds,
    )


options = st.builds(
    Options,
    top_p=masses,
    temperature=temperatures,
    softcap=levels.map(lambda level: level.softcap),
    row_temperature=st.booleans(),
    valid=mostly(st.sampled_from(["not given", "all", "some"]), st.just("none")),
    tokens=st.sampled_from(["some", "some ignored", "none"]),
    padding=st.sampled_from([0, 0, 1, 7, 64]),
    seed=seeds,
)
