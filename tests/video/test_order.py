"""Orders: permutations by their definitions, on odd shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from sparsesearch.errors import SpecError
from sparsesearch.layout import video_layout
from sparsesearch.order import AXES, IDENTITY, AnyOrder, Axes, Gilbert, Tile, parse_order
from sparsesearch.space_filling import gilbert_path

TEXTS = ["identity", "gilbert", "tile(4,4,4)", "tile(0,2,2)", "tile(1,8,16)", *(f"axes({axes})" for axes in AXES)]
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (4, 4, 8), (5, 9, 17), (1, 7, 7)])
def test_is_a_permutation_with_its_inverse(text: str, shape: tuple[int, int, int]) -> None:
    order, layout = parse_order(text), video_layout(*shape, text_first=3, text_last=2)
    there, back = order.permutation(layout), order.inverse(layout)
    tokens = torch.arange(layout.num_tokens)
    assert torch.equal(there.sort().values, tokens)
    assert torch.equal(there[back], tokens)
    assert str(order) == text
    if text == "identity":
        assert torch.equal(there, tokens)
    else:  # the grid first, then the text in its own sequence
        assert there[-5:].tolist() == [0, 1, 2, layout.num_tokens - 2, layout.num_tokens - 1]


def test_token_major_lists_the_frames_of_a_position() -> None:
    layout = video_layout(3, 2, 2)
    assert Axes("hwf").permutation(layout)[:6].tolist() == [0, 4, 8, 1, 5, 9]
    assert torch.equal(Axes("fhw").permutation(layout), torch.arange(12))


def test_tiles_that_divide_are_boxes() -> None:
    layout = video_layout(4, 4, 8)
    cells = layout.coordinates()[Tile(2, 2, 4).permutation(layout)].view(-1, 16, 3)
    assert torch.equal(cells.amax(1) - cells.amin(1), torch.tensor([1, 1, 3]).expand(8, 3))
    assert cells[:, 0].tolist() == [[f, h, w] for f in (0, 2) for h in (0, 2) for w in (0, 4)]


def test_whole_tiles_come_before_cut_ones() -> None:
    """HunyuanVideo 33 x 45 x 80: 32 x 44 x 80 tokens lie in whole tiles of 4 x 4 x 8, and each is a block of 128."""
    layout = video_layout(33, 45, 80, text_last=256)
    cells = layout.coordinates()[Tile(4, 4, 8).permutation(layout)]
    whole = cells[: 32 * 44 * 80].view(-1, 128, 3)
    assert torch.equal(whole.amax(1) - whole.amin(1), torch.tensor([3, 3, 7]).expand(len(whole), 3))
    assert bool(((cells[len(whole) * 128 : -256, :2] == torch.tensor([32, 44])).any(1)).all())


def test_draft_attention_lists_tiles_frame_by_frame() -> None:
    """DraftAttention reorders strips of 8 rows into tiles 16 wide, one frame after another (768p: 48 x 80)."""
    layout = video_layout(2, 48, 80)
    index = torch.arange(2 * 48 * 80).view(2, 6, 8, 5, 16)
    assert torch.equal(Tile(1, 8, 16).permutation(layout), index.permute(0, 1, 3, 2, 4).flatten())


@given(shapes)
def test_gilbert_visits_every_cell_once(shape: tuple[int, int, int]) -> None:
    cells = gilbert_path(shape)
    flat = (cells[:, 0] * shape[1] + cells[:, 1]) * shape[2] + cells[:, 2]
    assert torch.equal(flat.sort().values, torch.arange(shape[0] * shape[1] * shape[2]))


@pytest.mark.parametrize("shape", [(4, 4, 4), (8, 8, 8), (1, 8, 8), (16, 16, 16), (6, 10, 12)])
def test_gilbert_steps_to_a_neighbour_on_even_boxes(shape: tuple[int, int, int]) -> None:
    assert (gilbert_path(shape).diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("shape", [(33, 45, 80), (21, 45, 80), (11, 48, 85)])
def test_gilbert_stays_close_at_published_sizes(shape: tuple[int, int, int]) -> None:
    """Odd sides allow diagonal steps; blocks of 128 stay compact, unlike rows of a frame-major block, which span 80."""
    cells = gilbert_path(shape)
    assert int(cells.diff(dim=0).abs().amax()) <= 2
    blocks = cells[: len(cells) // 128 * 128].view(-1, 128, 3)
    assert float((blocks.amax(1) - blocks.amin(1)).float().mean()) < 9
    assert torch.equal(Gilbert().grid_path(shape).sort().values, torch.arange(len(cells)))


@pytest.mark.parametrize("text", ["axes(hhw)", "axes(hw)", "tile(1,2)", "hilbert", "tile(-1,2,2)", ""])
def test_bad_orders_are_named(text: str) -> None:
    with pytest.raises(SpecError, match="axes"):
        parse_order(text)


def test_a_field_reads_and_writes_text() -> None:
    class Holder(BaseModel):
        order: AnyOrder = IDENTITY

    assert Holder(order="tile(0, 2, 2)").order == Tile(0, 2, 2)
    assert Holder(order=Axes("hwf")).model_dump(mode="json") == {"order": "axes(hwf)"}
    assert Holder.model_json_schema()["properties"]["order"]["type"] == "string"
