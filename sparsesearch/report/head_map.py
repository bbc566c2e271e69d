"""The map: one cell per query head, one row per layer."""

from collections.abc import Callable
from html import escape

from sparsesearch.comparison import TileShares
from sparsesearch.plan import Plan
from sparsesearch.report.palette import swatches
from sparsesearch.report.svg import figure, text
from sparsesearch.rules.base import Rule

_LEFT, _TOP, _BARS = 64.0, 34.0, 190.0


ShareOf = Callable[[Rule], float | None]
"""Share of dense's tiles that a rule computes; None where the data decide."""


def head_map(plan: Plan, length_tokens: int) -> str:
    """The map of a language model's plan at a length."""
    return rule_map(plan, TileShares(plan, length_tokens).of)


def rule_map(plan: Plan, share_of: ShareOf, *, title: str = "query head") -> str:
    """Colour and letter say the kind of rule, the filled height says the share of dense's tiles; a bar per layer sums them up.

    Heads of one KV group stand closer together. Every cell carries its address and rule as a tooltip.

    Args:
        plan: the plan; of a schedule, its rules at one step.
        share_of: the share of tiles of each rule.
        title: what stands above the numbers of the heads.
    """
    info = plan.base_model
    cell = _cell(max(info.num_heads), len(info.modules))
    columns = max(_x(index, heads // kv, cell) + cell for heads, kv in zip(info.num_heads, info.num_kv_heads, strict=True)
                  for index in (heads - 1,))  # fmt: skip
    rows = [
        _row(plan, layer, module, _TOP + layer * (cell + 3), cell, columns, share_of)
        for layer, module in enumerate(info.modules)
    ]
    heads = [
        text(
            _LEFT + _x(head, info.num_heads[0] // info.num_kv_heads[0], cell) + cell / 2,
            _TOP - 8,
            str(head),
            css="tick",
            anchor="middle",
        )
        for head in range(info.num_heads[0])
        if cell >= 18 or head % 8 == 0
    ]
    width, height = _LEFT + columns + _BARS, _TOP + len(rows) * (cell + 3) + 10
    caption = text(_LEFT, 11, title, css="axis") + text(
        _LEFT + columns + 20, _TOP - 8, "tiles computed in the layer", css="axis"
    )
    counts = ", ".join(f"{count} {kind}" for kind, count in plan.kind_counts().items())
    return figure(
        width,
        height,
        caption + "".join(heads) + "".join(rows),
        label=f"Rule of each query head, {len(rows)} layers" + ("" if title == "query head" else f", {title}"),
        description=f"{counts}. A full list follows from `sparsesearch explain`.",
    )


def _row(plan: Plan, layer: int, module: str, y: float, cell: float, columns: float, share_of: ShareOf) -> str:
    rules = plan.module_rules(module)
    group = plan.base_model.num_heads[layer] // plan.base_model.num_kv_heads[layer]
    parts = [
        text(
            _LEFT - 10,
            y + cell * 0.68,
            f"layer {layer}" if cell >= 14 or layer % 4 == 0 else "",
            css="tick",
            anchor="end",
        )
    ]
    known = swatches(rule.kind for rule in rules)
    gone = plan.removed_heads(module)
    for head, rule in enumerate(rules):
        if head in gone:
            parts.append(_gone(_LEFT + _x(head, group, cell), y, cell, f"{module}:{head}"))
            continue
        share = share_of(rule)
        parts.append(
            _square(_LEFT + _x(head, group, cell), y, cell, rule, share, f"{module}:{head}", known[rule.kind].letter)
        )
    found = [0.0 if head in gone else share_of(rule) for head, rule in enumerate(rules)]
    certain = [share for share in found if share is not None]
    x, length = _LEFT + columns + 20, 110.0
    mean = sum(certain) / len(found)
    parts.append(f'<rect x="{x:.1f}" y="{y + cell / 2 - 4:.1f}" width="{length}" height="8" rx="4" class="track"/>')
    if mean > 0:
        parts.append(
            f'<rect x="{x:.1f}" y="{y + cell / 2 - 4:.1f}" width="{max(mean * length, 3):.1f}" height="8" rx="4" class="bar"/>'
        )
    open_ended = "" if len(certain) == len(found) else " +"
    if cell >= 12 or layer % 4 == 0:
        parts.append(text(x + length + 8, y + cell * 0.5 + 4, f"{100 * mean:.0f} %{open_ended}", css="tick"))
    return "".join(parts)


def _gone(x: float, y: float, side: float, address: str) -> str:
    """A head that is removed: a struck, empty cell."""
    corners = f'x1="{x:.1f}" y1="{y + side:.1f}" x2="{x + side:.1f}" y2="{y:.1f}"'
    return (
        f'<g><title>{escape(address)}: removed</title><rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" '
        f'rx="{min(4.0, side / 5):.1f}" class="track"/><line {corners} class="strike"/></g>'
    )


def _square(x: float, y: float, side: float, rule: Rule, share: float | None, address: str, letter: str) -> str:
    """The kind's colour, pale above the share of tiles and full below; a dynamic rule, whose share the data decide, is full."""
    kind = rule.kind
    said = "the data decide" if share is None else f"{100 * share:.1f} % of the tiles"
    filled = side if share is None or rule.replaces_output else max(side * share, 3.0)
    radius = min(4.0, side / 5)
    corner = min(radius, filled / 2)
    parts = [
        f"<g><title>{escape(f'{address}: {rule.label}, {said}')}</title>",
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" rx="{radius:.1f}" class="k-{kind} pale"/>',
        f'<rect x="{x:.1f}" y="{y + side - filled:.1f}" width="{side:.1f}" height="{filled:.1f}" rx="{corner:.1f}" class="k-{kind}"/>',
    ]
    if side >= 18:
        covered = filled > side / 2
        middle = y + side - filled / 2 if covered else y + (side - filled) / 2
        css = f"t-{kind}" if covered else "cell-ink"
        parts.append(text(x + side / 2, middle + 4.3, letter, css=f"letter {css}", anchor="middle"))
    return "".join(parts) + "</g>"


def _x(head: int, group: int, cell: float) -> float:
    """Where a head's cell begins: 3 px between heads, 5 more between KV groups of several heads."""
    return head * (cell + 3) + (head // group * 5 if group > 1 else 0)


def _cell(heads: int, layers: int) -> float:
    """Cells as large as a page allows."""
    return max(7.0, min(34.0, 620 / heads - 3, 1400 / layers - 3))
