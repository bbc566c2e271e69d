"""Every check of the linter finds its defect, and leaves good plans alone."""

from typing import Any

import pytest
import torch

from sparsesearch.layout import video_layout
from sparsesearch.order import AXES, Tile, parse_order
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.plan_lint import cached_bytes, densities, lint, scale_finding
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.cached_rest import CachedRest
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.diagonal_band import DiagonalBand
from sparsesearch.rules.neighbourhood import Neighbourhood
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.reuse import Reuse
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.step_schedule import StepSchedule

VIDEO = video_layout(4, 8, 8, text_last=10)
WINDOW = SinkWindow(sink=64, window=LengthLaw(a=128))


def plan(*layers: tuple[Rule, ...], kv_heads: int | None = None, **changes: Any) -> Plan:
    modules = tuple(f"blocks.{i}" for i in range(len(layers)))
    heads = tuple(len(rules) for rules in layers)
    info = BaseModelInfo(
        name_or_path="tiny",
        model_type="wan",
        modules=modules,
        num_heads=heads,
        num_kv_heads=tuple(kv_heads or count for count in heads),
        head_dim=(64,) * len(layers),
    )
    content: dict[str, Any] = {
        "base_model": info,
        "block_tokens": 64,
        "unit": "query_head",
        "lengths_tokens": (1024,),
        "rules": {rule.label: rule for rules in layers for rule in rules} | {"dense": Dense()},
        "assignments": {m: tuple(rule.label for rule in rules) for m, rules in zip(modules, layers, strict=True)},
        **changes,
    }
    return Plan.model_validate(content)


def checks(made: Plan, **options: Any) -> set[str]:
    return {finding.check for finding in lint(made, **options)}


def test_good_plans_have_no_findings() -> None:
    assert not lint(plan((WINDOW, Dense()), (Dense(), WINDOW)))
    bands = (DiagonalBand(reach=LengthLaw(b=0.1)), DiagonalBand(reach=LengthLaw(b=0.1), order=parse_order("axes(hwf)")))
    assert not lint(plan(bands, layout=VIDEO, lengths_tokens=(266,)))
    assert not lint(plan((PooledTopk(keep=LengthLaw(a=128)),), (Reuse(layer=0),)))


def test_empty_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def hollow(self: Rule, grid: Any, q: Any = None, k: Any = None) -> torch.Tensor:
        tiles: torch.Tensor = grid.reachable().clone()
        tiles[1] = False
        return tiles

    monkeypatch.setattr(DiagonalBand, "select", hollow)
    band = DiagonalBand(reach=LengthLaw(b=0.1))
    assert checks(plan((band,), layout=VIDEO)) == {"empty_row"}


def scheduled(first: Rule, second: Rule) -> Plan:
    """Two layers whose rules hold in steps 2 to 3 only; plans check their base assignments themselves."""
    schedule = StepSchedule.of(4, [(2, 4, {"blocks.0": (first.label,), "blocks.1": (second.label,)})])
    rules = {rule.label: rule for rule in (first, second, Dense())}
    return plan((Dense(),), (Dense(),), rules=rules, schedule=schedule)


@pytest.mark.parametrize(
    ("first", "second"),
    [(Dense(), Reuse(layer=0)), (PooledTopk(keep=LengthLaw(a=64)), Reuse(layer=1)), (WINDOW, Reuse(layer=0))],
)
def test_reuse_source(first: Rule, second: Rule) -> None:
    assert checks(scheduled(first, second)) == {"reuse_source"}
    assert lint(scheduled(first, second))[0].where == "steps 2-3: blocks.1:0"


def test_reuse_order(monkeypatch: pytest.MonkeyPatch) -> None:
    top = PooledTopk(keep=LengthLaw(a=64))
    assert not lint(scheduled(top, Reuse(layer=0)))
    monkeypatch.setattr(PooledTopk, "token_order", property(lambda self: Tile(4, 4, 4)))
    assert checks(scheduled(top, Reuse(layer=0))) == {"reuse_order"}


def test_kv_saving_needs_the_whole_group() -> None:
    mixed = plan((WINDOW, Dense()), kv_heads=1, unit="kv_group")
    assert checks(mixed) == {"kv_saving"}
    assert not lint(plan((WINDOW, WINDOW), kv_heads=1, unit="kv_group"))


def test_kv_saving_must_not_need_a_key_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def strided(self: Rule, grid: Any, q: Any = None, k: Any = None) -> torch.Tensor:
        return grid.reachable() & ((grid.q_blocks() - grid.k_blocks()) % 3 == 0)

    monkeypatch.setattr(SinkWindow, "select", strided)
    assert checks(plan((WINDOW,))) == {"kv_saving"}


def test_text_policy() -> None:
    assert checks(plan((WINDOW,), layout=VIDEO, lengths_tokens=(266,))) == {"text_policy"}
    assert checks(plan((DiagonalBand(reach=LengthLaw(b=0.1)),))) == {"text_policy"}
    assert not lint(plan((WINDOW,), layout=video_layout(4, 8, 8)))


def test_launch_groups() -> None:
    rules = tuple(DiagonalBand(reach=LengthLaw(b=0.1), order=parse_order(f"axes({axes})")) for axes in AXES)
    made = plan(rules, layout=VIDEO)
    assert checks(made) == {"launch_groups"}
    assert checks(made, max_groups=6) == set()
    tiles = tuple(Neighbourhood.model_validate({"window": "1x4x4", "order": f"tile(1,{n},4)"}) for n in (2, 4))
    assert checks(plan(tiles, layout=VIDEO), max_groups=1) == {"launch_groups"}


def test_length_law() -> None:
    late = SinkWindow(sink=64, window=LengthLaw(a=-512, b=0.25))
    assert checks(plan((late,), lengths_tokens=(1024, 4096))) == {"length_law"}
    assert not lint(plan((late,), lengths_tokens=(4096,)))


def test_cached_bytes() -> None:
    """Re-ttention on HunyuanVideo: one residual of tokens x heads x head_dim x 2 bytes per layer, 44 GB over 60 layers."""
    layout = video_layout(33, 45, 80, text_last=256)
    rule = CachedRest(of=DiagonalBand(reach=LengthLaw(b=0.03)))
    assert CachedRest.bytes_per_head(layout.num_tokens, 128) * 24 * 60 == pytest.approx(44e9, rel=0.02)
    made = plan((rule, Dense()), (Dense(), rule), layout=VIDEO)
    assert cached_bytes(made) == 2 * 266 * (64 * 2 + 4)
    assert not lint(made)
    assert checks(made, max_cached_bytes=70_000) == {"cached_bytes"}


def test_softmax_scale() -> None:
    assert scale_finding("blocks.0", 64**-0.5, 64) is None
    found = scale_finding("blocks.0", 32**-0.5, 64)
    assert found is not None
    assert found.check == "softmax_scale"


def test_densities_are_named_by_their_area() -> None:
    """A causal window of half the keys: half of the reachable tiles and a quarter of the square are different numbers of one plan."""
    named = densities(plan((Dense(),)), 1024)
    assert named == {"reachable": 1.0, "full_square": (16 * 17 / 2) / 256}
    video = densities(plan((Dense(),), layout=VIDEO), 1024)
    assert video == {"reachable": 1.0, "full_square": 1.0}


def test_densities_are_of_all_steps() -> None:
    """Dense in two of four steps, then one layer of nothing in the other two: three quarters."""
    made = scheduled(Dense(), Zero())
    assert densities(made, 1024)["reachable"] == pytest.approx((2 * 2 + 2 * 1) / 8)
