"""The page: well-formed, complete, self-contained, and true to the plan and the metrics it shows."""

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from embedded_model import INFO, plan_of, silencing

from sparsesearch.cut import Cut, LayerCut
from sparsesearch.errors import SpecError
from sparsesearch.evaluate import Metrics
from sparsesearch.plan import BaseModelInfo, BudgetRecord, Plan, uniform_plan
from sparsesearch.presets import preset_path
from sparsesearch.profiling.record import Profile
from sparsesearch.report import Curve, Panel, corridor, plot, render
from sparsesearch.report.front import timed_front
from sparsesearch.report.head_map import head_map
from sparsesearch.report.masks import example_grid, example_tiles
from sparsesearch.report.palette import swatches
from sparsesearch.report.svg import Axis
from sparsesearch.rules import rule_kinds
from sparsesearch.rules.base import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.sink_window import SinkWindow

SVG = "{http://www.w3.org/2000/svg}"
EVERY_RULE = [rule for kind in rule_kinds().values() for rule in kind.examples()]
ALONE = [rule for rule in EVERY_RULE if not (rule.reuses or rule.needs_layout)]


def _cell(needle: float, kl: float, density: float) -> dict[str, Any]:
    def estimate(mean: float) -> dict[str, Any]:
        return {"mean": mean, "standard_error": 0.01, "num_sequences": 96}

    return {
        "density": density,
        "heldout_loss": estimate(2.1234),
        "heldout_loss_minus_dense": estimate(0.0456),
        "kl_text": estimate(kl),
        "kl_answer": estimate(kl),
        "top1_agreement": estimate(0.95),
        "needle": estimate(needle),
        "needle_minus_dense": estimate(needle - 1.0),
        "needle_by_template": {"set_get": estimate(needle)},
        "needle_by_depth": {"0-0.2": estimate(needle)},
        "prefill_s": 2.0 * density,
    }


def _metrics() -> Metrics:
    row = {
        "dense": _cell(1.0, 0.0, 1.0),
        "plan": _cell(0.9876, 0.0191, 0.2511),
        "uniform <window>": _cell(0.04, 0.09, 0.28),
    }
    return Metrics.model_validate(
        {
            "model": "m",
            "results": {512: row},
            "plans": {"plan": "1", "uniform <window>": "2"},
            "data": {"needle": "ab" * 32},
            "provenance": {"command": "sparsesearch eval <x> & y", "versions": {"torch": "2.13"}},
        }
    )


