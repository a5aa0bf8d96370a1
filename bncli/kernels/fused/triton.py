"""Fused batch norm in Triton: the device kernels, which triton_launch starts according to a tiling plan.

A channel's values are read once and stay in registers between the statistics and the normalization (nvFuser's
persistent outer reduction, csarofeen/pytorch 1772, is prior art). One source serves both memory layouts:

    planes  x (N, C, S): a slice is one channel; a line is UNIT consecutive positions, and a tile (R lines, UNIT)
    rows    x (M, C), channels last: a slice is B channels; a line is one row's piece of it, and a tile (R lines, B)

and every kind of stage:

    alone                  one program (CTA) processes the whole slice
    team                   P programs share it and meet at a barrier in memory, under a cooperative launch
    statistics, normalize  as team, but two launches replace the barrier; the tensors are read a second time
    frozen                 running statistics normalize (evaluation): no program waits

Legend: L lines of a slice; P programs of a team, p this one; H consecutive tiles for each, of which the first K stay in
registers; m v the mean and biased variance; z the pre-activation; g the loss's gradient in it. Vectors over a slice's
channels are (1, 1) for planes and (1, B) for rows.
"""

from __future__ import annotations

import warnings

import torch
import triton
import triton.language as tl

# Arguments that differ between shapes without a recompilation.
RUNTIME = ("channels", "units", "magic", "shift", "opaque_zero", "L", "H", "P", "teams", "slices")

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

# --- where things are ---------------------------------------------------------------------------------------------


@triton.jit
def _lines(first, k, R: tl.constexpr):
    """The lines (R) of a program's tile k."""
    return first + k * R + tl.arange(0, R)


@triton.jit
def _channels(slice, channels, units, B: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr):
    """The slice's channels (1, B), and which exist, in units: a mask by elements would make accesses narrow."""
    c = (slice * B + tl.arange(0, B))[None, :]
    if PLANES:
        inside = c < channels
    else:
        inside = c // UNIT < units
    return c, inside


