"""Two warpgroups that issue matrix instructions in turn, so that one takes exponentials while the other multiplies.

Left alone, both issue at once, get their scores late together, and then share the exponentials while the matrix units wait. A warpgroup asks
for its turn before the products of a step, once what they read is there, and gives it away once they are issued (Shah et al. 2024,
FlashAttention-3, arXiv:2407.08608, section 3.1). Gluon has no named barriers, so they are in PTX. Each warpgroup takes and gives as many turns as the other: once a key block.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FIRST_BARRIER = 8  # of the 16 that a block has; Triton takes the first few
THREADS = 256  # those of both warpgroups: half of them wait, half arrive


@triton.constexpr_function
def _barrier(how: str, group: int) -> str:
    return f"mov.b32 $0, $1; bar.{how} {FIRST_BARRIER + group}, {THREADS};"


@gluon.jit
def _once(code: gl.constexpr):
    """Run PTX in every thread of a warpgroup."""
    each = gl.zeros([128], gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(code, "=r,r", [each], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def take_turn(G: gl.constexpr):
    """Wait until the other warpgroup gives warpgroup G its turn."""
    _once(_barrier("sync", G))


@gluon.jit
def give_turn(G: gl.constexpr):
    """Warpgroup G gives the turn to the other one, without waiting."""
    _once(_barrier("arrive", 1 - G))
