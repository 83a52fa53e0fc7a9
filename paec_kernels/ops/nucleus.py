"""The nucleus of a row, exactly, without a sort: a search over candidates that the forward pass keeps anyway.

The forward pass splits the columns into LANES residue classes ("lanes") and keeps the two largest logits of each.
The nucleus is {z >= tau} for the largest tau with G(tau) >= target, where G(t) = sum of exp(x) over z >= t and
target = top_p * Z. The candidates' G is at most the row's, so their tau is at most the true one, and what they miss
matters only in a lane whose second best is >= tau, a "suspect":

1. no suspect: the candidates' answer is exact;
2. a few: read those lanes again (V / LANES columns each) and search the union, which misses nothing;
3. many: read the row once more, for the sums over everything from a pivot on and for the candidates below it. With
   the pivot a little above tau hardly a lane holds two tokens between them, and 1 ends the search. The candidates tell
   how far above: a lane's chance to hide a third token follows from how many lanes have a first;
4. a pivot at or below tau, or candidates that fall short of the target: narrow the bracket around tau by reading the
   masses of three thresholds at a time, until it holds few tokens, and go on with 3.

A bracket [low, high) of keys, integers in the order of the logits' values, has G(low) >= target > G(high). A search
ends when it holds one distinct value, tau. Weights are relative to the row's largest, which is 1.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from paec_kernels.ops.rows import capped, insert_top_two, load_last, log2_weight

LARGEST = tl.constexpr(3.4028234663852886e38)
GATHERED_LANES = tl.constexpr(64)
GATHERED_COLUMNS = tl.constexpr(8)
AHEAD = tl.constexpr(4)  # blocks of columns that `load_ahead` loads before a reading uses the first
FEW = tl.constexpr(32.0)  # tokens in a bracket that is narrow enough


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


@triton.jit
def gather_lanes(row, suspect, n_suspect, scratch_ptr, LANES: tl.constexpr):
    """Read the suspect lanes' columns, and keep the two best of each of GATHERED_LANES x GATHERED_COLUMNS places.

    Returns:
        the best and the second best of each place, and the best that a place may have dropped.
    """
    place = tl.cumsum(suspect.to(tl.int32), 0) - 1
    tl.store(scratch_ptr + place, tl.arange(0, LANES), mask=suspect)
    tl.debug_barrier()
    index = tl.arange(0, GATHERED_LANES)
    lane = tl.load(scratch_ptr + index, mask=index < n_suspect, other=row.n_cols)
    offsets = lane[:, None] + LANES * tl.arange(0, GATHERED_COLUMNS)[None, :]
    first = tl.full([GATHERED_LANES, GATHERED_COLUMNS], -float("inf"), tl.float32)
    second = first
    dropped = first
    for start in range(0, row.n_cols, LANES * GATHERED_COLUMNS):
        columns = start + offsets
        inside = (columns < row.n_cols) & (lane[:, None] < row.n_cols)
        z = tl.load(row.ptr + columns.to(tl.int64) * row.stride, mask=inside, other=-float("inf")).to(tl.float32)
        dropped = tl.maximum(dropped, tl.minimum(second, z))
        first, second = insert_top_two(first, second, z)
    return first, second, tl.max(dropped)


@triton.jit
def tokens_in_lanes(n_hit, n_cols, LANES: tl.constexpr):
    """Estimate of how many tokens n_hit lanes have one: a lane has none of N with chance (1 - N / V)^(V / LANES).

    Returns:
        N, and the share of lanes that have none.
    """
    columns = 1.0 * n_cols
    empty = 1.0 - tl.minimum(n_hit / LANES, 1.0 - 1.0 / LANES)
    return columns * (1.0 - tl.exp2(tl.log2(empty) * LANES / columns)), empty


@triton.jit
def pivot_above(first, second, low, high, n_cols, units, SHIFT: tl.constexpr, LANES: tl.constexpr):
    """Choose a key between low, where the candidates just reach the target, and high; probably just above tau.

    Tokens fall into lanes by chance, so the lanes that have one from low on tell how many there are, N, and N how
    many of them the candidates miss. Let N grow by 2^alpha where the weight halves. The missed ones, which grow as
    N^3, weigh 3 alpha / (3 alpha - 1) times the lightest on average; and a mass of k lightest tokens beyond the
    target ends k / (alpha N) nats above low.
    """
    low_value = value_of(low, SHIFT)
    nat = 1.4426950408889634 / units.scale  # as a difference of logits
    if units.softcap is not None:
        u = capped(low_value, units.softcap) / units.softcap
        nat = nat / tl.maximum(1.0 - u * u, 1e-3)  # the slope of the cap
    n_first = tl.sum((first >= low_value).to(tl.float32))
    n_second = tl.sum((second >= low_value).to(tl.float32))
    n_heavy = tl.sum((first >= low_value + 0.6931471805599453 * nat).to(tl.float32))
    n, empty = tokens_in_lanes(n_first, n_cols, LANES)
    heavy, _ = tokens_in_lanes(n_heavy, n_cols, LANES)
    alpha = tl.minimum(tl.maximum(tl.log2(n / tl.maximum(heavy, 1.0)), 0.4), 4.0)

    missed = tl.maximum(n - n_first - n_second, 0.0) * 3.0 * alpha / (3.0 * alpha - 1.0)
    deviation = tl.sqrt(tl.maximum(LANES * empty * (1.0 - empty * (1.0 + n / LANES)), 1.0)) / empty  # of N
    pivot = key_of(low_value + (missed + 2.0 * deviation) / (alpha * n) * nat, SHIFT)
    return tl.minimum(tl.maximum(pivot, low + 1), high - 1)


@triton.jit
def from_candidates(
    row, first, second, low, high, target, units, scratch_ptr, SHIFT: tl.constexpr, LANES: tl.constexpr
):
    """Find the nucleus from the two largest logits of each lane, and from all of a few lanes that may hold more.

    Returns:
        whether it is exact; low, raised where the candidates reach the target; a pivot for the next reading, or high;
        the nucleus.
    """
    reached, low_found, nucleus = search_values((first, second), None, low, high, (0.0, 0.0, 0.0), target, units, SHIFT)
    suspect = second >= nucleus.tau
    n_suspect = tl.sum(suspect.to(tl.int32))
    exact = reached & (n_suspect == 0)
    pivot = high
    if reached:
        low = low_found
        if (n_suspect > GATHERED_LANES) & (low + 1 < high):
            pivot = pivot_above(first, second, low, high, row.n_cols, units, SHIFT, LANES)
        elif (n_suspect > 0) & (n_suspect <= GATHERED_LANES):
            best, next_best, dropped = gather_lanes(row, suspect, n_suspect, scratch_ptr, LANES)
            first = tl.where(suspect, -float("inf"), first)
            second = tl.where(suspect, -float("inf"), second)
            # The union reaches the target at low, since the candidates alone do.
            _, low, nucleus = search_values(
                (first, second), (best, next_best), low, high, (0.0, 0.0, 0.0), target, units, SHIFT
            )
            exact = dropped < nucleus.tau
    return exact, low, pivot, nucleus


@triton.jit
def load_ahead(row, start, LANES: tl.constexpr):
    """Load AHEAD blocks of LANES columns: one alone is too few bytes in flight to cover the latency of memory."""
    pointers = row.ptr + (start + tl.arange(0, LANES)).to(tl.int64) * row.stride
    step = LANES * tl.cast(row.stride, tl.int64)
    z0 = tl.load(pointers).to(tl.float32)
    z1 = tl.load(pointers + step).to(tl.float32)
    z2 = tl.load(pointers + 2 * step).to(tl.float32)
    z3 = tl.load(pointers + 3 * step).to(tl.float32)
    return z0, z1, z2, z3


@triton.jit
def add_masses(sums, z, low_value, high_value, t1, t2, t3, units):
    """Add a block of columns to the sums of `read_masses`."""
    m1, m2, m3, smallest, largest = sums
    # A sum or itself, chosen: a predicated instruction, where adding e or 0 is a selection and an addition.
    e = tl.exp2(log2_weight(z, units))
    m1 = tl.where(z >= t1, m1 + e, m1)
    m2 = tl.where(z >= t2, m2 + e, m2)
    m3 = tl.where(z >= t3, m3 + e, m3)
    smallest = tl.where(z >= low_value, tl.minimum(smallest, z), smallest)
    largest = tl.where(z < high_value, tl.maximum(largest, z), largest)
    return m1, m2, m3, smallest, largest


@triton.jit
def read_masses(row, low_value, high_value, t1, t2, t3, units, LANES: tl.constexpr):
    """Read the row once: G of three thresholds, the smallest logit >= low_value, the largest < high_value."""
    zeros = tl.zeros([LANES], tl.float32)
    infinity = tl.full([LANES], float("inf"), tl.float32)
    sums = zeros, zeros, zeros, infinity, -infinity
    n_full = row.n_cols // (AHEAD * LANES) * (AHEAD * LANES)
    for start in range(0, n_full, AHEAD * LANES):
        blocks = load_ahead(row, start, LANES)
        for i in tl.static_range(AHEAD):
            sums = add_masses(sums, blocks[i], low_value, high_value, t1, t2, t3, units)
    for start in range(n_full, row.n_cols, LANES):
        z = load_last(row, start, LANES)
        sums = add_masses(sums, z, low_value, high_value, t1, t2, t3, units)
    return tl.sum(sums[0]), tl.sum(sums[1]), tl.sum(sums[2]), tl.min(sums[3]), tl.max(sums[4])


@triton.jit
def add_below(sums, z, low_value, high_value, units):
    """Add a block of columns to the sums of `read_below`."""
    mass, weighted, n_above, n_member, first, second = sums
    d = log2_weight(z, units)
    e = tl.exp2(d)
    above = z >= high_value
    mass = tl.where(above, mass + e, mass)
    weighted = tl.where(above, weighted + e * d, weighted)
    n_above = tl.where(above, n_above + 1.0, n_above)
    n_member = tl.where(z >= low_value, n_member + 1.0, n_member)
    first, second = insert_top_two(first, second, tl.where(above, -float("inf"), z))
    return mass, weighted, n_above, n_member, first, second


@triton.jit
def read_below(row, low_value, high_value, units, LANES: tl.constexpr):
    """Read the row once: sums over z >= high_value, and the two largest logits below it in each lane.

    Returns:
        of the tokens from high_value on: G, sum of e log2(e), how many; how many there are from low_value on; the
        two largest logits < high_value of each lane.
    """
    zeros = tl.zeros([LANES], tl.float32)
    nothing = tl.full([LANES], -float("inf"), tl.float32)
    sums = zeros, zeros, zeros, zeros, nothing, nothing
    n_full = row.n_cols // (AHEAD * LANES) * (AHEAD * LANES)
    for start in range(0, n_full, AHEAD * LANES):
        blocks = load_ahead(row, start, LANES)
        for i in tl.static_range(AHEAD):
            sums = add_below(sums, blocks[i], low_value, high_value, units)
    for start in range(n_full, row.n_cols, LANES):
        z = load_last(row, start, LANES)
        sums = add_below(sums, z, low_value, high_value, units)
    return tl.sum(sums[0]), tl.sum(sums[1]), tl.sum(sums[2]), tl.sum(sums[3]), sums[4], sums[5]


@triton.jit
def narrow_by_reading(
    row, n_tokens, low, high, mass_low, mass_high, target, units, SHIFT: tl.constexpr, LANES: tl.constexpr
):
    """Narrow [low, high) to one distinct value or n_tokens tokens by reading the row.

    G(low) >= target > G(high) is given; mass_low and mass_high are the two, or LARGEST and 0 where they are not known.

    Three thresholds a reading: around the place where a line between both ends passes the target, and half-way. Where
    low comes from candidates its mass is not known: then one just above low (with many ties there, low is tau), a
    quarter of the way, for tau is not far, and half-way.
    """
    while may_hold_more(n_tokens, low, high, mass_low, mass_high, units, SHIFT):
        middle = middle_of(low, high, SHIFT)
        k2 = middle_of(low, middle, SHIFT)
        k1 = low + 1
        if mass_low < LARGEST:
            low_value = tl.maximum(value_of(low, SHIFT), -1e38)
            width = value_of(high, SHIFT) - low_value
            crossing = (mass_low - target) / (mass_low - mass_high)
            k1 = key_of(low_value + width * tl.maximum(crossing - 0.05, 0.0), SHIFT)
            k2 = key_of(low_value + width * tl.minimum(crossing + 0.05, 1.0), SHIFT)
        k1 = tl.minimum(tl.maximum(k1, low + 1), high - 1)
        k2 = tl.minimum(tl.maximum(k2, low + 1), high - 1)
        k3 = tl.maximum(middle, k2)
        k2 = tl.maximum(tl.minimum(middle, k2), k1)
        k1 = tl.minimum(middle, k1)
        m1, m2, m3, smallest, largest = read_masses(
            row,
            value_of(low, SHIFT),
            value_of(high, SHIFT),
            value_of(k1, SHIFT),
            value_of(k2, SHIFT),
            value_of(k3, SHIFT),
            units,
            LANES,
        )
        if m2 >= target:
            low = k2
            mass_low = m2
            if m3 >= target:
                low = k3
                mass_low = m3
            else:
                high = k3
                mass_high = m3
        else:
            high = k2
            mass_high = m2
            if m1 >= target:
                low = k1
                mass_low = m1
            else:
                high = k1
                mass_high = m1
        # No logit lies between the bracket's ends and these: many tied tokens are found to be one value at once.
        high = tl.maximum(tl.minimum(high, highest_key_of(largest, SHIFT) + 1), low + 1)
        low = tl.maximum(tl.minimum(highest_key_of(smallest, SHIFT), high - 1), low)
    return low, high, mass_low, mass_high


@triton.jit
def from_readings(row, low, high, pivot, target, units, SHIFT: tl.constexpr, LANES: tl.constexpr):
    """Find the nucleus of a row whose candidates alone do not tell it."""
    mass_low = LARGEST
    mass_high = 0.0
    n_tokens = FEW
    nucleus = the_top_alone(units.reference)
    exact = False
    while not exact:
        if pivot == high:
            low, high, mass_low, mass_high = narrow_by_reading(
                row, n_tokens, low, high, mass_low, mass_high, target, units, SHIFT, LANES // 4
            )
            pivot = high
            n_tokens = 1.0  # where that is not enough
        base_mass, base_sum, base_count, n_member, first_below, second_below = read_below(
            row, value_of(low, SHIFT), value_of(pivot, SHIFT), units, LANES // 4
        )
        if (pivot < high) & (base_mass >= target):  # G(high) < target is known, however a sum rounds
            low = pivot
            mass_low = base_mass
            pivot = high
        else:
            high = pivot
            mass_high = base_mass
            if may_hold_more(1.0, low, high, mass_low, mass_high, units, SHIFT):
                reached, low_found, nucleus = search_values(
                    (first_below, second_below),
                    None,
                    low,
                    high,
                    (base_mass, base_sum, base_count),
                    target,
                    units,
                    SHIFT,
                )
                n_suspect = tl.sum((second_below >= nucleus.tau).to(tl.int32))
                exact = reached & (n_suspect == 0)
                low = tl.where(reached, low_found, low)
                if reached & (exact == 0) & (low + 1 < high):
                    pivot = pivot_above(first_below, second_below, low, high, row.n_cols, units, SHIFT, LANES // 4)
                mass_low = LARGEST
            else:
                exact = True
                nucleus = settle(
                    (base_mass, base_sum, base_count), n_member - base_count, tl.max(first_below), target, units
                )
    return nucleus


@triton.jit
def find_nucleus(
    row,
    first,
    second,
    second_best,
    total,
    top_logit,
    top_p,
    units,
    scratch_ptr,
    SHIFT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Find the nucleus of a row of finite total weight.

    Args:
        first, second: [LANES], the two largest logits of each lane; second_best: the row's second largest logit.
        total: Z relative to the row's largest weight; top_logit: the largest logit.
        units: with the reference f(top_logit).
        scratch_ptr: GATHERED_LANES int32 of this row's own.
    """
    target = top_p * total
    nucleus = the_top_alone(top_logit)
    if top_p >= 1.0:
        # Every token of non-zero probability: from the smallest finite value on.
        mass, weighted, size, _, _, _ = read_below(row, -LARGEST, -LARGEST, units, LANES // 4)
        nucleus = Nucleus(tl.full([], -float("inf"), tl.float32), tl.full([], 0.0, tl.float32), mass, weighted, size)
    elif (target > 1.0) | (second_best == top_logit):
        low = lowest_key((1.0 - top_p) * total / row.n_cols, units, SHIFT)
        high = highest_key_of(top_logit, SHIFT) + 1
        exact, low, pivot, nucleus = from_candidates(
            row, first, second, low, high, target, units, scratch_ptr, SHIFT, LANES
        )
        if exact == 0:
            nucleus = from_readings(row, low, high, pivot, target, units, SHIFT, LANES)
    return nucleus
