"""Online softmax on Hopper that looks for a row's maximum only when it has to.

The weights of a block are taken against the reference that their row already has, as if its maximum had not risen. Their sum, which is needed
anyway, tells whether it rose: only if one is above LIMIT do the rows of a warp find their maxima, move their references, and take their weights
again. So most blocks pay for neither maximum nor rescaling. Any reference gives the same quotient; LIMIT keeps weights finite in 16 bits.
FlashAttention-4 (Zadouri et al. 2026, arXiv:2603.05451) skips the rescaling below a threshold, and still finds every maximum.

The first branch also keeps an order that the sources ask for and ptxas does not: it moves the wait for the product in flight up to the last branch
before it. In straight code the exponentials came after that wait, so that nothing ran beside the product (tests/kernels/test_compile_gate.py).

Quantities of a row have shape [ROWS, 4]: the matrix instructions' layout gives a thread two rows, and of each the columns 2q and 2q + 1 of every
eight, so one entry per q is private to a thread and sums need no shuffles until a tile is done. The two branches are in PTX: Triton's belong to
a whole warpgroup, these to a warp.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)
MASKED = gl.constexpr(-1.0e30)  # finite: -inf - -inf would be NaN in rows that have met no key yet
NO_KEY = gl.constexpr(
    -1.0e25
)  # reference before any key: above MASKED · scale, so that masked weights are 0 and never 2^(a rounding)
FRESH = gl.constexpr(-1.0e24)  # below it, a reference is NO_KEY

# PTX takes floats as bits
_ZERO, _ONE, _126 = "0f00000000", "0f3F800000", "0f42FC0000"
_FRESH, _NO_KEY = "0fE753C21C", "0fE9045951"
_LIMIT = "0f44800000"
"""1024, for the sum of the weights that a thread has of a row: fp16 holds 65504."""
_ALL = "0xffffffff"


@triton.constexpr_function
def _weigh(num: int, scores: int, weights: int, rounded: str, rise: bool) -> list[str]:
    """Weights 2^(operand scores + i), of rows that rose by g0 and g1, to the operands `weights`, in pairs if `rounded`; sums to a0 and a1."""
    lines: list[str] = []
    for i in range(num):
        row, to = i // 2 % 2, f"p{i}" if rounded else f"${weights + i}"
        shown = f"${scores + i}"
        if rise:
            lines += [f"sub.f32 {to}, {shown}, g{row};"]
            shown = to
        lines += [f"ex2.approx.ftz.f32 {to}, {shown};"]
        lines += [f"add.f32 a{row}, a{row}, {to};" if i not in (0, 2) else f"mov.f32 a{row}, {to};"]
        if rounded and i % 2:
            lines += [f"cvt.rn.{rounded}.f32 ${weights + i // 2}, p{i}, p{i - 1};"]
    return lines


@triton.constexpr_function
def _late_softmax(num: int, rounded: str) -> tuple[str, str]:
    """PTX for a thread's `num` scores, and its operands: weights, sums, rises of the reference | scores, references, sums before."""
    sums = num // 2 if rounded else num
    rises, scores, references, before = sums + num, sums + 2 * num, sums + 3 * num, sums + 4 * num
    body = [f".reg .f32 p<{num}>; .reg .f32 a<2>; .reg .f32 f<2>; .reg .f32 g<2>; .reg .f32 x; .reg .pred q;"]
    body += [f"setp.lt.f32 q, ${references}, {_FRESH};", f"setp.lt.or.f32 q, ${references + 2}, {_FRESH}, q;"]
    body += _weigh(num, scores, 0, rounded, False)
    body += [f"setp.gt.or.f32 q, a{row}, {_LIMIT}, q;" for row in (0, 1)]
    body += [f"mov.f32 g{row}, {_ZERO}; mov.f32 f{row}, {_ONE};" for row in (0, 1)]
    body += [f"vote.sync.any.pred q, q, {_ALL};", "@!q bra.uni DONE;"]
    for row in (0, 1):
        body += [f"setp.lt.f32 q, ${references + 2 * row}, {_FRESH};", f"selp.f32 g{row}, {_NO_KEY}, {_ZERO}, q;"]
        body += [f"max.f32 g{row}, g{row}, ${scores + i};" for i in range(num) if i // 2 % 2 == row]
        for lane in (1, 2):
            body += [f"shfl.sync.bfly.b32 x, g{row}, {lane}, 0x1f, {_ALL};", f"max.f32 g{row}, g{row}, x;"]
        body += _decay(f"f{row}", f"g{row}")
    body += [*_weigh(num, scores, 0, rounded, True), "DONE:"]
    body += [f"fma.rn.f32 a{row}, ${before + 2 * row}, f{row}, a{row};" for row in (0, 1)]
    body += [f"mov.f32 ${sums + i}, a{i // 2 % 2}; mov.f32 ${rises + i}, g{i // 2 % 2};" for i in range(num)]
    return "{\n" + "\n".join(body) + "\n}", ",".join(
        ["=r" if rounded else "=f"] * sums + ["=f"] * (2 * num) + ["f"] * (3 * num)
    )


@triton.constexpr_function
def _decay(to: str, rise: str) -> list[str]:
    """2^-rise; of a row without keys 2^126 instead of infinity, because what it multiplies is 0."""
    return [f"neg.f32 x, {rise};", f"min.f32 x, x, {_126};", f"ex2.approx.ftz.f32 {to}, x;"]


@triton.constexpr_function
def _rescale(num: int) -> tuple[str, str]:
    """PTX for a thread's `num` values, and its operands: new values | old ones, in the same registers, and rises."""
    body = [".reg .f32 f<2>; .reg .f32 x; .reg .pred q;", f"setp.neu.f32 q, ${2 * num}, {_ZERO};"]
    body += [
        f"setp.neu.or.f32 q, ${2 * num + 2}, {_ZERO}, q;",
        f"vote.sync.any.pred q, q, {_ALL};",
        "@!q bra.uni DONE;",
    ]
    body += [line for row in (0, 1) for line in _decay(f"f{row}", f"${2 * num + 2 * row}")]
    body += [*(f"mul.f32 ${i}, ${i}, f{i // 2 % 2};" for i in range(num)), "DONE:"]
    return "{\n" + "\n".join(body) + "\n}", ",".join(["=f"] * num + [str(i) for i in range(num)] + ["f"] * num)


@gluon.jit
def _first(a, b):
    return a


@gluon.jit
def _private(x, ROWS: gl.constexpr, COLS: gl.constexpr):
    """[ROWS, 4] of a [ROWS, COLS] that is constant over what a thread holds of a row."""
    return gl.reduce(gl.reduce(x.reshape([ROWS, COLS // 8, 4, 2]), 3, _first), 1, _first)


@gluon.jit
def _spread(x, like, ROWS: gl.constexpr, COLS: gl.constexpr):
    """[ROWS, 4] repeated to the shape and layout of `like` [ROWS, COLS]; the inverse of `_private`."""
    split = like.reshape([ROWS, COLS // 8, 4, 2])
    x = gl.convert_layout(x, gl.SliceLayout(1, gl.SliceLayout(3, split.type.layout)))
    wide, _ = gl.broadcast(x.expand_dims(1).expand_dims(3), split)
    return gl.convert_layout(wide.reshape([ROWS, COLS]), like.type.layout)


@gluon.jit
def keep_first(s, room, ROWS: gl.constexpr, BN: gl.constexpr, BY_ROW: gl.constexpr):
    """Scores of all but the first `room` keys masked, [ROWS] if BY_ROW, otherwise a number. Columns are compared as constants: as a tensor they fill 32 registers."""
    split = s.reshape([ROWS, BN // 8, 4, 2])
    LAYOUT: gl.constexpr = split.type.layout
    if BY_ROW:
        room = gl.convert_layout(room, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
        room = room.expand_dims(1).expand_dims(2).expand_dims(3)
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
    eight = gl.arange(0, BN // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    parity = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    room = room - 2 * lane.expand_dims(0).expand_dims(1).expand_dims(3)
    column = 8 * eight.expand_dims(0).expand_dims(2).expand_dims(3) + parity.expand_dims(0).expand_dims(1).expand_dims(
        2
    )
    return gl.convert_layout(gl.where(column < room, split, MASKED).reshape([ROWS, BN]), s.type.layout)


@gluon.jit
def no_keys(like, ROWS: gl.constexpr, BN: gl.constexpr):
    """Reference and sums [ROWS, 4] of rows before their first key, in the layout that `like` [ROWS, BN] asks for."""
    zeros = _private(gl.zeros_like(like), ROWS, BN)
    return zeros + NO_KEY, zeros


@gluon.jit
def softmax(s, m, total, scale, ROWS: gl.constexpr, BN: gl.constexpr):
    """Weights of a block in base 2 against the greatest score so far. Returns weights, the rise of the reference, reference and sums."""
    top = gl.convert_layout(gl.max(s, 1) * scale, gl.SliceLayout(1, m.type.layout))
    m_new = gl.maximum(m, top[:, None])
    p = gl.exp2(s * scale - _spread(m_new, s, ROWS, BN))
    sums = gl.sum(gl.sum(p.reshape([ROWS, BN // 8, 4, 2]), 3), 1)
    return p, m_new - m, m_new, total * gl.exp2(m - m_new) + gl.convert_layout(sums, m.type.layout)


@gluon.jit
def late_softmax(s, m, total, scale, DTYPE: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr):
    """The same against reference m unless that is too low; weights are returned as DTYPE, fp32 or the inputs' type."""
    NUM: gl.constexpr = ROWS * BN // 128
    fresh = m < FRESH  # no key yet: scores are shown as they are, so that a first one is not lost beside NO_KEY
    shown = s * scale - _spread(gl.where(fresh, 0.0, m), s, ROWS, BN)
    ROUNDED: gl.constexpr = "" if gl.float32 == DTYPE else ("bf16x2" if gl.bfloat16 == DTYPE else "f16x2")
    code: gl.constexpr = _late_softmax(NUM, ROUNDED)
    p, sums, rise = gl.inline_asm_elementwise(
        code[0], code[1], [shown, _spread(m, s, ROWS, BN), _spread(total, s, ROWS, BN)],
        dtype=(DTYPE.value, gl.float32, gl.float32), is_pure=True, pack=NUM,
    )  # fmt: skip
    rise = gl.convert_layout(_private(rise, ROWS, BN), m.type.layout)
    return p, rise, gl.where(fresh, rise, m + rise), gl.convert_layout(_private(sums, ROWS, BN), m.type.layout)


@gluon.jit
def rescale(acc, rise, ROWS: gl.constexpr, D: gl.constexpr, LATE: gl.constexpr):
    """What was summed before the reference rose; nothing is done, if LATE, where no row of a warp did."""
    NUM: gl.constexpr = ROWS * D // 128
    if LATE:
        code: gl.constexpr = _rescale(NUM)
        acc = gl.inline_asm_elementwise(
            code[0], code[1], [acc, _spread(rise, acc, ROWS, D)], dtype=gl.float32, is_pure=True, pack=NUM
        )
    else:
        acc = acc * _spread(gl.exp2(-rise), acc, ROWS, D)
    return acc