def _plan() -> Plan:
    rules = {(index // 8, index % 8): rule for index, rule in enumerate(ALONE)}
    budget = {"metric": "density", "bound": 0.25, "predicted": {"512": 0.2345}}
    return plan_of(rules, budgets=(budget,), provenance={"seed": 7, "config": "<script>alert(1)</script>"})


@pytest.fixture(scope="module")
def page() -> str:
    pareto = [Curve("front", [(0.1, 2.0), (0.2, 0.5), (0.4, 0.1)]), Curve("uniform", [(0.2, 3.0)], line=False)]
    return render(_plan(), _metrics(), pareto=pareto, profile_summary={"sequences": 8})


def test_a_plan_that_removes_says_what() -> None:
    cut = Cut(
        layers={0: LayerCut(num_heads=8, num_kv_heads=4, num_channels=704, removed_heads=(0, 1), removed_channels=(5,))}
    )
    plan = plan_of({}, pruning=cut)
    page = render(plan, _metrics())
    assert "<h1>Pruning plan for" in page
    assert "6 of 8" in page
    assert "3 of 4" in page
    assert "703 of 704" in page
    assert page.count(": removed</title>") == page.count('class="strike"') == 2
    assert "What is removed" not in render(_plan(), _metrics())


def test_losses_of_rounding_do_not_take_the_height_of_the_search() -> None:
    pareto = [Curve("front", [(0.1, 20.0), (0.5, 0.01), (0.9, 1e-12), (1.0, 0.0)]), Curve("nothing", [(1.0, 0.0)])]
    section = render(_plan(), _metrics(), pareto=pareto).split("<h2>The search</h2>")[1].split("</section>")[0]
    assert section.count('class="mark') == 1 + 2, "one in the legend"
    assert ">1e-12<" not in section
    assert "nothing" not in section


def test_the_front_is_drawn_in_the_seconds_that_the_search_limited() -> None:
    profile = Profile.load(preset_path("profiles", "needle-7m"))
    plan = Plan.load(preset_path("profiles", "needle-7m-plan"))
    assert timed_front(profile, plan) is None
    record = BudgetRecord(metric="ttft", bound=0.9, predicted={"8192": 0.9}, cost_model="roofline:a100")
    served = {"workloads": ["prompt=8192,generate=16,batch=2,weight=1"]}
    timed = plan.model_copy(update={"budgets": (record,), "unit": "kv_group", "provenance": plan.provenance | served})
    found = timed_front(profile, timed)
    assert found is not None
    assert found.x_label == "ttft over dense's, predicted by roofline:a100"
    assert [curve.name for curve in found.curves] == [
        "searched plans",
        *(f"searched, at most {n} of the cache" for n in ("50%", "25%")),
    ]
    free, *bounded = (dict(curve.points) for curve in found.curves)
    losses = list(free.values())
    assert losses == sorted(losses, reverse=True)
    assert all(0 < share <= 1 for share in free)
    assert min(min(own.values()) for own in bounded) > min(losses)
    section = render(plan, _metrics(), timed=found).split("<h2>The search</h2>")[1].split("</section>")[0]
    assert "predicted by roofline:a100" in section


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    assert not re.search(r"<script|<link|<img|@import|url\(|\ssrc=|\shref=", page)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a namespace is a name, not a request"


def test_the_page_is_well_formed_and_each_figure_is_named(page: str) -> None:
    body = page[page.index("<body>") : page.index("</html>")].replace("<br>", "<br/>")
    tree = ElementTree.fromstring(re.sub(r" class=own", ' class="own"', body).replace("&nbsp;", " "))
    figures = [figure for figure in tree.iter(f"{SVG}svg") if figure.get("aria-hidden") != "true"]
    assert len(figures) >= 2
    for figure in figures:
        assert figure.get("role") == "img"
        assert figure.get("aria-label")
    headings = [heading.text for heading in tree.iter("h2")]
    assert headings == [
        "What it costs and what it keeps",
        "Which head follows which rule",
        "While decoding",
        "What the rules compute",
        "The search",
        "Predicted and measured",
        "Where answers are found",
        "Provenance",
    ]


def test_text_from_files_is_escaped(page: str) -> None:
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "uniform &lt;window&gt;" in page
    assert "uniform <window>" not in page


def test_the_page_shows_the_measured_figures(page: str) -> None:
    for figure in (
        "0.988",
        "0.0191",
        "25.1 %",
        "2.123",
        "+0.046 ± 0.010",
        "3.98 ×",
        "502 ms",
        "0.2345",
        "0.2511",
        "+7.1 %",
    ):
        assert figure in page, figure


def test_the_same_input_gives_the_same_page() -> None:
    assert render(_plan(), _metrics()) == render(_plan(), _metrics())


def test_sections_without_data_are_left_out() -> None:
    page = render(silencing((0, 0)), _metrics())
    assert "The search" not in page
    assert "Predicted and measured" not in page


def test_a_variant_that_was_not_measured_is_refused() -> None:
    with pytest.raises(SpecError, match="was not judged"):
        render(silencing(), _metrics(), variant="ours")


def test_the_map_has_a_titled_cell_per_head() -> None:
    plan = _plan()
    tree = ElementTree.fromstring(head_map(plan, 512))
    titles = [title.text or "" for group in tree.iter(f"{SVG}g") for title in group.findall(f"{SVG}title")]
    assert len(titles) == 64
    for (module, head, rule), title in zip(plan.heads(), titles, strict=True):
        assert title.startswith(f"{module}:{head}: {rule.label}, ")


def test_the_filled_height_is_the_share_of_tiles() -> None:
    window = SinkWindow(sink=0, window=LengthLaw(a=64))  # 8 of 36 tiles
    tree = ElementTree.fromstring(head_map(plan_of({(0, 0): window}), 512))
    first = next(group for group in tree.iter(f"{SVG}g"))
    whole, filled = (float(rect.get("height", "")) for rect in first.findall(f"{SVG}rect"))
    assert filled / whole == pytest.approx(8 / 36, abs=0.005)


@pytest.mark.parametrize(("layers", "heads", "kv"), [(1, 1, 1), (32, 32, 8), (80, 64, 8), (3, 12, 12)])
def test_maps_of_any_size_stay_on_the_page(layers: int, heads: int, kv: int) -> None:
    info = BaseModelInfo(
        name_or_path="m",
        model_type="llama",
        modules=tuple(f"layers.{i}" for i in range(layers)),
        num_heads=(heads,) * layers,
        num_kv_heads=(kv,) * layers,
        head_dim=(64,) * layers,
    )
    tree = ElementTree.fromstring(head_map(uniform_plan(info, Dense(), block_tokens=64, lengths_tokens=(512,)), 512))
    width, height = float(tree.get("width", "")), float(tree.get("height", ""))
    assert width <= 1000
    for rect in tree.iter(f"{SVG}rect"):
        assert float(rect.get("x", "")) + float(rect.get("width", "")) <= width
        assert float(rect.get("y", "")) + float(rect.get("height", "")) <= height


@pytest.mark.parametrize("rule", EVERY_RULE, ids=lambda rule: rule.label)
def test_every_rule_has_a_picture(rule: Rule) -> None:
    grid = example_grid(rule, 2048, 64)
    tiles = example_tiles(rule, grid)
    assert tiles.shape == (32, 32)
    assert not (tiles & ~grid.reachable()).any()
    assert rule.replaces_output != bool(tiles.any())


def test_kinds_look_different_and_unknown_ones_get_a_look() -> None:
    known = swatches(rule_kinds())
    assert len({swatch.letter for swatch in known.values()}) == len(known)
    assert len({swatch.light for swatch in known.values()}) == len(known)
    assert swatches(["chunked", "strided"])["strided"].letter == "S"
    assert swatches(["dense", "dilated"])["dilated"].letter == "I", "dense has the D"


def test_a_plot_puts_points_where_the_axes_say() -> None:
    panel = Panel("t", "x", "y", [Curve("a", [(0.0, 3.0), (1.0, 300.0)])], log_y=True, x_range=(0, 1))
    tree = ElementTree.fromstring(plot([panel], title="two points"))
    places = [(float(mark.get("cx", "")), float(mark.get("cy", ""))) for mark in tree.iter(f"{SVG}circle")]
    assert len(places) == 3, "one in the legend"
    labels = {
        label.text: float(label.get("y", "")) for label in tree.iter(f"{SVG}text") if label.get("class") == "tick"
    }
    assert places[1][1] == pytest.approx(labels["3"] - 4, abs=0.2)
    assert places[2][1] == pytest.approx(labels["300"] - 4, abs=0.2)


@pytest.mark.parametrize(
    ("panel", "message"),
    [
        (Panel("empty", "x", "y", []), "at least one point"),
        (Panel("zero", "x", "y", [Curve("a", [(0.1, 0.0)])], log_y=True), "every y must be positive"),
        (Panel("nan", "x", "y", [Curve("a", [(0.1, float("nan"))])]), "finite values only"),
    ],
)
def test_plots_that_cannot_be_drawn_are_refused(panel: Panel, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        plot([panel], title="bad")


@pytest.mark.parametrize(
    "axis",
    [
        Axis(0, 1, 0, 9),
        Axis(0.013, 0.017, 0, 9),
        Axis(1e-5, 3.0, 9, 0, log=True),
        Axis(0.03, 0.09, 9, 0, log=True),
        Axis(1e-13, 40.0, 9, 0, log=True),
    ],
)
def test_axes_have_a_readable_number_of_ticks(axis: Axis) -> None:
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 14
    assert all(axis.low * 0.999 <= tick <= axis.high * 1.001 for tick in ticks)
    assert axis.at(axis.low) == pytest.approx(axis.start)
    assert axis.at(axis.high) == pytest.approx(axis.end)


def test_the_corridor_is_a_picture_of_all_stages() -> None:
    tree = ElementTree.fromstring(corridor())
    words = {label.text for label in tree.iter(f"{SVG}text")}
    assert {"profile", "search", "apply", "eval", "check, report", "sparse_plan.json", "metrics.json"} <= words
    assert corridor() == corridor()


def test_dynamic_shares_are_marked_as_open() -> None:
    picture = head_map(plan_of({(0, 0): PooledTopk(keep=LengthLaw(b=0.25))}), 512)
    assert f"{INFO.modules[0]}:0: pooled_topk(keep=0.25N,sink=64), the data decide" in picture
    assert "88 % +" in picture
