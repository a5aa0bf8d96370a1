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
registers; m v the mean and biased variance; z the pre-activation; g the loss's gradient in it; o element offsets of a
tile and valid which of them exist. Vectors over a slice's channels are (1, 1) for planes and (1, B) for rows.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Arguments that differ between shapes without a recompilation.
RUNTIME = ("channels", "units", "magic", "shift", "opaque_zero", "L", "H", "P", "teams", "slices")

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Form(NamedTuple):
    """What a kernel is compiled for, beside its stage and what is fused."""

    R: int  # lines of a tile
    B: int  # channels of a slice
    K: int  # tiles that stay in registers
    UNIT: int  # elements of an aligned run
    PLANES: bool
    WIDE: bool  # 64-bit offsets
    OVERFLOW: bool  # some program has more than K tiles
    ACC: tl.dtype  # of the arithmetic

    @property
    def W(self) -> int:
        """Elements of a line."""
        return self.UNIT if self.PLANES else self.B


class Part(NamedTuple):
    """The part of a slice that a program processes, and the sizes of x, which differ between calls."""

    slice: Any
    first: Any  # its lines, up to `end`
    end: Any
    c: Any  # the slice's channels (1, B)
    inside: Any  # which of them exist
    channels: Any  # C
    units: Any  # S / UNIT lines of a plane, or C / UNIT runs of a row
    magic: Any  # i // units is umulhi(2 i, magic) >> shift
    shift: Any
    L: Any


class Affine(NamedTuple):
    """(x - m) scale + b for the channels of a slice."""

    m: Any
    scale: Any
    b: Any


# --- where things are ---------------------------------------------------------------------------------------------


@triton.jit
def _part(slice, p, channels, units, magic, shift, opaque_zero, L, H, FORM: tl.constexpr):
    """Program p's part of a slice, and the offset of the slice's first element.

    Which channels exist is by units: by elements it would make accesses narrow. `first` depends on the slice, or the
    compiler would compute all addresses before the loop over slices, and spill.
    """
    first = p * (H * FORM.R) + slice * opaque_zero
    end = tl.minimum(first + H * FORM.R, L)
    c = (slice * FORM.B + tl.arange(0, FORM.B))[None, :]
    if FORM.PLANES:
        inside = c >= 0
        start = tl.full((), slice, tl.int64) * (units * FORM.UNIT)
    else:
        inside = c // FORM.UNIT < units
        start = tl.full((), slice, tl.int64) * FORM.B
    return Part(slice, first, end, c, inside, channels, units, magic, shift, L), start


@triton.jit
def _offsets(i, part, FORM: tl.constexpr):
    """Offsets (R, 1) of lines i (R) from the slice's first element.

    Planes: a line's example is i // units, by a product with the rounded-up reciprocal (Granlund & Montgomery 1994).
    Rows: units = C / UNIT, so that the compiler sees that a row is aligned.
    """
    line = i.to(tl.int64 if FORM.WIDE else tl.int32)
    if FORM.PLANES:
        n = (tl.umulhi((i * 2).to(tl.uint32), part.magic.to(tl.uint32)) >> part.shift).to(line.dtype)
        unit = line + n * ((part.channels - 1).to(line.dtype) * part.units)
    else:
        unit = line * part.units
    return (unit.to(tl.int64) * FORM.UNIT)[:, None]


@triton.jit
def _lines(part, k, FORM: tl.constexpr):
    """The lines (R) of a program's tile k, and (R, 1) whether it has them."""
    R: tl.constexpr = FORM.R
    i = part.first + k * R + tl.arange(0, R)
    return i, (i < part.end)[:, None]


@triton.jit
def _tile(part, k, FORM: tl.constexpr):
    """The offsets (R, W) of tile k and which exist."""
    W: tl.constexpr = FORM.W
    i, present = _lines(part, k, FORM)
    return _offsets(i, part, FORM) + tl.arange(0, W)[None, :], present & part.inside


@triton.jit
def _read(x, part, k, EVICTION: tl.constexpr, FORM: tl.constexpr):
    """Tile k of x, from the slice's first element; 0 where it has no element."""
    o, valid = _tile(part, k, FORM)
    return tl.load(x + o, mask=valid, other=0.0, eviction_policy=EVICTION)


