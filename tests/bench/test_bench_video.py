"""The benchmark of video shapes on a tiny one and the CPU: that it measures what it says, never how fast."""

from contextlib import nullcontext

import pytest
import torch

from sparsesearch.bench import video, video_predicted
from sparsesearch.bench.timing import Replay
from sparsesearch.bench.video_shapes import VideoModel, grid_of, mixed_rules
from sparsesearch.kernels.ordered import attend
from sparsesearch.layout import video_layout

TINY = VideoModel("tiny", video_layout(4, 8, 16), 2, 16, 0.7, 0.5, 1.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's part")
def test_rows_are_kept_as_they_come_and_predicted_at_the_end(monkeypatch):
    drawn, outputs, turns = video.random_tensors, [], []

    def captured(run):
        outputs.append(run())
        return Replay(run, 1)

    def in_turns_s(*works, budget_s, least):
        turns.append([work.replay() for work in works])
        return (1e-3, 0.9e-3, 4e-3)

    monkeypatch.setattr(
        video, "random_tensors", lambda layout, heads, size, _: [x.float() for x in drawn(layout, heads, size, "cpu")]
    )
    monkeypatch.setattr(video, "captured", captured)
    monkeypatch.setattr(video, "in_turns_s", in_turns_s)
    monkeypatch.setattr(video, "median_s", lambda run, **_: run() or 1e-4)
    for name, found in (
        ("ceilings", {}),
        ("provenance", {"device": "CPU"}),
        ("check_small", {"check": "small"}),
        ("compile_ahead", None),
    ):
        monkeypatch.setattr(video, name, lambda *_, found=found: found)
    monkeypatch.setattr(video, "sdpa_kernel", lambda *_: nullcontext())
    monkeypatch.setattr(video_predicted, "MODELS", (TINY,))
    seen: list[int] = []
    record = video.run(
        models=(TINY,), densities=(0.95,), mixes=("temporal",), backend="triton", cost_model="h200",
        progress=lambda record: seen.append(len(record["rows"])),
    )  # fmt: skip
    assert seen == [1, 2, 3]
    rows = [row for row in record["rows"] if "R" in row]
    assert [row["mix"] for row in rows] == ["temporal", "temporal"]
    assert rows[0]["density"] < rows[1]["density"]
    assert record["predicted_by"] == "h200"
    assert all(row["predicted_s"] > 0 for row in rows)
    q, k, v = (x.float() for x in drawn(TINY.layout, TINY.num_heads, TINY.head_dim, "cpu"))
    rules = mixed_rules(TINY.layout, TINY.num_heads, "temporal", TINY.density)
    expected = attend(q, k, v, grid_of(TINY.layout), rules, scale=TINY.head_dim**-0.5, backend="torch")
    torch.testing.assert_close(outputs[1], expected, rtol=1e-3, atol=1e-4)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for plan, tiles, cudnn in turns:  # each row's three take turns, dense captured once
        torch.testing.assert_close(cudnn, dense)
        assert plan.shape == tiles.shape == cudnn.shape
    assert len(outputs) == 1 + 2 * len(turns)
    assert {(row["dense_s"], row["seconds"], row["tiles_s"]) for row in rows} == {(4e-3, 1e-3, 0.9e-3)}


def test_every_small_layout_of_every_width_is_compiled_ahead_and_failures_are_left_to_the_check(monkeypatch):
    asked = []

    def attended(q, k, v, grid, rules, *, scale, backend):
        asked.append((q.shape[-1], grid.layout))
        raise RuntimeError("as it will again, where it is reported")

    monkeypatch.setattr(video, "attend", attended)
    video.compile_ahead("triton", (32, 16), device="cpu")
    assert sorted(asked, key=str) == sorted(((size, layout) for size in (32, 16) for layout in video.SMALL), key=str)
