"""The nucleus of a row that has to be read again: sums over all its columns, and the search among what they leave."""

import triton
import triton.language as tl

from paec_kernels.ops.nucleus_search import (
    LARGEST,
    highest_key_of,
    key_of,
    may_hold_more,
    middle_of,
    search_values,
    settle,
    the_top_alone,
    value_of,
)
from paec_kernels.ops.rows import capped, insert_top_two, load_last, log2_weight

AHEAD = tl.constexpr(4)  # blocks of columns that `load_ahead` loads before a reading uses the first
FEW = tl.constexpr(32.0)  # tokens in a bracket that is narrow enough


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
def tokens_in_lanes(n_hit, n_cols, LANES: tl.constexpr):
    """Estimate N, how many tokens there are, from the n_hit lanes that hold one.

    A lane holds none of N with chance (1 - N / V)^(V / LANES).

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