@triton.jit
def _sign_offsets(part, k, FORM: tl.constexpr):
    """Offsets of a tile's bytes of signs, planes (C, ceil(L UNIT / 8)) or rows (M, ceil(C / 8)); which exist."""
    if FORM.PLANES:
        j = ((part.first + k * FORM.R) * FORM.UNIT // 8 + tl.arange(0, FORM.R * FORM.UNIT // 8))[:, None]
        o = j + part.c.to(tl.int64) * ((part.L * FORM.UNIT + 7) // 8)
        valid = j < (part.end * FORM.UNIT + 7) // 8
    else:
        i, present = _lines(part, k, FORM)
        stride = (part.channels + 7) // 8
        b = (part.slice * (FORM.B // 8) + tl.arange(0, FORM.B // 8))[None, :]
        o = (i.to(tl.int64) * stride)[:, None] + b
        valid = present & (b < stride)
    return o, valid


@triton.jit
def _pick(vector, c, inside, other: tl.constexpr, HAS: tl.constexpr, ACC: tl.constexpr):
    """The entries c of a vector (C) in the accumulation type; `other` where there is no vector."""
    return tl.load(vector + c, mask=inside, other=other).to(ACC) if HAS else tl.full(c.shape, other, ACC)


# --- arithmetic that both directions share ------------------------------------------------------------------------


@triton.jit
def _fold(tile, PLANES: tl.constexpr):
    """A tile's part of a running sum: in planes one thread adds up a line's values."""
    return tl.sum(tile, axis=1, keep_dims=True) if PLANES else tile


@triton.jit
def _totals(one, two):
    """The sums of two tiles over a slice's channels."""
    return tl.sum(one, axis=0, keep_dims=True), tl.sum(two, axis=0, keep_dims=True)


@triton.jit
def _affine(tile, affine):
    """(x - m) scale + b, rounded the same way in both directions, so that backward recomputes the same sign.

    x scale + (b - m scale) would be one operation less, but wrong by 0.1 where a channel is constant at 10,000.
    """
    d = tile - affine.m
    return tl.fma(d, tl.broadcast_to(affine.scale, d.shape), tl.broadcast_to(affine.b, d.shape))


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """NaN passes through, as in torch."""
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
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
def _pack_signs(z, FORM: tl.constexpr, ACTIVATION: tl.constexpr):
    """One bit per element, 1 where dy passes unchanged. A byte holds 8 positions of a plane or channels of a row."""
    BYTES: tl.constexpr = FORM.R * FORM.W // 8
    LINES: tl.constexpr = BYTES if FORM.PLANES else FORM.R
    bits = tl.where(z <= 0, 0, 1) if ACTIVATION == "relu" else tl.where(z > 0, 1, 0)
    bytes = tl.sum(tl.reshape(bits, (BYTES, 8)) << tl.arange(0, 8)[None, :], axis=1)
    return tl.reshape(bytes, (LINES, BYTES // LINES)).to(tl.uint8)


@triton.jit
def _unpack_signs(bytes, FORM: tl.constexpr):
    """The bits as a tile of 0 and 1, which stand in for z."""
    R: tl.constexpr = FORM.R
    W: tl.constexpr = FORM.W
    bits = (tl.reshape(bytes.to(tl.int32), (R * W // 8, 1)) >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(bits, (R, W))


# --- what stays in registers --------------------------------------------------------------------------------------


@triton.jit
def _hold(tile, TYPE: tl.constexpr):
    """A tile (R, W) of TYPE's digits as it is kept in registers: 16-bit types are packed into words of two elements.

    Otherwise the compiler keeps the tile widened to float32, twice the size, and spills. Neighbours in a
    line share a word; where a line is one element, the tile's two halves do, since one thread has both.
    """
    R: tl.constexpr = tile.shape[0]
    W: tl.constexpr = tile.shape[1]
    if TYPE.primitive_bitwidth == 16:
        WIDENED: tl.constexpr = tile.dtype == tl.float32 and TYPE == tl.bfloat16  # bfloat16 is float32's upper half
        bits = tile.to(tl.uint32, bitcast=True) if WIDENED else tile.to(TYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
        pairs = tl.reshape(bits, (R, W // 2, 2)) if W > 1 else tl.permute(tl.reshape(bits, (2, R // 2, 1)), (1, 2, 0))
        low, high = tl.split(pairs)
        held = (low >> 16) | (high & 0xFFFF0000) if WIDENED else low | (high << 16)
    else:
        held = tile
    return held


@triton.jit
def _take(held, zero, TYPE: tl.constexpr, FORM: tl.constexpr):
    """A kept tile, widened. zero: 0, unknown to the compiler in a second pass, which then unpacks the words anew."""
    R: tl.constexpr = FORM.R
    W: tl.constexpr = FORM.W
    if TYPE.primitive_bitwidth == 16:
        if TYPE == tl.bfloat16:
            low = (held << (16 + zero)).to(tl.float32, bitcast=True)
            high = ((held ^ zero) & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            low = (held ^ zero).to(tl.uint16).to(TYPE, bitcast=True).to(FORM.ACC)
            high = (held >> (16 + zero)).to(tl.uint16).to(TYPE, bitcast=True).to(FORM.ACC)
        pairs = tl.join(low, high)
        tile = tl.reshape(pairs if W > 1 else tl.permute(pairs, (2, 0, 1)), (R, W))
    else:
        tile = held.to(FORM.ACC)
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
    reset (as in cooperative groups' grid.sync). Needs a cooperative launch, in which all programs are resident. The
    two debug_barriers are needed: the compiler orders no other thread's accesses to memory with these atomics.
    """
    tl.debug_barrier()
    before = tl.atomic_add(arrived, tl.where(p == 0, 0x7FFFFFFF - (P - 2), 1), sem="release", scope="gpu")
    now = before
    while (before ^ now) >= 0:
        now = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _merge(slot, P, FORM: tl.constexpr):
    """The two sums over a team's P programs, in a fixed order. Bypasses the L1 cache, which may hold older values."""
    R: tl.constexpr = FORM.R
    B: tl.constexpr = FORM.B
    one = tl.zeros((R, B), FORM.ACC)
    two = tl.zeros((R, B), FORM.ACC)
    for first in range(0, R if FORM.PLANES else P, R):  # for planes a tile has more lines than a team has programs
        q = first + tl.arange(0, R)[:, None]
        at = slot + q * (2 * B) + tl.arange(0, B)[None, :]
        one += tl.load(at, mask=q < P, other=0.0, cache_modifier=".cg")
        two += tl.load(at + B, mask=q < P, other=0.0, cache_modifier=".cg")
    return _totals(one, two)


# --- forward ------------------------------------------------------------------------------------------------------


@triton.jit
def _samples(x, part, FORM: tl.constexpr):
    """32 values (32, B) of each channel, spread over the slice and over positions, the same for all its programs."""
    n = tl.arange(0, 32)
    stride = part.L // 32
    i = tl.minimum(n * tl.maximum(stride, 1), part.L - 1) + (n * 11 % 32) * (stride // 32)
    return tl.load(x + _offsets(i, part, FORM) + tl.arange(0, FORM.B)[None, :], mask=part.inside, other=0.0)


@triton.jit
def _pivot(few, ACC: tl.constexpr):
    """The samples' mean (1, B), which statistics are summed about; 0 where it is not finite.

    The variance's error grows with (pivot - mean)^2 / variance: below 1 unless outliers are more frequent among the
    samples than elsewhere, n / 1024 if one of n values is an outlier and a sample, n / 32 at most.
    """
    pivot = tl.sum(few.to(ACC), axis=0, keep_dims=True) / 32
    return tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)


@triton.jit
def _moments(tile, part, k, pivot, one, two, FORM: tl.constexpr):
    """one and two with tile k's x - pivot and its square added. Absent elements are 0, and no pivot is taken off."""
    _, present = _lines(part, k, FORM)
    taken = tl.broadcast_to(tl.where(present, 1.0, 0.0).to(FORM.ACC), tile.shape)
    d = tl.fma(tl.broadcast_to(-pivot, tile.shape), taken, tile)
    return one + _fold(d, FORM.PLANES), two + _fold(d * d, FORM.PLANES)


@triton.jit
def _write(
    tile, part, k, affine, residual, y, signs,
    FORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    """y of tile k, and the signs where they are kept."""
    o, valid = _tile(part, k, FORM)
    z = _affine(tile, affine)
    if RESIDUAL:
        z += tl.load(residual + o, mask=valid, other=0.0, eviction_policy="evict_first").to(FORM.ACC)
    if SIGNS:
        o_signs, some = _sign_offsets(part, k, FORM)
        tl.store(signs + o_signs, _pack_signs(z, FORM, ACTIVATION), mask=some)
    tl.store(y + o, _activate(z, ACTIVATION).to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=RUNTIME)
def forward(
    x, residual, weight, bias, y, mean, var, signs, running_mean, running_var, partial, arrived, momentum, unbiased,
    channels, units, magic, shift, opaque_zero, L, H, P, teams, slices,
    FORM: tl.constexpr, EPS: tl.constexpr, STAGE: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SIGNS: tl.constexpr, TRACK: tl.constexpr,
):  # fmt: skip
    """y = activation((x - mean) / sqrt(var + eps) weight + bias + residual); mean and var (C) are written, or read.

    TRACK: running_mean and running_var are updated by `momentum`, the variance times `unbiased`, m / (m - 1).
    """
    TYPE: tl.constexpr = x.dtype.element_ty
    ACC: tl.constexpr = FORM.ACC
    R: tl.constexpr = FORM.R
    B: tl.constexpr = FORM.B
    K: tl.constexpr = FORM.K
    program = tl.program_id(0)
    if STAGE == "normalize":  # begin with what the previous launch read last: it is still in the cache
        program = teams * P - 1 - program
    team = program // P
    p = program - team * P
    for slice in range(team, slices, teams):
        part, start = _part(slice, p, channels, units, magic, shift, opaque_zero, L, H, FORM)
        c, inside, writes = part.c, part.inside, part.inside & (p == 0)
        xs, ys, residuals = x + start, y + start, residual + start
        slot = partial + slice * P * (2 * B)
        if STAGE != "frozen":
            few = _samples(xs, part, FORM)
        held = ()
        for k in tl.static_range(K):
            held = held + (_hold(_read(xs, part, k, "", FORM), TYPE),)
        if STAGE == "frozen":
            m = _pick(mean, c, inside, 0.0, True, ACC)
            v = _pick(var, c, inside, 0.0, True, ACC)
            w = _pick(weight, c, inside, 1.0, WEIGHT, ACC)
            b = _pick(bias, c, inside, 0.0, BIAS, ACC)
        else:
            pivot = _pivot(few, ACC)
            if STAGE != "normalize":
                one = tl.zeros((R, B), ACC)
                two = tl.zeros((R, B), ACC)
                for k in tl.static_range(K):
                    one, two = _moments(_take(held[k], 0, TYPE, FORM), part, k, pivot, one, two, FORM)
                if FORM.OVERFLOW:
                    for j in tl.range(K, H, num_stages=3):
                        tile = _read(xs, part, j, "evict_last", FORM).to(ACC)
                        one, two = _moments(tile, part, j, pivot, one, two, FORM)
                one, two = _totals(one, two)
            if STAGE == "team" or STAGE == "statistics":
                _publish(slot, p, one, two, B)
            w = _pick(weight, c, inside, 1.0, WEIGHT, ACC)
            b = _pick(bias, c, inside, 0.0, BIAS, ACC)
            old_mean = _pick(running_mean, c, writes, 0.0, TRACK, ACC)
            old_var = _pick(running_var, c, writes, 0.0, TRACK, ACC)
            if STAGE == "team":
                _barrier(arrived + team * 32, p, P)
            if STAGE == "team" or STAGE == "normalize":
                one, two = _merge(slot, P, FORM)
            share = 1.0 / (L * (FORM.W // B)).to(ACC)
            m = pivot + one * share
            # Squares of 1e30 overflow: the variance is infinite and y is the bias. NaN beside an infinite value.
            v = tl.where(two == float("inf"), two + 0.0 * one, (two - one * (one * share)) * share)
            v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if STAGE != "statistics":
                tl.store(mean + c, m, mask=writes)
                tl.store(var + c, v, mask=writes)
                if TRACK:
                    new_mean = (1.0 - momentum) * old_mean + momentum * m
                    new_var = (1.0 - momentum) * old_var + momentum * (v * unbiased)
                    tl.store(running_mean + c, new_mean.to(running_mean.dtype.element_ty), mask=writes)
                    tl.store(running_var + c, new_var.to(running_var.dtype.element_ty), mask=writes)
        if STAGE != "statistics":
            affine = Affine(m, tl.rsqrt(v + EPS) * w, b)
            if FORM.OVERFLOW:
                for back in tl.range(1, H - K + 1, num_stages=3):  # the last read first: it is still in the cache
                    tile = _read(xs, part, H - back, "evict_first", FORM).to(ACC)
                    _write(tile, part, H - back, affine, residuals, ys, signs, FORM, ACTIVATION, RESIDUAL, SIGNS)
            for k in tl.static_range(K):
                tile = _take(held[k], opaque_zero, TYPE, FORM)
                _write(tile, part, k, affine, residuals, ys, signs, FORM, ACTIVATION, RESIDUAL, SIGNS)


# --- backward -----------------------------------------------------------------------------------------------------


@triton.jit
def _gradient(
    dy, tile, part, k, affine, residual, signs,
    FORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    """Tile k of dy times the activation's derivative. The pre-activation is recomputed, or its sign read."""
    z = dy
    if SIGNS:
        o, some = _sign_offsets(part, k, FORM)
        z = _unpack_signs(tl.load(signs + o, mask=some, other=0), FORM)
    elif ACTIVATION != "none":
        z = _affine(tile, affine)
        if RESIDUAL:
            z += _read(residual, part, k, "", FORM).to(FORM.ACC)
    return _through_activation(dy, z, ACTIVATION)


@triton.jit
def _write_back(
    g, tile, part, k, scale, slope, dx, dr, FORM: tl.constexpr, FROZEN: tl.constexpr, RESIDUAL_GRADIENT: tl.constexpr
):
    """dx = g scale + (x - m) slope + level of tile k, and dresidual = g. slope: an Affine of m, slope and level."""
    o, valid = _tile(part, k, FORM)
    if RESIDUAL_GRADIENT:
        tl.store(dr + o, g.to(dr.dtype.element_ty), mask=valid)
    if FROZEN:
        d = g * scale
    else:
        d = tl.fma(g, tl.broadcast_to(scale, g.shape), _affine(tile, slope))
    tl.store(dx + o, d.to(dx.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=RUNTIME)
def backward(
    dy, x, residual, weight, bias, mean, var, signs, dx, dr, dweight, dbias, partial, arrived,
    channels, units, magic, shift, opaque_zero, L, H, P, teams, slices,
    FORM: tl.constexpr, EPS: tl.constexpr, STAGE: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SIGNS: tl.constexpr, RESIDUAL_GRADIENT: tl.constexpr,
):  # fmt: skip
    """dx, dresidual (like x), dweight and dbias (C). With "frozen" the sums stay in `partial` (slices, P, 2, B)."""
    TYPE: tl.constexpr = x.dtype.element_ty
    ACC: tl.constexpr = FORM.ACC
    R: tl.constexpr = FORM.R
    B: tl.constexpr = FORM.B
    K: tl.constexpr = FORM.K
    FROZEN: tl.constexpr = STAGE == "frozen"
    # Where g has dy's digits it takes dy's place in registers after the first pass.
    KEEP_G: tl.constexpr = ACTIVATION == "relu" and STAGE != "normalize"
    program = tl.program_id(0)
    if STAGE == "normalize":
        program = teams * P - 1 - program
    team = program // P
    p = program - team * P
    for slice in range(team, slices, teams):
        part, start = _part(slice, p, channels, units, magic, shift, opaque_zero, L, H, FORM)
        c, inside, writes = part.c, part.inside, part.inside & (p == 0)
        xs, dys, residuals = x + start, dy + start, residual + start
        slot = partial + slice * P * (2 * B)
        one = tl.zeros((R, B), ACC)
        two = tl.zeros((R, B), ACC)
        held = ()
        held_g = ()
        for k in tl.static_range(K):
            held = held + (_hold(_read(xs, part, k, "", FORM), TYPE),)
            held_g = held_g + (_hold(_read(dys, part, k, "", FORM), TYPE),)
        tl.debug_barrier()  # or the compiler would put loads off until after the first tiles' arithmetic
        m = _pick(mean, c, inside, 0.0, True, ACC)
        r = tl.rsqrt(_pick(var, c, inside, 1.0, True, ACC) + EPS)
        w = _pick(weight, c, inside, 1.0, WEIGHT, ACC)
        b = _pick(bias, c, inside, 0.0, BIAS, ACC)
        affine = Affine(m, r * w, b)
        if STAGE != "normalize":  # absent elements have dy = 0, so g = 0
            gated = ()
            for k in tl.static_range(K):
                tile = _take(held[k], 0, TYPE, FORM)
                g = _take(held_g[k], 0, TYPE, FORM)
                g = _gradient(g, tile, part, k, affine, residuals, signs, FORM, ACTIVATION, RESIDUAL, SIGNS)
                one += _fold(g, FORM.PLANES)
                two += _fold(g * (tile - m), FORM.PLANES)
                gated = gated + (_hold(g, TYPE),)
            if KEEP_G:
                held_g = gated
            if FORM.OVERFLOW:
                for j in tl.range(K, H, num_stages=3):
                    tile = _read(xs, part, j, "evict_last", FORM).to(ACC)
                    g = _read(dys, part, j, "evict_last", FORM).to(ACC)
                    g = _gradient(g, tile, part, j, affine, residuals, signs, FORM, ACTIVATION, RESIDUAL, SIGNS)
                    one += _fold(g, FORM.PLANES)
                    two += _fold(g * (tile - m), FORM.PLANES)
            one, two = _totals(one, two)
            if STAGE != "alone":
                _publish(slot, p, one, two * r if FROZEN else two, B)
        if STAGE == "team":
            _barrier(arrived + team * 32, p, P)
        if STAGE == "team" or STAGE == "normalize":
            one, two = _merge(slot, P, FORM)
        if STAGE != "statistics":
            if not FROZEN:
                tl.store(dbias + c, one.to(dbias.dtype.element_ty), mask=writes)
                tl.store(dweight + c, (two * r).to(dweight.dtype.element_ty), mask=writes)
            # dx = (g - mean(g) - xhat mean(g xhat)) scale (Ioffe & Szegedy 2015, section 3).
            scale = r * w
            share = 1.0 / (L * (FORM.W // B)).to(ACC)
            slope = Affine(m, -(two * r) * (r * scale) * share, -one * scale * share)
            if TYPE.primitive_bitwidth == 16:  # has fewer digits than are lost in x slope + (level - m slope)
                slope = Affine(tl.zeros((1, B), ACC), slope.scale, tl.fma(-m, slope.scale, slope.b))
            dxs, drs = dx + start, dr + start
            if FORM.OVERFLOW:
                for back in tl.range(1, H - K + 1, num_stages=3):
                    j = H - back
                    tile = _read(xs, part, j, "evict_first", FORM).to(ACC)
                    g = _read(dys, part, j, "evict_first", FORM).to(ACC)
                    g = _gradient(g, tile, part, j, affine, residuals, signs, FORM, ACTIVATION, RESIDUAL, SIGNS)
                    _write_back(g, tile, part, j, scale, slope, dxs, drs, FORM, FROZEN, RESIDUAL_GRADIENT)
            for k in tl.static_range(K):
                tile = _take(held[k], opaque_zero, TYPE, FORM)
                g = _take(held_g[k], opaque_zero, TYPE, FORM)
                if not KEEP_G:
                    g = _gradient(g, tile, part, k, affine, residuals, signs, FORM, ACTIVATION, RESIDUAL, SIGNS)
                _write_back(g, tile, part, k, scale, slope, dxs, drs, FORM, FROZEN, RESIDUAL_GRADIENT)


# Whether these run in Triton's interpreter. Triton decided that when it was first imported.
INTERPRETED = not (isinstance(forward, triton.JITFunction) and isinstance(tl.sum, triton.JITFunction))
if INTERPRETED:  # NumPy warns of infinity and NaN, unlike a GPU
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
