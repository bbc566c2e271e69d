"""The report of a video plan: frames dense, sparse and their difference, the map over layers, heads and steps, and every clip's verdict."""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.denoising.judge import Judgement, difference_image
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.menu import static_work
from sparsesearch.report.page import PAGE_CSS
from sparsesearch.report.palette import INK, kind_css, swatches
from sparsesearch.report.png import data_uri
from sparsesearch.report.svg import figure, text
from sparsesearch.rules import Rule

_FRAMES = 6
_NARROW = 100
_IMG_CSS = "img.film{display:block;image-rendering:pixelated;max-width:100%;height:auto;border-radius:8px}figure.clip{margin:0 0 18px}"


def render_video(
    plan: Plan | Mapping[str, Plan],
    judgement: Judgement,
    dense: Float[Tensor, "B 3 F Y X"],
    sparse: Float[Tensor, "B 3 F Y X"],
    *,
    variant: str = "plan",
    facts: Mapping[str, Any] | None = None,
) -> str:
    """Make the page.

    Args:
        plan: the plan, or that of each transformer of a pipeline.
        judgement: held-out figures, the plan's under `variant`.
        dense: some held-out samples without the plan, pixels in [-1, 1].
        sparse: the same under it.
        variant: the plan's name in the judgement.
        facts: what else to say: name -> value.
    """
    plans = {"": plan} if isinstance(plan, Plan) else dict(plan)
    kinds = {rule.kind for each in plans.values() for rule in each.rules.values()}
    first = next(iter(plans.values()))
    heading = f"Sparse video plan for {first.provenance.get('pipeline', first.base_model.name_or_path)}"
    maps = "".join((f"<h3>{escape(name)}</h3>" if name else "") + rule_maps(each) for name, each in plans.items())
    sections = [
        ("Held-out samples beside dense", _table(judgement, variant)),
        ("Frames: dense, sparse, and their difference four times enlarged", _films(dense, sparse)),
        ("Which head follows which rule, in which steps", f"{_legend(kinds)}{maps}"),
        ("Provenance", _facts({**first.provenance, **(facts or {})})),
    ]
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(heading)}</title><style>{INK}{kind_css(kinds)}{PAGE_CSS}{_IMG_CSS}</style></head>\n"
        f'<body><main><header><p class="over">sparsesearch report</p><h1>{escape(heading)}</h1></header>{body}</main></body></html>\n'
    )


def _table(judgement: Judgement, variant: str) -> str:
    rows = []
    for name, found in judgement.variants.items():
        paired = "" if name == variant else str(judgement.paired(variant, name))
        clips = " ".join(f"{value:.1f}" for value in found.values["psnr_db"])
        density = "by the data" if found.density is None else f"{found.density:.3f}"
        own = ' class="own"' if name == variant else ""
        rows.append(
            f"<tr{own}><th>{escape(name)}</th><td>{density}</td><td>{found.mean('psnr_db'):.2f}</td><td>{found.mean('ssim'):.3f}</td>"
            f"<td>{paired}</td><td><small>{clips}</small></td></tr>"
        )
    return (
        '<div class="scroll"><table><thead><tr><th>variant</th><th>density, all steps</th><th>PSNR to dense (dB)</th><th>SSIM</th>'
        f"<th>{escape(variant)} better by (dB)</th><th>PSNR of each clip</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="soft">Same noise, {judgement.num_steps} steps. Differences: mean ± standard error over clips (clips won).</p>'
    )


def _films(dense: Float[Tensor, "B 3 F Y X"], sparse: Float[Tensor, "B 3 F Y X"]) -> str:
    figures = []
    for clip, (wanted, found) in enumerate(zip(dense, sparse, strict=True)):
        frames = np.linspace(0, wanted.shape[1] - 1, min(_FRAMES, wanted.shape[1])).round().astype(int).tolist()
        strips = torch.stack([video[:, frames] for video in (wanted, found, difference_image(found, wanted))])
        picture = _sheet(strips)
        figures.append(
            f'<figure class="clip"><img class="film" alt="Clip {clip}: dense above, sparse, difference below, frames '
            f'{", ".join(map(str, frames))}" src="{data_uri(picture)}"></figure>'
        )
    return "".join(figures)


