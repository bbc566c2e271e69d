"""The decode kernel for Hopper against the oracle, and against the portable kernel, on a GPU."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from sparsesearch.kernels import hopper_decode, triton_decode
from sparsesearch.kernels.reference import masked_attention

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="needs a Hopper GPU"),
]

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _case(
    lens: list[int], *, batch: int, heads: int, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Case:
    """Pairs with gaps of NaN between them: what is not attended may be anything."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *lens]).cumsum(0)[:-1] + 3 * torch.arange(len(lens))
    rows = int(starts[-1]) + lens[-1] + 5
    q = torch.randn(batch, heads, head_dim, generator=generator).to("cuda", dtype)
    k, v = (torch.full((rows, head_dim), torch.nan, device="cuda", dtype=dtype) for _ in "kv")
    for start, length in zip(starts.tolist(), lens, strict=True):
        for x in (k, v):
            x[start : start + length] = torch.randn(length, head_dim, generator=generator).to("cuda", dtype)
    return q, k, v, starts.cuda(), torch.tensor(lens, dtype=torch.int32, device="cuda")


def _expected(q: Tensor, k: Tensor, v: Tensor, keys: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    group = q.shape[0] * q.shape[1] // len(keys)
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for pair, rows in enumerate(keys):
        if len(rows):
            inside = rows.cuda()
            one, one_lse = masked_attention(
                q.view(len(keys), group, -1)[pair].double().cpu(), k[inside].double().cpu(), v[inside].double().cpu(),
                torch.ones(group, len(rows), dtype=torch.bool), scale=scale,
            )  # fmt: skip
            out.view(len(keys), group, -1)[pair], lse.view(len(keys), group)[pair] = one, one_lse
    return out, lse


def _run(case: Case, *, scale: float, workers: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q, k, v, starts, lens = case
    assert hopper_decode.serves(q, k, v, lens.numel())
    out = torch.full_like(q, torch.nan) if out is None else out  # given: no kernel of its own comes before the workers
    lse = torch.empty(q.shape[:2], device="cuda")
    hopper_decode.launch(q, k, v, starts, lens, out, lse, scale=scale, workers=workers)
    return out, lse


def _assert_close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    atol = 4 * torch.finfo(dtype).eps * float(expected[0].abs().max())
    torch.testing.assert_close(got[0].cpu().double(), expected[0], rtol=0, atol=atol)
    torch.testing.assert_close(got[1].cpu().double(), expected[1], rtol=1e-5, atol=1e-4)


def _rows(starts: Tensor, lens: list[int]) -> list[Tensor]:
    return [torch.arange(int(a), int(a) + n) for a, n in zip(starts, lens, strict=True)]


@pytest.fixture(params=[True, False], ids=["early", "after"], autouse=True)
def early(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small caches, in both ways that large and small ones have."""
    monkeypatch.setattr(hopper_decode, "EARLY_BYTES", 0 if request.param else 1 << 60)


@pytest.mark.parametrize(
    ("lens", "batch", "heads", "dtype"),
    [
        ([130, 1, 63, 257], 2, 8, torch.bfloat16),
        ([130, 1, 63, 257], 2, 8, torch.float16),
        ([0, 200, 0, 5, 64, 0], 3, 2, torch.bfloat16),
        ([1], 1, 1, torch.bfloat16),
        ([64], 1, 4, torch.bfloat16),
        ([300, 7, 65], 1, 15, torch.bfloat16),
        ([5000, 100, 3000, 8200], 1, 128, torch.bfloat16),
        ([321 * (i % 7) for i in range(64)], 8, 32, torch.bfloat16),
    ],
)
def test_equals_oracle(lens: list[int], batch: int, heads: int, dtype: torch.dtype) -> None:
    case = _case(lens, batch=batch, heads=heads, dtype=dtype)
    got = _run(case, scale=0.3, workers=132)
    _assert_close(got, _expected(*case[:3], _rows(case[3], lens), 0.3), dtype)


@pytest.mark.parametrize("workers", [1, 3, 7, 40, 264])
def test_shares_of_any_number_of_workers(workers: int) -> None:
    """Cuts inside pairs and inside the idle units between them; more workers than blocks; a ring that goes round many times."""
    lens = [1, 0, 633, 16, 0, 1290, 15, 3000]
    case = _case(lens, batch=2, heads=12, seed=workers)
    got = _run(case, scale=0.2, workers=workers)
    _assert_close(got, _expected(*case[:3], _rows(case[3], lens), 0.2), torch.bfloat16)


def test_strided_rows_and_replays_with_other_lengths() -> None:
    lens = [900, 3000, 64, 2000]
    q, k, v, starts, kv_lens = _case(lens, batch=1, heads=32)
    both = torch.cat([k, v], 1)  # keys and values side by side
    case = q, both[:, :128], both[:, 128:], starts, kv_lens
    _run(case, scale=0.1, workers=132)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _run(case, scale=0.1, workers=132)
    for changed in (lens, [1, 2999, 0, 5], [0, 0, 0, 0], lens):
        kv_lens.copy_(torch.tensor(changed))
        graph.replay()
        _assert_close(got, _expected(q, k, v, _rows(starts, changed), 0.1), torch.bfloat16)


def test_what_is_left_to_the_portable_kernel() -> None:
    q, k, v, *_ = _case([100, 50], batch=1, heads=2)
    assert hopper_decode.serves(q, k, v, 2)
    assert not hopper_decode.serves(q.float(), k.float(), v.float(), 2)
    assert not hopper_decode.serves(*(x[..., :64].contiguous() for x in (q, k, v)), 2)
    assert not hopper_decode.serves(q, k.view(-1)[1:1025].view(8, 128), v, 2)
    assert not hopper_decode.serves(q.repeat(64, 1, 1), k, v, 128)
    assert not hopper_decode.serves(q.repeat(2, 100, 1), k, v, 64)


@pytest.mark.parametrize("pairs", [8, 64])
def test_equals_the_portable_kernel(pairs: int) -> None:
    lens = [1000 + 37 * i for i in range(pairs)]
    case = _case(lens, batch=pairs // 8, heads=32)
    out, lse = torch.empty_like(case[0]), torch.empty(case[0].shape[:2], device="cuda")
    triton_decode.launch(*case[:3], *case[3:], None, out, lse, scale=0.1, page_tokens=64, workers=396)
    got = _run(case, scale=0.1, workers=132)
    torch.testing.assert_close(got[0], out, rtol=0, atol=2e-3)
    torch.testing.assert_close(got[1], lse, rtol=1e-5, atol=1e-5)


@triton.jit
def _write_late(source, target, size, BLOCK: tl.constexpr):
    """Copy, long after the next kernel has been let start."""
    gdc_launch_dependents()
    for _ in range(400):
        tl.inline_asm_elementwise("nanosleep.u32 1000; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)


@pytest.mark.parametrize("written", ["lengths", "starts", "keys"])
def test_what_the_kernel_before_writes_late_is_seen(written: str) -> None:
    """The workers start while it still runs, and have looked at old lengths and asked for old keys."""
    lens = [900, 3000, 64, 2000]
    q, k, v, starts, kv_lens = _case(lens, batch=1, heads=32)
    k, v = k.nan_to_num(), v.nan_to_num()
    others = {
        "lengths": (torch.tensor([963, 1500, 1, 1990], dtype=torch.int32, device="cuda"), kv_lens),
        "starts": (starts.flip(0) // 2, starts),
        "keys": (torch.randn_like(k), k),
    }
    source, target = others[written]
    old = target.clone()
    _run((q, k, v, starts, kv_lens), scale=0.1, workers=264)
    for _ in range(3):
        target.copy_(old)
        out = torch.full_like(q, torch.nan)
        torch.cuda.synchronize()
        _write_late[(1,)](source, target, source.numel(), BLOCK=1024, launch_pdl=True)
        got = _run((q, k, v, starts, kv_lens), scale=0.1, workers=264, out=out)
        _assert_close(got, _expected(q, k, v, _rows(starts, kv_lens.tolist()), 0.1), torch.bfloat16)
