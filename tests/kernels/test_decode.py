"""Decoding over ragged keys against the oracle: in the interpreter, and on a GPU if there is one."""

import pytest
import torch
from torch import Tensor

from sparsesearch.errors import SpecError, UnsupportedKernelError
from sparsesearch.kernels.decode import ragged_decode
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.kernels.triton_skinny import starts_early

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _expected(q: Tensor, k: Tensor, v: Tensor, keys: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    group = q.shape[0] * q.shape[1] // len(keys)
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    q64, k64, v64 = (x.cpu().double() for x in (q, k, v))
    for pair, rows in enumerate(keys):
        queries = q64.view(len(keys), group, -1)[pair]
        if len(rows):
            one, one_lse = masked_attention(
                queries, k64[rows], v64[rows], torch.ones(group, len(rows), dtype=torch.bool), scale=scale
            )
            out.view(len(keys), group, -1)[pair], lse.view(len(keys), group)[pair] = one, one_lse
    return out, lse


def _assert_close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    eps = torch.finfo(DTYPE).eps
    torch.testing.assert_close(
        got[0].cpu().double(), expected[0], rtol=0, atol=4 * eps * float(expected[0].abs().max())
    )
    torch.testing.assert_close(got[1].cpu().double(), expected[1], rtol=1e-5, atol=1e-4)


def _case(lens: list[int], *, batch: int, heads: int, head_dim: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *lens]).cumsum(0)[:-1] + 3 * torch.arange(len(lens))  # gaps between pairs
    rows = int(starts[-1]) + lens[-1] + 5
    q = torch.randn(batch, heads, head_dim, generator=generator).to(DEVICE, DTYPE)
    k, v = (torch.randn(rows, head_dim, generator=generator).to(DEVICE, DTYPE) for _ in range(2))
    return q, k, v, starts.to(DEVICE), torch.tensor(lens, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("lens", "batch", "heads", "head_dim"),
    [
        ([1], 1, 1, 16),
        ([64], 1, 4, 32),
        ([130, 1, 63, 257], 2, 8, 24),
        ([0, 200, 0, 5, 64, 0], 3, 2, 16),
        ([300, 7, 65], 1, 15, 16),
    ],
)
def test_equals_oracle(lens: list[int], batch: int, heads: int, head_dim: int) -> None:
    q, k, v, starts, kv_lens = _case(lens, batch=batch, heads=heads, head_dim=head_dim)
    got = ragged_decode(q, k, v, starts, kv_lens, scale=0.3)
    keys = [torch.arange(int(a), int(a) + n) for a, n in zip(starts, lens, strict=True)]
    _assert_close(got, _expected(q, k, v, keys, 0.3))


def test_pages_are_gathered() -> None:
    generator = torch.Generator().manual_seed(1)
    lens, page = [70, 33, 0, 128], 16
    q, k, v, _, kv_lens = _case([1, 1, 1, 600], batch=2, heads=4, head_dim=16)
    kv_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    table = torch.stack([torch.randperm(30, generator=generator)[:8] for _ in lens]).int()
    starts = torch.tensor([0, 16, 5, 100])
    keys = [
        starts[p] + table[p].repeat_interleave(page)[:n] * page + torch.arange(n) % page for p, n in enumerate(lens)
    ]
    got = ragged_decode(q, k, v, starts.to(DEVICE), kv_lens, scale=0.2, table=table.to(DEVICE), page_tokens=page)
    _assert_close(got, _expected(q, k, v, keys, 0.2))


@pytest.mark.parametrize("workers", [1, 3, 7, 40, 132])
def test_shares_of_any_number_of_workers(workers: int) -> None:
    """Cuts inside pairs and inside the idle units between them; more workers than keys."""
    from sparsesearch.kernels import triton_decode

    lens = [1, 0, 33, 16, 0, 129, 15, 300]
    q, k, v, starts, kv_lens = _case(lens, batch=2, heads=12, head_dim=16, seed=workers)
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan, device=DEVICE)
    triton_decode.launch(
        q, k, v, starts, kv_lens, None, out, lse, scale=0.3, page_tokens=64, workers=workers, early=starts_early(q)
    )
    keys = [torch.arange(int(a), int(a) + n) for a, n in zip(starts, lens, strict=True)]
    _assert_close((out, lse), _expected(q, k, v, keys, 0.3))


