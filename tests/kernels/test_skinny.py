"""The parts of a fused step against the same written out in PyTorch; on a CPU in Triton's interpreter, in float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsesearch.kernels.cache_ops import KEEP_ALL, append_token
from sparsesearch.kernels.skinny_tiling import num_programs, tiling_for
from sparsesearch.kernels.step_ops import rotate, rotate_append, scale_rows, skinny_linear

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]  # the interpreter's dot knows no bfloat16
EPS = 1e-5
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(ours: Tensor, exact: Tensor, inner: int = 1) -> None:
    """Within a few roundings of the type, at the size of the largest; sums of `inner` terms in fp32."""
    eps = torch.finfo(ours.dtype).eps
    assert (ours.double() - exact).abs().max() <= (4 * eps + 1e-6 * inner**0.5) * exact.abs().max().clamp(min=1)


@each_dtype
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize(("lines", "inner"), [(32, 256), (40, 48), (66, 63), (257, 600)])
def test_a_linear_with_all_around_it(lines, inner, rows, dtype):
    x, w, bias, add, gain = (
        normal(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate([(rows, inner), (lines, inner), (lines,), (rows, lines), (lines,)])
    )
    squares = torch.rand(rows, 5, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    out, scaled, written = skinny_linear(x, w, bias, add, squares, gain, EPS, False)
    factor = (squares.double().sum(1) / inner + EPS).rsqrt()[:, None]
    close(out, x.double() @ w.double().T * factor + bias.double() + add.double(), inner)
    close(scaled, out.double() * gain.double())
    close(written.sum(1), out.double().square().sum(1), lines)


@each_dtype
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("cols", "inner"), [(16, 64), (33, 63), (48, 32)])
def test_a_gated_pair(cols, inner, rows, dtype):
    x, w = normal(rows, inner, dtype=dtype), normal(2 * cols, inner, dtype=dtype, seed=1) * inner**-0.5
    for bias in (None, normal(2 * cols, dtype=dtype, seed=2)):
        out, scaled, written = skinny_linear(x, w, bias, None, None, None, 0.0, True)
        both = x.double() @ w.double().T + (0 if bias is None else bias.double())
        close(out, F.silu(both[:, :cols]) * both[:, cols:], inner)
        assert scaled.numel() == written.numel() == 0


@each_dtype
def test_a_norm_is_a_factor_on_the_product(dtype):
    x, gain, w = (
        normal(3, 600, dtype=dtype) * 30,
        normal(600, dtype=dtype, seed=1),
        normal(32, 600, dtype=dtype, seed=2),
    )
    scaled, squares = scale_rows(x, gain)
    ours = skinny_linear(scaled, w, None, None, squares, None, EPS, False)[0]
    normed = F.rms_norm(x.double(), (600,), gain.double(), EPS)
    close(ours, normed @ w.double().T, 600)


def rotated(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm per head and rotary positions in fp64; x [B, heads, D]."""
    x = x.double() if gain is None else F.rms_norm(x.double(), x.shape[-1:], gain.double(), EPS)
    low, high = x.chunk(2, -1)
    return x * cos[:, None].double() + torch.cat([-high, low], -1) * sin[:, None].double()


def angles(batch: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Halves that differ, as no model has them: each must be read where it belongs."""
    return [fn(normal(batch, head_dim, dtype=dtype, seed=7)) for fn in (torch.cos, torch.sin)]


@each_dtype
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("batch", "kv_heads", "group", "head_dim"), [(1, 1, 1, 16), (3, 2, 3, 24), (2, 2, 4, 64)])
def test_rotation(batch, kv_heads, group, head_dim, normed, dtype):
    heads = kv_heads * group
    qkv = normal(batch, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    gains = [normal(head_dim, dtype=dtype, seed=seed) if normed else None for seed in (1, 2)]
    cos, sin = angles(batch, head_dim, dtype)
    q, k, v = qkv.view(batch, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    ours = rotate(qkv, cos, sin, *gains, EPS, heads)
    for got, x, gain in zip(ours, (q, k), gains, strict=False):
        close(got, rotated(x, gain, cos, sin))
    assert torch.equal(ours[2], v)


@each_dtype
@pytest.mark.parametrize("ring", [(1, 2), (0, 1), (0, KEEP_ALL), (1, 0)], ids=str)
def test_the_cache_takes_a_rotated_token_as_it_takes_any(ring, dtype):
    """Beside `append_token`, through the end of a block, of the ring and of the room."""
    batch, kv_heads, head_dim, block, room = 2, 2, 16, 4, 6
    caches = []
    for _ in range(2):
        rows = [torch.zeros(batch * kv_heads * room, head_dim, device=DEVICE, dtype=dtype) for _ in range(2)]
        counts = [torch.full((batch * kv_heads,), n, dtype=torch.int32, device=DEVICE) for n in (room, *ring, 0, 0)]
        start = torch.arange(batch * kv_heads, device=DEVICE) * room
        caches.append((*rows, start, *counts, torch.zeros((), dtype=torch.int64, device=DEVICE)))
    for token in range(9):
        qkv = normal(batch, 4 * kv_heads * head_dim, dtype=dtype, seed=token)
        cos, sin = angles(batch, head_dim, dtype)
        q, k, v = rotate(qkv, cos, sin, None, None, EPS, 2 * kv_heads)
        append_token(k[:, :, None], v[:, :, None], *caches[0], block, True)
        ours = rotate_append(qkv, cos, sin, None, None, EPS, 2 * kv_heads, *caches[1], block)
        assert torch.equal(ours, q)
        for mine, theirs in zip(*caches, strict=True):
            assert torch.equal(mine, theirs), token


@pytest.mark.parametrize(("lines", "inner"), [(6144, 4096), (4096, 14336), (128256, 4096), (576, 1536), (7, 31)])
def test_every_line_has_a_program(lines, inner):
    for rows in (1, 8, 9, 16):
        tiling = tiling_for(lines, inner, rows)
        assert 0 <= num_programs(lines, tiling) * tiling.columns - lines < tiling.columns


@pytest.mark.gpu
@pytest.mark.parametrize(("lines", "inner", "paired"), [(6144, 4096, False), (28672, 4096, True), (4096, 14336, False)])
def test_products_of_a_large_model_in_a_row(lines, inner, paired):
    """One starts while the other runs: what it reads must be there."""
    weights = [normal(lines, inner, dtype=torch.bfloat16, seed=seed) * inner**-0.5 for seed in range(2)]
    back = normal(inner, lines // 2 if paired else lines, dtype=torch.bfloat16, seed=3) * lines**-0.5
    for rows in (1, 8, 16):
        x = first = normal(rows, inner, dtype=torch.bfloat16, seed=4)
        for turn in range(6):
            y = skinny_linear(x, weights[turn % 2], None, None, None, None, 0.0, paired)[0]
            x = skinny_linear(y, back, None, first, None, None, 0.0, False)[0]
        exact = first.double()
        for turn in range(6):
            y = exact @ weights[turn % 2].double().T
            y = F.silu(y[:, : lines // 2]) * y[:, lines // 2 :] if paired else y
            exact = y @ back.double().T + first.double()
        assert (x.double() - exact).norm() <= 0.03 * exact.norm()
