"""The report: one HTML file with inline SVG. No script, no network, light and dark, readable by screen readers and on paper."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

from sparsesearch.evaluate import Metrics
from sparsesearch.plan import Plan
from sparsesearch.report import tables
from sparsesearch.report.decoding import decoding_table
from sparsesearch.report.head_map import head_map
from sparsesearch.report.masks import mask_cards
from sparsesearch.report.palette import INK, kind_css, series_css, swatches
from sparsesearch.report.plot import PLOT_CSS, Curve, Panel, plot
from sparsesearch.report.svg import FONT, MONO

if TYPE_CHECKING:
    from sparsesearch.report.front import TimedFront

_SMALLEST_LOSS = 1e-4


def render(
    plan: Plan,
    metrics: Metrics,
    *,
    variant: str = "plan",
    pareto: Sequence[Curve] | None = None,
    pareto_y_label: str = "predicted loss",
    timed: "TimedFront | None" = None,
    profile_summary: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> str:
    """Make the page.

    Args:
        plan: the plan.
        metrics: what was measured of dense, of the plan (under `variant`) and of any baseline.
        variant: the plan's name in `metrics`.
        pareto: predicted loss against density: the search's front and the uniform baselines in the same unit.
        pareto_y_label: what `pareto` shows, with its unit.
        timed: the same against seconds.
        profile_summary: what to say about the profile: name -> value.
        title: heading; the model's name by default.

    Raises:
        SpecError: the metrics lack the variant.
    """
    length = metrics.best_judged_length
    metrics.at(length, variant)
    kinds = {rule.kind for _, _, rule in plan.heads()}
    what = (
        "Sparse attention"
        if plan.pruning is None
        else "Pruning"
        if kinds == {"dense"}
        else "Pruning and sparse attention"
    )
    heading = title or f"{what} plan for {plan.base_model.name_or_path}"
    sections = [
        (
            "What it costs and what it keeps",
            tables.quality_table(metrics, variant) + _quality_plot(metrics, length, variant),
        ),
        ("What is removed", tables.removals_table(plan)),
        (
            "Which head follows which rule",
            legend(plan.kind_counts()) + f'<div class="scroll">{head_map(plan, length)}</div>',
        ),
        ("While decoding", decoding_table(plan, length)),
        ("What the rules compute", mask_cards(plan, length)),
        ("The search", _pareto(pareto, pareto_y_label, timed)),
        ("Predicted and measured", tables.predictions_table(plan, metrics, variant) + tables.seconds_table(metrics)),
        ("Where answers are found", tables.needle_table(metrics, variant)),
        ("Task by task", tables.task_table(metrics, variant)),
        ("Provenance", tables.provenance(plan, metrics, profile_summary or {})),
    ]
    return assembled(heading, tables.headline(plan, metrics, variant), sections, kinds)


def assembled(heading: str, headline: str, sections: Sequence[tuple[str, str]], kinds: Iterable[str]) -> str:
    """The whole page.

    Args:
        heading: its title.
        headline: HTML of the figures below it.
        sections: (title, HTML); those without content are left out.
        kinds: rule kinds that it colours.
    """
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections if content)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(heading)}</title><style>{INK}{kind_css(kinds)}{series_css()}{PLOT_CSS}{PAGE_CSS}</style></head>\n"
        f'<body><main><header><p class="over">sparsesearch report</p><h1>{escape(heading)}</h1>{headline}</header>{body}</main></body></html>\n'
    )


def _quality_plot(metrics: Metrics, length: int, variant: str) -> str:
    """KL and needle accuracy of every measured variant against the density it reached, with standard errors."""
    names = sorted((name for name in metrics.variants if name != "dense"), key=lambda name: name != variant)
    cells = {name: metrics.at(length, name) for name in names}
    kl = [
        Curve(name, [(cell.density, cell.kl_text.mean, cell.kl_text.standard_error)], line=False)
        for name, cell in cells.items()
        if cell.kl_text.mean > 0
    ]
    needle = [
        Curve(name, [(cell.density, cell.needle.mean, cell.needle.standard_error)], line=False)
        for name, cell in cells.items()
    ]
    dense = metrics.at(length, "dense").needle
    needle.append(Curve("dense", [(1.0, dense.mean, dense.standard_error)], line=False))
    panels = [Panel("Needle accuracy", "density", "questions answered", needle, zero_y=True, x_range=(0, 1))]
    if kl:
        panels.insert(
            0, Panel("KL to dense, lower is better", "density", "nats per token", kl, log_y=True, x_range=(0, 1))
        )
    picture = plot(panels, title=f"Measured at {length} tokens", width=960, standalone=False)
    return f'<div class="scroll">{picture}</div><p class="soft">Measured at {length} tokens; bars are standard errors over sequences.</p>'


def _pareto(curves: Sequence[Curve] | None, y_label: str, timed: "TimedFront | None") -> str:
    fronts = [("density", curves or []), *([(timed.x_label, timed.curves)] if timed else [])]
    panels = [
        Panel("Least predicted loss at each budget", x_label, y_label, shown, log_y=True, x_range=(0, 1))
        for x_label, own in fronts
        if (shown := _lossy(own))
    ]
    if not panels:
        return ""
    axes = " and ".join(panel.x_label for panel in panels)
    picture = plot(panels, title=f"Predicted loss against {axes}", width=960, standalone=False)
    note = f"Loss of the objective that was searched; plans with less than {_SMALLEST_LOSS:g} of the greatest, such as dense, are not drawn."
    return f'<div class="scroll">{picture}</div><p class="soft">{note}</p>'


def _lossy(curves: Sequence[Curve]) -> list[Curve]:
    """What a logarithm can show: not that dense loses nothing, nor losses of rounding, which would take most of the height."""
    least = max((point[1] for curve in curves for point in curve.points), default=0.0) * _SMALLEST_LOSS
    lossy = [replace(curve, points=[point for point in curve.points if point[1] > least]) for curve in curves]
    return [curve for curve in lossy if curve.points]


def legend(counts: Mapping[str, int]) -> str:
    """Kinds by their heads, most of them first, with the colours and letters of the map."""
    known = swatches(counts)
    items = "".join(
        f'<li><svg width="22" height="22" viewBox="0 0 22 22" aria-hidden="true"><rect width="22" height="22" rx="4" class="k-{kind}"/>'
        f'<text x="11" y="15.5" text-anchor="middle" class="letter t-{kind}">{escape(known[kind].letter)}</text></svg>'
        f"{escape(kind)} <span class='count'>{count}</span></li>"
        for kind, count in sorted(counts.items(), key=lambda entry: -entry[1])
    )
    return (
        f'<ul class="legend">{items}</ul><p class="soft">The filled height is the share of tiles the head computes; a full cell of a dynamic '
        "rule means that the data decide, and + that such heads come on top; a struck cell is a removed head. Point at a cell for its rule.</p>"
    )


PAGE_CSS = f"""
*{{box-sizing:border-box}}html{{background:var(--bg);color:var(--ink);font:15px/1.55 {FONT};-webkit-text-size-adjust:100%}}body{{margin:0}}
main{{max-width:1040px;margin:0 auto;padding:40px 20px 64px}}h1{{font-size:28px;line-height:1.2;margin:2px 0 22px;letter-spacing:-.01em}}
h2{{font-size:18px;margin:0 0 14px}}section{{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:22px 24px;margin-top:20px}}
.over{{margin:0;color:var(--accent);font-weight:600;font-size:13px;letter-spacing:.06em;text-transform:uppercase}}
.soft,.count{{color:var(--soft)}}.soft{{font-size:13px}}.count{{font-variant-numeric:tabular-nums}}p.soft{{margin:10px 0 0}}
.kpis{{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:0}}
.kpi{{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:14px 18px}}.kpi dt{{color:var(--soft);font-size:13px}}
.kpi dd{{margin:2px 0 0}}.kpi b{{font-size:27px;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}}
.kpi small{{display:block;color:var(--soft);font-size:13px}}
.scroll{{overflow-x:auto;margin-top:10px}}.scroll svg,.mask svg{{display:block;max-width:100%;height:auto}}.scroll>svg{{margin:0 auto;min-width:min(100%,560px)}}@media(max-width:640px){{.scroll>svg{{max-width:none}}}}
table{{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}}caption{{text-align:left;font-weight:600;padding:14px 0 6px}}
th,td{{text-align:right;padding:7px 10px;border-bottom:1px solid var(--line);white-space:nowrap}}th:first-child,td:first-child{{text-align:left}}
thead th{{color:var(--soft);font-weight:500;font-size:13px;vertical-align:bottom}}tr.own td,tr.own th{{background:var(--faint);font-weight:600}}
td small{{color:var(--soft);font-weight:400;display:block;font-size:12px;line-height:1.3}}tbody th{{font-weight:500}}tbody:last-child tr:last-child>*{{border-bottom:0}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:8px 20px;padding:0;margin:0 0 4px}}.legend li{{display:flex;gap:8px;align-items:center}}
.letter{{font-weight:700;font-size:12px}}.pale{{opacity:.22}}.cell-ink{{fill:var(--ink)}}.track{{fill:var(--faint)}}.strike{{stroke:var(--soft);stroke-width:1.4}}.bar{{fill:var(--accent)}}
.cards{{display:grid;grid-template-columns:repeat(auto-fill,minmax(280px,1fr));gap:18px 22px}}
.mask{{display:grid;grid-template-columns:132px 1fr;gap:14px;margin:0;align-items:start}}.mask figcaption{{font-size:13px;line-height:1.45;overflow-wrap:anywhere}}
code{{font:12.5px {MONO};overflow-wrap:anywhere}}dl.facts{{display:grid;grid-template-columns:minmax(120px,260px) 1fr;gap:6px 20px;margin:0;font-size:14px}}
dl.facts dt{{color:var(--soft)}}dl.facts dd{{margin:0;overflow-wrap:anywhere}}.good{{color:var(--good)}}.bad{{color:var(--bad)}}
.meter{{display:inline-block;width:64px;height:8px;border-radius:4px;background:var(--faint);margin-right:8px;overflow:hidden;vertical-align:1px}}
.meter i{{display:block;height:100%;background:var(--accent)}}
@media(max-width:640px){{dl.facts{{grid-template-columns:1fr;gap:0}}dl.facts dd{{margin-bottom:8px}}section{{padding:18px 14px}}}}
h3{{font-size:15px;margin:18px 0 0}}img.film{{display:block;image-rendering:pixelated;max-width:100%;height:auto;border-radius:8px}}
figure.clip{{margin:0 0 18px}}figure.clip figcaption{{font-size:13px;color:var(--soft);margin-bottom:6px}}
@media print{{section,.kpi{{break-inside:avoid}}}}
"""