@pytest.mark.parametrize(
    ("limits", "late"),
    [
        ({}, False),
        ({"THIN_PROGRAMS": 40}, False),
        ({"THIN_PROGRAMS": 16}, False),
        ({"THIN_PAIRS": 4}, True),
        ({"THIN_PROGRAMS": 7}, True),
    ],
    ids=["half the columns", "all columns", "two heads each", "late for its pairs", "late for its heads"],
)
def test_merges_of_many_heads(limits: dict[str, int], late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsesearch.kernels import triton_decode

    for name, number in (limits | {"MANY_HEADS": 8}).items():
        monkeypatch.setattr(triton_decode, name, number)
    assert triton_decode.is_late(num_pairs=8, group=4) == late
    lens = [33, 0, 200, 7, 1, 64, 130, 15]
    q, k, v, starts, kv_lens = _case(lens, batch=2, heads=16, head_dim=24)
    got = ragged_decode(q, k, v, starts, kv_lens, scale=0.3)
    keys = [torch.arange(int(a), int(a) + n) for a, n in zip(starts, lens, strict=True)]
    _assert_close(got, _expected(q, k, v, keys, 0.3))


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "num_kv_heads", "group"), [(8, 8, 4), (32, 8, 4), (150, 2, 1), (260, 2, 1)])
def test_many_pairs(batch: int, num_kv_heads: int, group: int) -> None:
    """Merges of one warp, of two heads each, launched late for their pairs, and more pairs than a worker holds the first rows of."""
    generator = torch.Generator().manual_seed(batch)
    lens = torch.randint(0, 300, (batch * num_kv_heads,), generator=generator).tolist()
    q, k, v, starts, kv_lens = _case(lens, batch=batch, heads=num_kv_heads * group, head_dim=64)
    got = ragged_decode(q, k, v, starts, kv_lens, scale=0.3)
    keys = [torch.arange(int(a), int(a) + n) for a, n in zip(starts, lens, strict=True)]
    _assert_close(got, _expected(q, k, v, keys, 0.3))


def test_no_key_gives_zero() -> None:
    q, k, v, starts, kv_lens = _case([5, 9], batch=1, heads=2, head_dim=16)
    out, lse = ragged_decode(q, k, v, starts, kv_lens * 0, scale=1.0)
    assert not out.any()
    assert bool((lse == -torch.inf).all())


def test_refuses_what_it_cannot_do() -> None:
    q, k, v, starts, kv_lens = _case([5, 9], batch=1, heads=2, head_dim=16)
    with pytest.raises(SpecError, match="int32"):
        ragged_decode(q, k, v, starts, kv_lens.long(), scale=1.0)
    with pytest.raises(SpecError, match="pairs must fit"):
        ragged_decode(q[:, :1], k, v, starts, kv_lens, scale=1.0)
    with pytest.raises(UnsupportedKernelError, match="contiguous"):
        ragged_decode(q, k.T.contiguous().T, v, starts, kv_lens, scale=1.0)


def test_operator_contract() -> None:
    from sparsesearch.kernels.ops import ragged_decode as op

    q, k, v, starts, kv_lens = _case([5, 90], batch=1, heads=2, head_dim=16)
    torch.library.opcheck(op, (q, k, v, starts, kv_lens, None, 0.5, 64), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(
        lambda x: ragged_decode(x * 2, k, v, starts, kv_lens, scale=0.5)[0], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q), ragged_decode(q * 2, k, v, starts, kv_lens, scale=0.5)[0])


@pytest.mark.gpu
def test_lengths_may_change_between_replays() -> None:
    q, k, v, starts, kv_lens = _case([900, 3000, 64, 2000], batch=1, heads=32, head_dim=128)
    ragged_decode(q, k, v, starts, kv_lens, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ragged_decode(q, k, v, starts, kv_lens, scale=0.1)
    for lens in ([900, 3000, 64, 2000], [1, 2999, 0, 5]):
        kv_lens.copy_(torch.tensor(lens))
        graph.replay()
        keys = [torch.arange(int(a), int(a) + n) for a, n in zip(starts, lens, strict=True)]
        _assert_close(got, _expected(q, k, v, keys, 0.1))