@triton.jit
def _offsets(i, c, units, channels, magic, shift, UNIT: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr):
    """Element offsets of a tile from its lines i (R) and channels c (1, B).

    Planes: units = S / UNIT lines a plane, and a line's example is i // units, by a product with the rounded-up
    reciprocal (Granlund & Montgomery 1994). Rows: units = C / UNIT, so that the compiler sees that a row is aligned.
    """
    if WIDE:
        line = i.to(tl.int64)
    else:
        line = i
    if PLANES:
        n = (tl.umulhi((i * 2).to(tl.uint32), magic.to(tl.uint32)) >> shift).to(line.dtype)
        at = (line + n * ((channels - 1).to(line.dtype) * units))[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
        at += c.to(line.dtype) * (units * UNIT)
    else:
        at = (line * units)[:, None] * UNIT + c
    return at


@triton.jit
def _sign_offsets(i, c, channels, end, L, R: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr):
    """Offsets of a tile's bytes of signs, planes (C, ceil(L UNIT / 8)) or rows (M, ceil(C / 8)); which exist."""
    if PLANES:
        j = tl.min(i, axis=0) * UNIT // 8 + tl.arange(0, R * UNIT // 8)
        at = j[:, None] + c.to(tl.int64) * ((L * UNIT + 7) // 8)
        exist = (j < (end * UNIT + 7) // 8)[:, None] & (c < channels)
    else:
        stride = (channels + 7) // 8
        b = tl.min(tl.min(c, axis=1), axis=0) // 8 + tl.arange(0, B // 8)
        at = (i.to(tl.int64) * stride)[:, None] + b[None, :]
        exist = (i < end)[:, None] & (b < stride)[None, :]
    return at, exist


@triton.jit
def _count(p, L, H, R: tl.constexpr):
    """The number of lines of program p of a team."""
    return tl.maximum(tl.minimum(L - p * (H * R), H * R), 0)


@triton.jit
def _pick(vector, c, inside, other: tl.constexpr, HAS: tl.constexpr, ACC: tl.constexpr):
    """The entries c of a vector (C) in the accumulation type; `other` where there is no vector."""
    if HAS:
        picked = tl.load(vector + c, mask=inside, other=other).to(ACC)
    else:
        picked = tl.full(c.shape, other, ACC)
    return picked


# --- arithmetic that both directions share ------------------------------------------------------------------------


@triton.jit
def _fold(tile, PLANES: tl.constexpr):
    """A tile's part of a running sum: one thread adds up the UNIT values of a line."""
    if PLANES:
        tile = tl.sum(tile, axis=1, keep_dims=True)
    return tile


@triton.jit
def _sum(folded):
    """The total over the lines of the result of _fold."""
    return tl.sum(folded, axis=0, keep_dims=True)


@triton.jit
def _reciprocal_deviation(v, EPS: tl.constexpr, ACC: tl.constexpr):
    if ACC == tl.float32:
        r = tl.math.div_rn(tl.full(v.shape, 1.0, ACC), tl.math.sqrt_rn(v + EPS))
    else:
        r = 1.0 / tl.sqrt(v + EPS)
    return r


@triton.jit
def _preactivation(tile, m, scale, b):
    """(x - mean) scale + bias, rounded the same way in both directions, so that backward recomputes the same sign."""
    d = tile - m
    return tl.fma(d, tl.broadcast_to(scale, d.shape), tl.broadcast_to(b, d.shape))


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """NaN passes through, as in torch: a comparison with NaN is false."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z <= 0, 0.01 * z, z)
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def _through_activation(dy, z, ACTIVATION: tl.constexpr):
    """g = dy activation'(z). At NaN as in torch: relu stops dy where z <= 0, leaky_relu scales it unless z > 0."""
    if ACTIVATION == "relu":
        g = tl.where(z <= 0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        g = tl.where(z > 0, dy, 0.01 * dy)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        g = dy * (s * (1.0 + z * (1.0 - s)))
    else:
        g = dy
    return g


@triton.jit
def _pack_signs(
    z, R: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr, ACTIVATION: tl.constexpr
):
    """One bit per element, 1 where dy passes unchanged. A byte holds 8 positions of a plane or channels of a row."""
    if ACTIVATION == "relu":
        bits = tl.where(z <= 0, 0, 1)
    else:
        bits = tl.where(z > 0, 1, 0)
    place = tl.arange(0, 8)
    if PLANES:
        bytes = tl.sum(tl.reshape(bits, (R * UNIT // 8, 8)) << place[None, :], axis=1)[:, None]
    else:
        bytes = tl.sum(tl.reshape(bits, (R, B // 8, 8)) << place[None, None, :], axis=2)
    return bytes.to(tl.uint8)


@triton.jit
def _unpack_signs(bytes, R: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr):
    """The bits as a tile of 0 and 1, which stand in for z."""
    place = tl.arange(0, 8)
    bytes = bytes.to(tl.int32)
    if PLANES:
        bits = tl.reshape((bytes >> place[None, :]) & 1, (R, UNIT))
    else:
        bits = tl.reshape((bytes[:, :, None] >> place[None, None, :]) & 1, (R, B))
    return bits


# --- what stays in registers --------------------------------------------------------------------------------------


@triton.jit
def _hold(tile):
    """A tile (R, W) as it is kept in registers: two-byte types are packed into words of two elements.

    Otherwise the compiler keeps the tile widened to float32, twice the size, and spills. Neighbours in a
    line share a word; where a line is one element, the tile's two halves do, since one thread has both.
    """
    R: tl.constexpr = tile.shape[0]
    W: tl.constexpr = tile.shape[1]
    if tile.dtype.primitive_bitwidth == 16:
        bits = tile.to(tl.uint16, bitcast=True)
        if W > 1:
            low, high = tl.split(tl.reshape(bits, (R, W // 2, 2)))
        else:
            low, high = tl.split(tl.permute(tl.reshape(bits, (2, R // 2, 1)), (1, 2, 0)))
        held = low.to(tl.uint32) | (high.to(tl.uint32) << 16)
    else:
        held = tile
    return held


@triton.jit
def _take(held, opaque_zero, like, W: tl.constexpr, ACC: tl.constexpr):
    """A kept tile, widened. `opaque_zero` is 0, unknown to the compiler, so each pass unpacks the words anew."""
    TYPE: tl.constexpr = like.dtype.element_ty
    if TYPE.primitive_bitwidth == 16:
        words = held ^ opaque_zero
        if TYPE == tl.bfloat16:
            low = (words << 16).to(tl.float32, bitcast=True)
            high = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            low = words.to(tl.uint16).to(TYPE, bitcast=True).to(ACC)
            high = (words >> 16).to(tl.uint16).to(TYPE, bitcast=True).to(ACC)
        pairs = tl.join(low, high)
        if W > 1:
            tile = tl.reshape(pairs, (held.shape[0], W))
        else:
            tile = tl.reshape(tl.permute(pairs, (2, 0, 1)), (2 * held.shape[0], 1))
    else:
        tile = held.to(ACC)
    return tile


# --- exchange within a team ---------------------------------------------------------------------------------------


@triton.jit
def _publish(slot, p, one, two, B: tl.constexpr):
    """Store this program's pair of vectors in the slice's slot (P, 2, B)."""
    at = slot + p * (2 * B) + tl.arange(0, B)[None, :]
    tl.store(at, one)
    tl.store(at + B, two)


@triton.jit
def _barrier(arrived, p, P):
    """Barrier of a team; earlier stores are visible to all its programs after it.

    The counter's high bit flips when P >= 2 programs have arrived, and its low bits return to 0, so that it needs no
    reset (as in cooperative groups' grid.sync). Needs a cooperative launch, in which all programs are resident.
    """
    tl.debug_barrier()
    before = tl.atomic_add(arrived, tl.where(p == 0, 0x7FFFFFFF - (P - 2), 1), sem="release", scope="gpu")
    now = before
    while (before ^ now) >= 0:
        now = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _received(slot, start, P, R: tl.constexpr, B: tl.constexpr):
    """Both vectors (R, B) of a team's programs start, start + 1, ..., 0 beyond the last. Bypasses the L1 cache."""
    q = start + tl.arange(0, R)
    at = slot + (q * (2 * B))[:, None] + tl.arange(0, B)[None, :]
    some = (q < P)[:, None]
    one = tl.load(at, mask=some, other=0.0, cache_modifier=".cg")
    return one, tl.load(at + B, mask=some, other=0.0, cache_modifier=".cg")


@triton.jit
def _shares(start, P, L, H, WIDTH: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr):
    """The number of values (R, 1) of those programs, 0 beyond the last: P is the first that does not exist."""
    q = tl.minimum(start + tl.arange(0, R), P)
    return (_count(q, L, H, R) * WIDTH).to(ACC)[:, None]


@triton.jit
def _publish_moments(slot, p, m, e, m2, B: tl.constexpr):
    """Store this program's mean, as m plus the rounding error e of m, and its squared deviations: (P, 3, B)."""
    at = slot + p * (3 * B) + tl.arange(0, B)[None, :]
    tl.store(at, m)
    tl.store(at + B, e)
    tl.store(at + 2 * B, m2)


@triton.jit
def _received_moments(slot, start, P, first, first_e, R: tl.constexpr, B: tl.constexpr):
    """Means minus the first program's, and squared deviations (R, B), of programs start, start + 1, ...

    The difference of means of similar size is exact, and their rounding errors are added afterwards, so that no digit
    is lost for large means.
    """
    q = start + tl.arange(0, R)
    at = slot + (q * (3 * B))[:, None] + tl.arange(0, B)[None, :]
    some = (q < P)[:, None]
    m = tl.load(at, mask=some, other=0.0, cache_modifier=".cg")
    e = tl.load(at + B, mask=some, other=0.0, cache_modifier=".cg")
    m2 = tl.load(at + 2 * B, mask=some, other=0.0, cache_modifier=".cg")
    return tl.where(some, (m - first) + (e - first_e), 0.0), m2


@triton.jit
def _merge_moments(
    slot, P, L, H, WIDTH: tl.constexpr, R: tl.constexpr, B: tl.constexpr, PLANES: tl.constexpr, ACC: tl.constexpr
):
    """The slice's mean and sum of squared deviations from those of P programs.

    Chan, Golub & LeVeque 1983, eq. 2.1. Offsets are taken from the first program's mean: equal means stay equal.
    """
    first = tl.load(slot + tl.arange(0, B), cache_modifier=".cg")[None, :]
    first_e = tl.load(slot + B + tl.arange(0, B), cache_modifier=".cg")[None, :]
    d, m2 = _received_moments(slot, 0, P, first, first_e, R, B)
    n = _shares(0, P, L, H, WIDTH, R, ACC)
    moved = tl.sum(n * d, axis=0)[None, :]
    if not PLANES:  # for planes a tile has more lines than a team has programs
        for start in range(R, P, R):
            far, _ = _received_moments(slot, start, P, first, first_e, R, B)
            moved += tl.sum(_shares(start, P, L, H, WIDTH, R, ACC) * far, axis=0)[None, :]
    moved = moved / (L * WIDTH)
    d = d - moved
    total = tl.sum(tl.where(n > 0, m2 + n * d * d, 0.0), axis=0)[None, :]
    if not PLANES:
        for start in range(R, P, R):
            far, m2 = _received_moments(slot, start, P, first, first_e, R, B)
            more = _shares(start, P, L, H, WIDTH, R, ACC)
            far = far - moved
            total += tl.sum(tl.where(more > 0, m2 + more * far * far, 0.0), axis=0)[None, :]
    return first + (first_e + moved), total


@triton.jit
def _merge_sums(slot, P, R: tl.constexpr, B: tl.constexpr, PLANES: tl.constexpr):
    """The two sums over P programs, in a fixed order."""
    one, two = _received(slot, 0, P, R, B)
    one = tl.sum(one, axis=0)[None, :]
    two = tl.sum(two, axis=0)[None, :]
    if not PLANES:  # for planes a tile has more lines than a team has programs
        for start in range(R, P, R):
            more, and_more = _received(slot, start, P, R, B)
            one += tl.sum(more, axis=0)[None, :]
            two += tl.sum(and_more, axis=0)[None, :]
    return one, two


# --- forward ------------------------------------------------------------------------------------------------------


@triton.jit
def _overflow_moments(
    x, c, inside, m, e, m2, n, first, end, H, channels, units, magic, shift,
    WIDTH: tl.constexpr, R: tl.constexpr, B: tl.constexpr, K: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """e and squared deviations of the n resident values, whose mean is m + e, merged with the tiles beyond K.

    Each position of a tile keeps a running mean (Welford 1962) of the values minus m, which float32 holds to more
    digits; then the positions and the resident values are merged as in _merge_moments.
    """
    mean = tl.zeros((R, UNIT if PLANES else B), ACC)
    sq = tl.zeros((R, UNIT if PLANES else B), ACC)
    here = tl.zeros((R, 1), ACC)
    for j in range(K, H):
        i = _lines(first, j, R)
        at = _offsets(i, c, units, channels, magic, shift, UNIT, PLANES, WIDE)
        valid = (i < end)[:, None] & inside
        tile = tl.load(x + at, mask=valid, other=0.0, eviction_policy="evict_last").to(ACC)
        here += tl.where(i < end, 1.0, 0.0)[:, None]
        tile = tl.where(valid, tile - m, mean)
        d = tile - mean
        mean += d / (j - K + 1)
        sq += d * (tile - mean)
    more = tl.sum(here) * WIDTH
    offset = _sum(_fold(here * mean, PLANES)) / tl.maximum(more, 1.0)
    d = mean - offset
    offset = tl.where(more > 0, offset - e, 0.0)
    m2 += _sum(_fold(sq + here * d * d, PLANES)) + offset * offset * (n * more / (n + more))
    return e + offset * (more / (n + more)), m2


@triton.jit
def _update_running(running, batch, momentum, mask, ACC: tl.constexpr):
    """running = (1 - momentum) running + momentum batch, in place."""
    old = tl.load(running, mask=mask, other=0.0).to(ACC)
    tl.store(running, ((1.0 - momentum) * old + momentum * batch).to(running.dtype.element_ty), mask=mask)


@triton.jit
def _write(
    tile, i, c, inside, m, scale, b, residual, y, signs, end, L, channels, units, magic, shift,
    R: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, SIGNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """activation((tile - mean) scale + bias + residual), and the signs where they are kept."""
    at = _offsets(i, c, units, channels, magic, shift, UNIT, PLANES, WIDE)
    valid = (i < end)[:, None] & inside
    z = _preactivation(tile, m, scale, b)
    if RESIDUAL:
        z += tl.load(residual + at, mask=valid, other=0.0, eviction_policy="evict_first").to(ACC)
    if SIGNS:
        where, exist = _sign_offsets(i, c, channels, end, L, R, B, UNIT, PLANES)
        tl.store(signs + where, _pack_signs(z, R, B, UNIT, PLANES, ACTIVATION), mask=exist)
    tl.store(y + at, _activate(z, ACTIVATION).to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=RUNTIME)
def forward(
    x, residual, weight, bias, y, mean, var, signs, running_mean, running_var, partial, arrived, momentum, unbiased,
    channels, units, magic, shift, opaque_zero, L, H, P, teams, slices,
    EPS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, K: tl.constexpr, UNIT: tl.constexpr,
    PLANES: tl.constexpr, WIDE: tl.constexpr, OVERFLOW: tl.constexpr, STAGE: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SIGNS: tl.constexpr,
    TRACK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = activation((x - mean) / sqrt(var + eps) weight + bias + residual); mean and var (C) are written, or read.

    TRACK: running_mean and running_var are updated by `momentum`, the variance times `unbiased`, m / (m - 1).
    """
    WIDTH: tl.constexpr = UNIT if PLANES else 1
    W: tl.constexpr = UNIT if PLANES else B
    program = tl.program_id(0)
    if STAGE == "normalize":  # begin with what the previous launch read last: it is still in the cache
        program = teams * P - 1 - program
    p = program % P
    for slice in range(program // P, slices, teams):
        # `first` depends on the slice, or the compiler would compute all addresses before the loop, and spill.
        first = p * (H * R) + slice * opaque_zero
        end = tl.minimum(first + H * R, L)
        c, inside = _channels(slice, channels, units, B, UNIT, PLANES)
        slot = partial + slice * P * (3 * B)
        held = ()
        for k in tl.static_range(K):
            i = _lines(first, k, R)
            at = _offsets(i, c, units, channels, magic, shift, UNIT, PLANES, WIDE)
            held = held + (_hold(tl.load(x + at, mask=(i < end)[:, None] & inside, other=0.0)),)
        if STAGE == "frozen":
            m = tl.load(mean + c, mask=inside, other=0.0).to(ACC)
            v = tl.load(var + c, mask=inside, other=0.0).to(ACC)
        else:
            if STAGE != "normalize":
                # Two passes over registers, corrected (Chan, Golub & LeVeque 1983, eq. 1.7): the mean of the
                # deviations is the mean's own rounding error, and is taken out of both.
                n = (tl.minimum(end - first, K * R) * WIDTH).to(ACC)
                total = _fold(_take(held[0], 0, x, W, ACC), PLANES)
                for k in tl.static_range(1, K):
                    total += _fold(_take(held[k], 0, x, W, ACC), PLANES)
                m = _sum(total) / n
                d1 = tl.zeros(total.shape, ACC)
                d2 = tl.zeros(total.shape, ACC)
                for k in tl.static_range(K):
                    mine = (_lines(first + opaque_zero, k, R) < end)[:, None]
                    d = tl.where(mine, _take(held[k], opaque_zero, x, W, ACC) - m, 0.0)
                    d1 += _fold(d, PLANES)
                    d2 += _fold(d * d, PLANES)
                s = _sum(d1)
                m2 = _sum(d2)
                m2 = tl.where(m2 == float("inf"), m2, m2 - s * (s / n))  # squares of 1e30 overflow, and y is the bias
                e = s / n
                if OVERFLOW:
                    e, m2 = _overflow_moments(
                        x, c, inside, m, e, m2, n, first, end, H, channels, units, magic, shift,
                        WIDTH, R, B, K, UNIT, PLANES, WIDE, ACC,
                    )  # fmt: skip
            if STAGE == "team" or STAGE == "statistics":
                _publish_moments(slot, p, m, e, m2, B)
            if STAGE == "alone":
                m += e
            if STAGE == "team":
                _barrier(arrived + (program // P) * 32, p, P)
            if STAGE == "team" or STAGE == "normalize":
                m, m2 = _merge_moments(slot, P, L, H, WIDTH, R, B, PLANES, ACC)
            v = m2 / (L * WIDTH)
            v = tl.where(v < 0, 0.0, v)
            if STAGE != "statistics":
                one = inside & (p == 0)
                tl.store(mean + c, m, mask=one)
                tl.store(var + c, v, mask=one)
                if TRACK:
                    _update_running(running_mean + c, m, momentum, one, ACC)
                    _update_running(running_var + c, v * unbiased, momentum, one, ACC)
        if STAGE != "statistics":
            scale = _reciprocal_deviation(v, EPS, ACC) * _pick(weight, c, inside, 1.0, WEIGHT, ACC)
            b = _pick(bias, c, inside, 0.0, BIAS, ACC)
            if OVERFLOW:
                for back in range(1, H - K + 1):  # the last read first: it is still in the cache
                    i = _lines(first, H - back, R)
                    at = _offsets(i, c, units, channels, magic, shift, UNIT, PLANES, WIDE)
                    valid = (i < end)[:, None] & inside
                    _write(
                        tl.load(x + at, mask=valid, other=0.0, eviction_policy="evict_first").to(ACC),
                        i, c, inside, m, scale, b, residual, y, signs, end, L, channels, units, magic, shift,
                        R, B, UNIT, PLANES, WIDE, ACTIVATION, RESIDUAL, SIGNS, ACC,
                    )  # fmt: skip
            for k in tl.static_range(K):
                _write(
                    _take(held[k], opaque_zero + opaque_zero, x, W, ACC),
                    _lines(first + opaque_zero + opaque_zero, k, R),
                    c, inside, m, scale, b, residual, y, signs, end, L, channels, units, magic, shift,
                    R, B, UNIT, PLANES, WIDE, ACTIVATION, RESIDUAL, SIGNS, ACC,
                )  # fmt: skip


# --- backward -----------------------------------------------------------------------------------------------------


@triton.jit
def _gradient(
    g, tile, i, c, inside, m, scale, b, residual, signs, end, L, channels, units, magic, shift,
    R: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, SIGNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of dy times the activation's derivative. The pre-activation is recomputed, or its sign read."""
    if ACTIVATION != "none":
        if SIGNS:
            where, exist = _sign_offsets(i, c, channels, end, L, R, B, UNIT, PLANES)
            z = _unpack_signs(tl.load(signs + where, mask=exist, other=0), R, B, UNIT, PLANES)
        else:
            z = _preactivation(tile, m, scale, b)
            if RESIDUAL:
                at = _offsets(i, c, units, channels, magic, shift, UNIT, PLANES, WIDE)
                z += tl.load(residual + at, mask=(i < end)[:, None] & inside, other=0.0).to(ACC)
        g = _through_activation(g, z, ACTIVATION)
    return g


@triton.jit
def _write_back(
    g, tile, at, valid, m, scale, g_mean, slope, dx, dr, FROZEN: tl.constexpr, RESIDUAL_GRADIENT: tl.constexpr
):  # fmt: skip
    """dx = (g - mean(g) - xhat mean(g xhat)) scale (Ioffe & Szegedy 2015, section 3), and dresidual = g."""
    if RESIDUAL_GRADIENT:
        tl.store(dr + at, g.to(dr.dtype.element_ty), mask=valid)
    if not FROZEN:
        g = g - g_mean - (tile - m) * slope
    tl.store(dx + at, (g * scale).to(dx.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=RUNTIME)
def backward(
    dy, x, residual, weight, bias, mean, var, signs, dx, dr, dweight, dbias, partial, arrived,
    channels, units, magic, shift, opaque_zero, L, H, P, teams, slices,
    EPS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, K: tl.constexpr, UNIT: tl.constexpr,
    PLANES: tl.constexpr, WIDE: tl.constexpr, OVERFLOW: tl.constexpr, STAGE: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SIGNS: tl.constexpr,
    RESIDUAL_GRADIENT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx, dresidual (like x), dweight and dbias (C). With "frozen" the sums stay in `partial` (slices, P, 2, B)."""
    WIDTH: tl.constexpr = UNIT if PLANES else 1
    W: tl.constexpr = UNIT if PLANES else B
    FROZEN: tl.constexpr = STAGE == "frozen"
    program = tl.program_id(0)
    if STAGE == "normalize":
        program = teams * P - 1 - program
    p = program % P
    for slice in range(program // P, slices, teams):
        # `first` depends on the slice, or the compiler would compute all addresses before the loop, and spill.
        first = p * (H * R) + slice * opaque_zero
        end = tl.minimum(first + H * R, L)
        c, inside = _channels(slice, channels, units, B, UNIT, PLANES)
        slot = partial + slice * P * (2 * B)
        m = tl.load(mean + c, mask=inside, other=0.0).to(ACC)
        r = _reciprocal_deviation(tl.load(var + c, mask=inside, other=1.0).to(ACC), EPS, ACC)
        scale = r * _pick(weight, c, inside, 1.0, WEIGHT, ACC)
        b = _pick(bias, c, inside, 0.0, BIAS, ACC)
        held_x = ()
        held_dy = ()
        for k in tl.static_range(K):
            i = _lines(first, k, R)
            at = _offsets(i, c, units, channels, magic, shift, UNIT, PLANES, WIDE)
            valid = (i < end)[:, None] & inside
            held_x = held_x + (_hold(tl.load(x + at, mask=valid, other=0.0)),)
            held_dy = held_dy + (_hold(tl.load(dy + at, mask=valid, other=0.0)),)
        one = tl.zeros((1, B), ACC)
        two = tl.zeros((1, B), ACC)
        if STAGE != "normalize":
            s1 = tl.zeros((R, 1 if PLANES else B), ACC)
            s2 = tl.zeros((R, 1 if PLANES else B), ACC)
            for k in tl.static_range(K):
                i = _lines(first, k, R)
                tile = _take(held_x[k], 0, x, W, ACC)
                g = _gradient(
                    _take(held_dy[k], 0, x, W, ACC), tile, i, c, inside, m, scale, b, residual, signs,
                    end, L, channels, units, magic, shift,
                    R, B, UNIT, PLANES, WIDE, ACTIVATION, RESIDUAL, SIGNS, ACC,
                )  # fmt: skip
                s1 += _fold(g, PLANES)
                s2 += _fold(g * (tile - m), PLANES)
            if OVERFLOW:
                for j in range(K, H):
                    i = _lines(first, j, R)
                    at = _offsets(i, c, units, channels, magic, shift, UNIT, PLANES, WIDE)
                    valid = (i < end)[:, None] & inside
                    tile = tl.load(x + at, mask=valid, other=0.0, eviction_policy="evict_last").to(ACC)
                    g = _gradient(
                        tl.load(dy + at, mask=valid, other=0.0, eviction_policy="evict_last").to(ACC), tile,
                        i, c, inside, m, scale, b, residual, signs, end, L, channels, units, magic, shift,
                        R, B, UNIT, PLANES, WIDE, ACTIVATION, RESIDUAL, SIGNS, ACC,
                    )  # fmt: skip
                    s1 += _fold(g, PLANES)
                    s2 += _fold(g * (tile - m), PLANES)
            one = _sum(s1)
            two = _sum(s2)
            if STAGE != "alone":
                _publish(slot, p, one, two * r if FROZEN else two, B)
        if STAGE == "team":
            _barrier(arrived + (program // P) * 32, p, P)
        if STAGE == "team" or STAGE == "normalize":
            one, two = _merge_sums(slot, P, R, B, PLANES)
        if STAGE == "alone" or STAGE == "team" or STAGE == "normalize":
            tl.store(dbias + c, one.to(dbias.dtype.element_ty), mask=inside & (p == 0))
            tl.store(dweight + c, (two * r).to(dweight.dtype.element_ty), mask=inside & (p == 0))
        if STAGE != "statistics":
            g_mean = one / (L * WIDTH)
            slope = two * r * r / (L * WIDTH)
            if OVERFLOW:
                for back in range(1, H - K + 1):
                    i = _lines(first, H - back, R)
                    at = _offsets(i, c, units, channels, magic, shift, UNIT, PLANES, WIDE)
                    valid = (i < end)[:, None] & inside
                    tile = tl.load(x + at, mask=valid, other=0.0, eviction_policy="evict_first").to(ACC)
                    g = _gradient(
                        tl.load(dy + at, mask=valid, other=0.0, eviction_policy="evict_first").to(ACC), tile,
                        i, c, inside, m, scale, b, residual, signs, end, L, channels, units, magic, shift,
                        R, B, UNIT, PLANES, WIDE, ACTIVATION, RESIDUAL, SIGNS, ACC,
                    )  # fmt: skip
                    _write_back(g, tile, at, valid, m, scale, g_mean, slope, dx, dr, FROZEN, RESIDUAL_GRADIENT)
            for k in tl.static_range(K):
                i = _lines(first + opaque_zero, k, R)
                tile = _take(held_x[k], opaque_zero, x, W, ACC)
                g = _gradient(
                    _take(held_dy[k], opaque_zero, x, W, ACC), tile, i, c, inside, m, scale, b, residual, signs,
                    end, L, channels, units, magic, shift,
                    R, B, UNIT, PLANES, WIDE, ACTIVATION, RESIDUAL, SIGNS, ACC,
                )  # fmt: skip
                at = _offsets(i, c, units, channels, magic, shift, UNIT, PLANES, WIDE)
                valid = (i < end)[:, None] & inside
                _write_back(g, tile, at, valid, m, scale, g_mean, slope, dx, dr, FROZEN, RESIDUAL_GRADIENT)


# Whether these run in Triton's interpreter. Triton decided that when it was first imported.
INTERPRETED = not (isinstance(forward, triton.JITFunction) and isinstance(tl.sum, triton.JITFunction))
if INTERPRETED:  # NumPy warns of infinity and NaN, unlike a GPU
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
