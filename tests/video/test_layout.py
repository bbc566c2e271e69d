"""Layouts: segments, coordinates, policy, and what is refused."""

import pytest
import torch
from pydantic import ValidationError

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.layout import Layout, Segment, video_layout


def test_published_sizes() -> None:
    """Sparse-vDiT, section 4.1: CogVideoX1.5 226 + 11 x 4080, HunyuanVideo 33 x 3600 + 256, Wan2.1 21 x 3600."""
    assert video_layout(11, 48, 85, text_first=226).num_tokens == 45_106
    assert video_layout(33, 45, 80, text_last=256).num_tokens == 119_056
    assert video_layout(21, 45, 80).num_tokens == 75_600


def test_coordinates_follow_the_models_order() -> None:
    layout = video_layout(2, 2, 3, text_first=2)
    assert layout.grid_start == 2
    assert layout.segment_of_token().tolist() == [0] * 2 + [1] * 12
    assert layout.coordinates()[:3].tolist() == [[-1] * 3, [-1] * 3, [0, 0, 0]]
    assert layout.coordinates()[-1].tolist() == [1, 1, 2]
    frames, rows, columns = layout.coordinates()[2:].unbind(1)
    assert torch.equal((frames * 2 + rows) * 3 + columns, torch.arange(12))


def test_text_is_dense_by_default_and_the_rest_is_the_rules() -> None:
    layout = video_layout(1, 2, 2, text_last=3)
    assert [layout.pair_policy(*pair) for pair in (("text", "video"), ("video", "text"), ("video", "video"))] == [
        "dense",
        "dense",
        "rule",
    ]
    bare = Layout(segments=layout.segments, policy=())
    assert bare.pair_policy("text", "text") == "rule"
    first = Layout(segments=layout.segments, policy=(("text", "text", "rule"), ("text", "*", "dense")))
    assert [first.pair_policy("text", kind) for kind in ("text", "video")] == ["rule", "dense"]


def test_an_image_is_one_frame() -> None:
    assert Segment(kind="image", shape=(4, 6)).grid == (1, 4, 6)
    assert Layout(segments=(Segment(kind="image", shape=(4, 6)),)).grid_shape == (1, 4, 6)


@pytest.mark.parametrize("kinds", [("text",), ("video", "image")])
def test_geometry_needs_one_grid(kinds: tuple[str, ...]) -> None:
    layout = Layout.model_validate({"segments": [{"kind": kind, "shape": [2, 2]} for kind in kinds]})
    with pytest.raises(SpecError, match="one image or video segment"):
        _ = layout.grid_shape


def test_a_causal_layout_has_one_axis() -> None:
    prompt, generation = Segment(kind="prompt", shape=(5,)), Segment(kind="generation", shape=(7,))
    assert Layout(segments=(prompt, generation), causal=True).num_tokens == 12
    with pytest.raises(ValidationError, match="one axis"):
        Layout(segments=(Segment(kind="video", shape=(2, 2, 2)),), causal=True)
    with pytest.raises(ValidationError, match="at least 1 token"):
        Segment(kind="text", shape=(0,))


def test_a_grid_takes_only_its_own_layout() -> None:
    layout = video_layout(2, 4, 4)
    assert BlockGrid(32, 32, 16, causal=False, layout=layout).layout is layout
    for grid in ({"q_len": 33, "kv_len": 33, "causal": False}, {"q_len": 32, "kv_len": 32, "causal": True}):
        with pytest.raises(SpecError, match="a layout must cover"):
            BlockGrid(block_tokens=16, layout=layout, **grid)


def test_round_trip() -> None:
    layout = video_layout(3, 4, 5, text_first=7)
    assert Layout.model_validate(layout.model_dump(mode="json")) == layout
    assert hash(Layout.model_validate(layout.model_dump(mode="json"))) == hash(layout)