def _sheet(strips: Float[Tensor, "R 3 F Y X"]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Rows of frames, enlarged if they are tiny, with a line between them."""
    enlarge = 3 if strips.shape[-1] < _NARROW else 1
    pixels = ((strips.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    pixels = torch.nn.functional.pad(pixels, (0, 1, 0, 1), value=128)
    rows, _, frames, height, width = pixels.shape
    sheet = pixels.permute(0, 3, 2, 4, 1).reshape(rows * height, frames * width, 3)
    return sheet.repeat_interleave(enlarge, 0).repeat_interleave(enlarge, 1).numpy()


def rule_maps(plan: Plan) -> str:
    """One map of layers x heads per range of steps; the filled height is the share of tiles."""
    schedule, layout = plan.schedule, plan.layout
    shares: dict[str, float] = {}
    if layout is not None:
        shares = {n: static_work(r, layout, plan.block_tokens) for n, r in plan.rules.items() if not r.dynamic}
    if schedule is None:
        parts = [("all steps", plan)]
    else:
        parts = [
            (
                f"steps {item.first} to {item.end - 1} of {schedule.num_steps}",
                plan.at_step(item.first, chunk=item.chunk_span[0]),
            )
            for item in schedule.ranges
        ]
    return "".join(f'<div class="scroll">{_map(part, title, shares)}</div>' for title, part in parts)


def _map(plan: Plan, title: str, shares: Mapping[str, float]) -> str:
    info = plan.base_model
    cell = max(6.0, min(34.0, 900.0 / max(info.num_heads)))
    left, top = 64.0, 26.0
    parts = [text(left, 12, title, css="axis")]
    for layer, module in enumerate(info.modules):
        y = top + layer * (cell + 3)
        if cell >= 14 or layer % 4 == 0:
            parts.append(text(left - 10, y + cell * 0.68, f"layer {layer}", css="tick", anchor="end"))
        parts += [
            _cell(rule, shares.get(rule.label, 1.0), left + head * (cell + 3), y, cell, f"{module}:{head}")
            for head, rule in enumerate(plan.module_rules(module))
        ]
    width, height = left + max(info.num_heads) * (cell + 3), top + len(info.modules) * (cell + 3) + 8
    return figure(width, height, "".join(parts), label=f"Rule of each head, {title}")


def _cell(rule: Rule, share: float, x: float, y: float, cell: float, address: str) -> str:
    filled = cell * share
    letter = swatches([rule.kind])[rule.kind].letter
    mark = text(x + cell / 2, y + cell * 0.66, letter, css="letter cell-ink", anchor="middle") if cell >= 14 else ""
    return (
        f"<g><title>{escape(f'{address}: {rule.label}, {share:.0%} of tiles')}</title>"
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}" rx="3" class="k-{rule.kind} pale"/>'
        f'<rect x="{x:.1f}" y="{y + cell - filled:.1f}" width="{cell:.1f}" height="{filled:.1f}" rx="3" class="k-{rule.kind}"/>{mark}</g>'
    )


def _legend(kinds: set[str]) -> str:
    known = swatches(kinds)
    items = "".join(
        f'<li><svg width="22" height="22" viewBox="0 0 22 22" aria-hidden="true"><rect width="22" height="22" rx="4" class="k-{kind}"/>'
        f'<text x="11" y="15.5" text-anchor="middle" class="letter t-{kind}">{escape(known[kind].letter)}</text></svg>{escape(kind)}</li>'
        for kind in sorted(kinds)
    )
    return f'<ul class="legend">{items}</ul>'


def _facts(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'
