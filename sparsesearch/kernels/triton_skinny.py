"""Linears of a few rows, as fast as their weights are read.

Each program owns some output columns and walks along their weights once. A single row is multiplied without matrix instructions; of several
rows the weights are the first operand, so that up to 8 rows of input cost about what one does. What a decoder does before and after a linear is folded in, and no launch is spent on it:

    before  RMS norm: whoever wrote the input wrote `scaled` = input · gain and its sums of squares per tile beside it; the norm is then a
            factor per row on the product, since (x / rms(x) · g) W = (x · g) W / rms(x)
    after   bias, SiLU(gate) · up, the residual, and `scaled` and `squares` for the norm that follows

On Hopper a kernel is launched while the one before still runs (programmatic dependent launch): it asks for its first weights, which depend on
nothing, and waits only then for its input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparsesearch.kernels.skinny_tiling import Tiling, num_programs

LINE_BYTES = tl.constexpr(128)


@triton.jit
def ask_for(pointers):
    """Bring lines into L2 without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["num_rows"])
def skinny_linear(
    x, w, bias, add, squares, gain, out, scaled, squares_out, num_rows, num_cols, inner_stride, num_parts, eps,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PAIRED: tl.constexpr, NORMED: tl.constexpr,
    BIASED: tl.constexpr, ADDED: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """BN rows of weights against all rows of x. Grid: tiles of columns."""
    if EARLY and not LATE:
        gdc_launch_dependents()
    inner = inner_stride  # columns of x and of w
    tile = tl.program_id(0)
    lanes = tl.arange(0, BN)
    steps = tl.arange(0, BK)
    if PAIRED:  # a gate and its value are neighbours
        cols = tile * (BN // 2) + lanes // 2
        lines = cols + (lanes % 2) * num_cols
    else:
        cols = tile * BN + lanes
        lines = cols
    within = cols < num_cols
    w_at = w + lines.to(tl.int64) * inner
    if AHEAD > 0:
        per_line: tl.constexpr = LINE_BYTES // (w.dtype.element_ty.primitive_bitwidth // 8)
        far = tl.arange(0, AHEAD) * per_line
        ask_for(tl.where(within[:, None] & (far < inner)[None, :], w_at[:, None] + far[None, :], w + far[None, :]))
    own = tile * (BN // 2) + tl.arange(0, BN // 2) if PAIRED else cols
    rows = tl.arange(0, ROWS)
    present = rows < num_rows
    at = rows.to(tl.int64)[None, :] * num_cols + own[:, None]
    real = present[None, :] & (own < num_cols)[:, None]
    # all that the end needs is asked for before the long way through the weights
    if BIASED:
        shift = tl.load(bias + lines, mask=within, other=0.0)
    if SCALED:
        factor = tl.load(gain + own, mask=own < num_cols, other=0.0)
    if EARLY:
        gdc_wait()
    if NORMED:
        parts = tl.arange(0, PARTS)
        written = present[:, None] & (parts < num_parts)[None, :]
        part = tl.load(squares + rows[:, None] * num_parts + parts[None, :], mask=written, other=0.0)
    if ADDED:
        residual = tl.load(add + at, mask=real, other=0.0)
    w_tile_at = w_at[:, None] + steps[None, :]
    if ROWS == 1:  # the matrix instruction would compute eight
        sums = tl.zeros([BN, BK], tl.float32)
        for first in tl.range(0, inner, BK, num_stages=STAGES):
            if EVEN:
                w_tile = tl.load(w_tile_at + first, eviction_policy="evict_first")
                x_line = tl.load(x + first + steps)
            else:
                left = first + steps < inner
                w_tile = tl.load(w_tile_at + first, mask=within[:, None] & left[None, :], other=0.0)
                x_line = tl.load(x + first + steps, mask=left, other=0.0)
            sums += w_tile.to(tl.float32) * x_line.to(tl.float32)[None, :]
        acc = tl.reshape(tl.sum(sums, 1), [BN, 1])
    else:
        x_tile_at = x + rows[None, :] * inner + steps[:, None]
        acc = tl.zeros([BN, ROWS], tl.float32)
        for first in range(0, inner, BK):
            if EVEN:
                w_tile = tl.load(w_tile_at + first, eviction_policy="evict_first")
                x_tile = tl.load(x_tile_at + first, mask=present[None, :], other=0.0)
            else:
                left = first + steps < inner
                w_tile = tl.load(w_tile_at + first, mask=within[:, None] & left[None, :], other=0.0)
                x_tile = tl.load(x_tile_at + first, mask=left[:, None] & present[None, :], other=0.0)
            acc = tl.dot(w_tile, x_tile, acc, input_precision=PRECISION)
    if EARLY and LATE:
        gdc_launch_dependents()
    if NORMED:
        acc = acc * tl.rsqrt(tl.sum(part, 1) / inner + eps)[None, :]
    if BIASED:
        acc += shift.to(tl.float32)[:, None]
    if PAIRED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BN // 2, 2, ROWS]), [0, 2, 1]))
        acc = gate * tl.sigmoid(gate) * up
    if ADDED:
        acc += residual.to(tl.float32)
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=real)
    if SCALED:
        kept = tl.where(real, rounded.to(tl.float32), 0.0)
        tl.store(scaled + at, (kept * factor.to(tl.float32)[:, None]).to(out.dtype.element_ty), mask=real)
        tl.store(squares_out + rows * tl.num_programs(0) + tile, tl.sum(kept * kept, 0), mask=present)


@triton.jit
def scale_rows(x, gain, scaled, squares, num_cols, COLS: tl.constexpr, EARLY: tl.constexpr):
    """`scaled` and `squares` of rows that no kernel of ours has written. Grid: rows."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    cols = tl.arange(0, COLS)
    at = row.to(tl.int64) * num_cols + cols
    values = tl.load(x + at, mask=cols < num_cols, other=0.0).to(tl.float32)
    factor = tl.load(gain + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
    tl.store(scaled + at, (values * factor).to(scaled.dtype.element_ty), mask=cols < num_cols)
    tl.store(squares + row, tl.sum(values * values, 0))


def starts_early(x: Tensor) -> bool:
    """Whether kernels on this device may start before those in front of them are over."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)


def launch(
    x: Tensor, w: Tensor, bias: Tensor | None, add: Tensor | None, squares: Tensor | None, gain: Tensor | None, eps: float,
    paired: bool, out: Tensor, scaled: Tensor, squares_out: Tensor, tiling: Tiling,
) -> None:  # fmt: skip
    """Shapes as in `step_ops.skinny_linear`; `squares_out` [M, programs]."""
    num_rows, inner = x.shape
    tiling = tiling.for_bytes(x.element_size())
    fixed = constants(
        tiling, num_rows=num_rows, num_parts=1 if squares is None else squares.shape[1], paired=paired, normed=squares is not None,
        biased=bias is not None, added=add is not None, scaled=gain is not None,
        even=inner % tiling.inner == 0 and w.shape[0] % tiling.columns == 0, fp32=x.dtype == torch.float32, early=starts_early(x),
    )  # fmt: skip
    skinny_linear[(num_programs(w.shape[0], tiling),)](
        x, w, *(x if extra is None else extra for extra in (bias, add, squares, gain)), out, scaled, squares_out, num_rows, out.shape[1],
        inner, 1 if squares is None else squares.shape[1], eps, **fixed, **options(tiling, early=bool(fixed["EARLY"])),
    )  # fmt: skip


def launch_scale(x: Tensor, gain: Tensor, scaled: Tensor, squares: Tensor) -> None:
    """Shapes as in `step_ops.scale_rows`."""
    early = starts_early(x)
    pdl = {"launch_pdl": True} if early else {}
    scale_rows[(x.shape[0],)](x, gain, scaled, squares, x.shape[1], COLS=triton.next_power_of_2(x.shape[1]), EARLY=early, num_warps=8, **pdl)  # fmt: skip


def constants(
    tiling: Tiling, *, num_rows: int, num_parts: int, paired: bool, normed: bool, biased: bool, added: bool, scaled: bool, even: bool,
    fp32: bool, early: bool,
) -> dict[str, int | bool | str]:  # fmt: skip
    """Compile-time arguments of `skinny_linear`."""
    return {
        "ROWS": 1 if num_rows == 1 else 8 if num_rows <= 8 else 16,
        "BN": tiling.columns,
        "BK": tiling.inner,
        "PARTS": triton.next_power_of_2(num_parts),
        "PAIRED": paired,
        "NORMED": normed,
        "BIASED": biased,
        "ADDED": added,
        "SCALED": scaled,
        "EVEN": even,
        "PRECISION": "ieee" if fp32 else "tf32",
        "EARLY": early,
        "AHEAD": tiling.ahead if early else 0,
        "STAGES": tiling.stages,
        "LATE": tiling.late,
    }


def options(tiling: Tiling, *, early: bool) -> dict[str, int | bool]:
    """Launch options of `skinny_linear`."""
    return {"num_warps": tiling.warps, "num_stages": tiling.stages} | ({"launch_pdl": True} if early else {})
