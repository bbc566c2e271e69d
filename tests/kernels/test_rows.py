"""Token orders: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

from sparsesearch.errors import SpecError
from sparsesearch.kernels.triton_rows import gather_rows, inverse_index, scatter_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def orders(batch: int, heads: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    keys = torch.rand(batch, heads, rows, generator=generator)
    return keys.argsort(-1).int().to(DEVICE)


@pytest.mark.parametrize(("batch", "heads"), [(2, 3), (1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (63, 24), (130, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back(batch: int, heads: int, rows: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = (
        torch.randn(2, rows, 3, width, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    )  # token-major, as layers give it
    index = orders(batch, heads, rows, generator)
    there = gather_rows(x, index)
    expected = x.gather(2, index.long()[..., None].expand(2, 3, rows, width))
    assert torch.equal(there, expected)
    assert torch.equal(scatter_rows(there, index, rows), x)


def test_padding_gives_zeros_and_takes_none() -> None:
    x = torch.arange(1, 9, dtype=torch.float32, device=DEVICE).reshape(1, 1, 4, 2)
    index = torch.tensor([[[2, -1, 0]]], dtype=torch.int32, device=DEVICE)
    there = gather_rows(x, index)
    assert there[0, 0].tolist() == [[5, 6], [0, 0], [1, 2]]
    assert scatter_rows(there, index, 4)[0, 0].tolist() == [[1, 2], [0, 0], [5, 6], [0, 0]]
    assert inverse_index(index, 4).tolist() == [[[2, -1, 0, -1]]]


def test_operator_contract() -> None:
    x = torch.randn(1, 2, 5, 16, device=DEVICE)
    index = torch.arange(5, dtype=torch.int32, device=DEVICE)[None, None]
    torch.library.opcheck(gather_rows, (x, index), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda y: gather_rows(y, index) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x + 1)


def test_bad_input() -> None:
    x = torch.zeros(2, 3, 4, 16, device=DEVICE)
    with pytest.raises(SpecError, match="index int32"):
        gather_rows(x, torch.zeros(1, 1, 4, device=DEVICE))
    with pytest.raises(SpecError, match="3 heads"):
        gather_rows(x, torch.zeros(1, 2, 4, dtype=torch.int32, device=DEVICE))
