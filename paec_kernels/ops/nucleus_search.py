"""The search for a nucleus among values that a program holds in registers.

A bracket [low, high) of keys, integers in the order of the logits' values, has G(low) >= target > G(high), where G(t)
is the sum of exp(x) over z >= t. A search ends when the bracket holds one distinct value, tau.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from paec_kernels.ops.rows import capped, log2_weight

LARGEST = tl.constexpr(3.4028234663852886e38)


class Nucleus(NamedTuple):
    """The tokens z > tau, and those at tau by a share; masses relative to the row's largest weight."""

    tau: tl.tensor  # a raw logit
    weight: tl.tensor  # w of a token at tau
    mass: tl.tensor  # M = sum of w e
    weighted: tl.tensor  # sum of w e log2(e)
    size: tl.tensor  # as a float


@triton.jit
def key_of(z, SHIFT: tl.constexpr):
    """Map z to an integer in the same order; SHIFT drops the bits that a 16-bit logit leaves unused in float32."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def highest_key_of(z, SHIFT: tl.constexpr):
    """Return the key of the last value that equals z: -0.0 equals 0.0 and has the key before it."""
    return key_of(tl.where(z == 0, 0.0, z), SHIFT)


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """Invert key_of."""
    positive = key << SHIFT
    negative = (positive | ((1 << SHIFT) - 1)) ^ 0x7FFFFFFF
    return tl.where(key < 0, negative, positive).to(tl.float32, bitcast=True)


@triton.jit
def middle_of(low, high, SHIFT: tl.constexpr):
    """Choose a key inside (low, high): half-way by value where the bracket spans zero, since keys crowd around it.

    Not where it is narrow: closing in on zero by value would pass every exponent down to the smallest.
    """
    low_value, high_value = value_of(low, SHIFT), value_of(high, SHIFT)
    width = high_value - low_value
    by_value = key_of(0.5 * low_value + 0.5 * high_value, SHIFT)
    apart = low ^ high  # negative where the signs differ
    by_key = (low & high) + (apart >> 1)
    middle = tl.where((apart < 0) & (width > 2e-3) & (width < 65536.0), by_value, by_key)
    return tl.minimum(tl.maximum(middle, low + 1), high - 1)


@triton.jit
def lowest_key(negligible, units, SHIFT: tl.constexpr):
    """Return a key that no nucleus goes below.

    The tokens of relative weight under negligible = (1 - top_p) Z / V weigh at most (1 - top_p) Z together.
    """
    # Lowered by far more than rounding errors, and by far less than a round of the search is worth.
    z = units.reference + (tl.log2(negligible) - 1e-3) / units.scale - 1e-6 * tl.abs(units.reference)
    if units.softcap is not None:
        u = tl.minimum(z / units.softcap, 1.0) - 1e-5
        artanh = tl.log2(tl.maximum(1.0 + u, 1e-6) / (1.0 - u))  # times 2 / ln 2
        z = tl.where(u > -1.0, artanh * units.softcap * 0.34657359027997264, -LARGEST)
    return key_of(tl.maximum(z, -LARGEST), SHIFT)


@triton.jit
def may_hold_more(n_tokens, low, high, mass_low, mass_high, units, SHIFT: tl.constexpr):
    """Tell whether [low, high) may still hold more than n_tokens tokens of more than one value.

    Each weighs at least what one at low does.
    """
    lightest = tl.exp2(log2_weight(value_of(low, SHIFT), units))
    rounding = 1e-6 * mass_low
    return (low + 1 < high) & (mass_low - mass_high > (n_tokens + 0.5) * lightest - rounding)


@triton.jit
def settle(above, n_tied, tau, target, units):
    """Complete the nucleus from its sums over z > tau (G, sum of e log2(e), how many), when n_tied tokens are at tau.

    k = min(n, max(1, ceil((target - M>) / exp(tau)))) of them belong, each with weight w = k / n  [ours].
    """
    mass_above, sum_above, n_above = above
    d = log2_weight(tau, units)
    e = tl.exp2(d)
    needed = tl.ceil((target - mass_above) / tl.maximum(e, 1e-37))
    k = tl.minimum(tl.maximum(needed, 1.0), n_tied)
    return Nucleus(tau, k / tl.maximum(n_tied, 1.0), mass_above + k * e, sum_above + k * e * d, n_above + k)


@triton.jit
def the_top_alone(top):
    """Return the nucleus that is the largest logit, once."""
    one, zero = tl.full([], 1.0, tl.float32), tl.full([], 0.0, tl.float32)
    return Nucleus(top, one, one, zero, one)


@triton.jit
def weights_of(pair, units):
    """Weigh both of a pair of tensors."""
    first, second = pair
    return (tl.exp2(log2_weight(first, units)), tl.exp2(log2_weight(second, units)))


@triton.jit
def mass_from(pair, weights, threshold):
    """Sum G(threshold) over values held in registers."""
    mass = tl.where(pair[0] >= threshold, weights[0], 0.0)
    mass = tl.where(pair[1] >= threshold, mass + weights[1], mass)
    return tl.sum(mass)


@triton.jit
def sums_of(pair, weights, low_value, high_value, units):
    """Sum over values held in registers, for a bracket [low, high) that holds one distinct value.

    Returns:
        sum of e log2(e) over z >= high, counts of z >= high and of z >= low, the best z < high.
    """
    z, e = tl.join(pair[0], pair[1]), tl.join(weights[0], weights[1])
    above = z >= high_value
    # A zero that the compiler cannot know to be one: it makes the exponents anew where it would otherwise keep
    # those that e came from in registers across the search, and spill.
    d = (capped(z + (high_value - high_value), units.softcap) - units.reference) * units.scale
    weighted = tl.sum(tl.where(above, d, 0.0) * e)
    n_above = tl.sum(tl.where(above, 1.0, 0.0))
    n_member = tl.sum(tl.where(z >= low_value, 1.0, 0.0))
    return weighted, n_above, n_member, tl.max(tl.where(above, -float("inf"), z))


@triton.jit
def search_values(pair, extra, low, high, base, target, units, SHIFT: tl.constexpr):
    """Bisect [low, high) over values held in registers, all below high.

    Args:
        pair, extra: two tensors each; extra may be None.
        base: of the row's tokens from high on: G, sum of e log2(e), how many.
    Returns:
        whether they reach the target at low, and if so: low as it is in the end; the nucleus.
    """
    weights = weights_of(pair, units)
    extra_weights = None
    if extra is not None:
        extra_weights = weights_of(extra, units)

    base_mass, base_sum, base_count = base
    mass_low = LARGEST
    mass_high = base_mass
    while may_hold_more(1.0, low, high, mass_low, mass_high, units, SHIFT):
        middle = middle_of(low, high, SHIFT)
        mass = base_mass + mass_from(pair, weights, value_of(middle, SHIFT))
        if extra is not None:
            mass += mass_from(extra, extra_weights, value_of(middle, SHIFT))
        enough = mass >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        mass_low = tl.where(enough, mass, mass_low)
        mass_high = tl.where(enough, mass_high, mass)

    low_value, high_value = value_of(low, SHIFT), value_of(high, SHIFT)
    weighted, n_above, n_member, tau = sums_of(pair, weights, low_value, high_value, units)
    if extra is not None:
        more_weighted, more_above, more_member, rival = sums_of(extra, extra_weights, low_value, high_value, units)
        weighted += more_weighted
        n_above += more_above
        n_member += more_member
        tau = tl.maximum(tau, rival)
    nucleus = settle((mass_high, base_sum + weighted, base_count + n_above), n_member - n_above, tau, target, units)
    return mass_low < LARGEST, low, nucleus
