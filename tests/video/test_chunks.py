"""Light Forcing: frames then blocks, densities that fall from chunk to chunk, schedules that know chunks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsesearch.block_mask import BlockGrid
from sparsesearch.denoising.judge import static_density
from sparsesearch.denoising.published import light_forcing_plan
from sparsesearch.errors import SpecError
from sparsesearch.layout import Layout, video_layout
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.plan_lint import lint
from sparsesearch.rules.diagonal_band import DiagonalBand
from sparsesearch.rules.frame_topk import FrameTopk
from sparsesearch.step_schedule import StepRange, StepSchedule, chunk_densities

INFO = BaseModelInfo(
    name_or_path="tiny", model_type="wan", modules=("a", "b"), num_heads=(2, 1), num_kv_heads=(2, 1), head_dim=(8, 8)
)
LAYOUT = video_layout(6, 4, 8)


# ---- the rule


@pytest.mark.parametrize(
    "layout",
    [
        video_layout(6, 4, 8),
        video_layout(5, 3, 7, text_first=9),
        video_layout(7, 6, 7, text_last=20),
        video_layout(1, 1, 1),
    ],
)
@pytest.mark.parametrize(("keep", "frames"), [(0.2, 1), (0.5, 2), (0.3, 0)])
def test_best_blocks_of_the_best_frames(layout: Layout, keep: float, frames: int) -> None:
    """Row by row by hand: rank frames, then rank blocks that hold a token of a kept frame."""
    grid = BlockGrid(layout.num_tokens, layout.num_tokens, 16, causal=False, layout=layout)
    q, k = torch.randn(2, layout.num_tokens, 16, generator=torch.Generator().manual_seed(layout.num_tokens))
    tiles = FrameTopk(keep=keep, frames=frames).select(grid, q[None], k[None])[0]
    frame_of = layout.coordinates()[:, 0]
    pieces = [list(range(16 * j, min(16 * j + 16, layout.num_tokens))) for j in range(grid.num_k_blocks)]
    text = [any(int(frame_of[t]) < 0 for t in piece) for piece in pieces]
    count, free = layout.grid_shape[0], [j for j in range(len(pieces)) if not text[j]]
    for p, piece in enumerate(pieces):
        if text[p]:
            assert tiles[p].all()
            continue
        mean = q[piece].mean(0)
        own = {int(frame_of[t]) for t in piece}
        forced = {0, *own, *(f - 1 for f in own if f)}
        score = {f: float(mean @ k[frame_of == f].mean(0)) for f in range(count) if f not in forced}
        kept = forced | set(sorted(score, key=lambda f: -score[f])[:frames])
        inside = [j for j in free if j != p and {int(frame_of[t]) for t in pieces[j]} & kept]
        budget = -(-len(free) * keep // 1)
        best = sorted(inside, key=lambda j: -float(mean @ k[pieces[j]].mean(0)))[: int(budget) - 1]
        assert set(tiles[p].nonzero()[:, 0].tolist()) == {p, *best, *(j for j in range(len(pieces)) if text[j])}


# ---- the law


@pytest.mark.parametrize(
    ("chunks", "density", "least", "decay"), [(7, 0.4, 0.1, 1.0), (21, 0.25, 0.05, 0.5), (2, 0.7, 0.2, 2.0)]
)
def test_densities_fall_and_meet_the_budget(chunks: int, density: float, least: float, decay: float) -> None:
    found = chunk_densities(chunks, density, least=least, decay=decay)
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    work = range(1, chunks + 1)
    assert sum(w * d for w, d in zip(work, found, strict=True)) / sum(work) == pytest.approx(density, abs=1e-9)
    open_ones = [d for d in found[1:] if d < 1]
    beta = [(d - least) * (chunks - len(open_ones) + place) ** decay for place, d in enumerate(open_ones)]
    assert beta == pytest.approx([beta[0]] * len(beta), abs=1e-9)


def test_a_density_out_of_reach_is_named() -> None:
    with pytest.raises(SpecError, match=r"between 0\.2"):
        chunk_densities(4, 0.15, least=0.2)
    assert chunk_densities(1, 1.0, least=0.5) == [1.0]


# ---- the schedule


def plan(**changes: Any) -> Plan:
    options = {"num_steps": 4, "num_chunks": 4, "density": 0.5, "least": 0.2, "layout": LAYOUT, "block_tokens": 16}
    return light_forcing_plan(INFO, **{**options, **changes})


def test_each_chunk_has_its_budget(tmp_path: Path) -> None:
    made, densities = plan(), chunk_densities(4, 0.5, least=0.2)
    for chunk, share in enumerate(densities):
        rules = {rule for _, _, rule in made.at_step(2, chunk=chunk).heads()}
        assert {rule.kind for rule in rules} == {"dense" if chunk == 0 else "frame_topk"}
        assert all(rule.keep == pytest.approx(share, abs=1e-6) for rule in rules if isinstance(rule, FrameTopk))
    assert made.at_step(0, chunk=9) == made.at_step(0, chunk=3)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    with pytest.raises(SpecError, match="at_chunk"):
        made.at_step(0)
    with pytest.raises(SpecError, match="at least 2 chunks"):
        plan(num_chunks=1)


def test_ranges_may_share_steps_if_their_chunks_differ() -> None:
    table = {"a": ("dense", "dense")}
    made = StepSchedule.of(8, [(0, 4, table), (0, 8, table), (4, 8, table)], chunks=[(0, 2), (2, None), (0, 2)])
    assert [made.range_index(5, chunk=c) for c in range(4)] == [2, 2, 1, 1]
    with pytest.raises(ValueError, match="without overlap"):
        StepSchedule.of(8, [(0, 4, table), (2, 8, table)], chunks=[(0, 2), (1, None)])
    with pytest.raises(ValueError, match="range of chunks"):
        StepRange(first=0, end=1, choices={}, chunks=(2, 2))
    plain = StepSchedule.of(8, [(0, 4, table)])
    assert "chunks" not in plain.model_dump(mode="json")["ranges"][0]
    assert plain.range_index(1, chunk=5) == 0


def test_the_linter_names_the_chunks_and_density_waits_for_them() -> None:
    made = plan()
    assert static_density(made, LAYOUT, 4) is None
    band = DiagonalBand.model_validate({"reach": {"a": -500, "b": 0.1}})
    bad = made.model_copy(
        update={
            "rules": {band.label: band},
            "schedule": StepSchedule.of(4, [(0, 4, {"a": (band.label, band.label)})], chunks=[(1, None)]),
        }
    )
    assert {finding.check for finding in lint(bad)} == {"length_law"}
