"""The report of a video plan: frames dense, sparse and their difference, the map over layers, heads and steps, and every clip's verdict."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.denoising.judge import difference_image
from sparsesearch.denoising.judgement import Judgement
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.menu import static_work
from sparsesearch.report.head_map import rule_map
from sparsesearch.report.page import assembled, legend
from sparsesearch.report.png import data_uri
from sparsesearch.report.tables import cards, named

_FRAMES = 6
_NARROW_PX, _SHEET_PX = 100, 950
_FILM_NOTE = (
    '<p class="soft">Above dense, in the middle under the plan, below their difference, four times enlarged.</p>'
)
_MAP_NOTE = '<p class="soft">Numbers count heads, once in each range of steps.</p>'


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
    heads = Counter(
        rule.kind for each in plans.values() for part in _parts(each).values() for _, _, rule in part.heads()
    )
    first = next(iter(plans.values()))
    heading = f"Sparse video plan for {first.provenance.get('pipeline', first.base_model.name_or_path)}"
    maps = "".join((f"<h3>{escape(name)}</h3>" if name else "") + rule_maps(each) for name, each in plans.items())
    scores = judgement.variants[variant].values["psnr_db"]
    sections = [
        ("Held-out samples beside dense", _table(judgement, variant)),
        ("Frames of held-out samples", _films(dense, sparse, scores) + _FILM_NOTE),
        ("Which head follows which rule, in which steps", f"{legend(heads)}{_MAP_NOTE}{maps}"),
        ("Provenance", named({**first.provenance, **(facts or {})})),
    ]
    return assembled(heading, _headline(judgement, variant), sections, heads)


def _headline(judgement: Judgement, variant: str) -> str:
    own = judgement.variants[variant]
    clips = len(own.values["psnr_db"])
    density = "by the data" if own.density is None else f"{100 * own.density:.1f} %"
    entries = [
        ("Density", density, f"of dense attention's tiles over {judgement.num_steps} steps"),
        ("PSNR to dense", f"{own.mean('psnr_db'):.1f} dB", f"mean of {clips} held-out samples, same noise"),
        ("SSIM to dense", f"{own.mean('ssim'):.3f}", "1 is equal"),
    ]
    rivals = {name: found.mean("psnr_db") for name, found in judgement.variants.items() if name != variant}
    if rivals:
        best = max(rivals, key=rivals.__getitem__)
        pair = judgement.paired(variant, best)
        entries.append(
            (
                f"Better than {best}",
                f"{pair.mean:+.1f} dB",
                f"± {pair.standard_error:.1f}, {pair.won} of {clips} samples won",
            )
        )
    return cards(entries)


def _table(judgement: Judgement, variant: str) -> str:
    rows = []
    for name in sorted(judgement.variants, key=lambda name: name != variant):
        found = judgement.variants[name]
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


def _films(dense: Float[Tensor, "B 3 F Y X"], sparse: Float[Tensor, "B 3 F Y X"], psnr_db: Sequence[float]) -> str:
    figures = []
    for clip, (wanted, found) in enumerate(zip(dense, sparse, strict=True)):
        frames = np.linspace(0, wanted.shape[1] - 1, min(_FRAMES, wanted.shape[1])).round().astype(int).tolist()
        strips = torch.stack([video[:, frames] for video in (wanted, found, difference_image(found, wanted))])
        said = f"Sample {clip}, frames {', '.join(map(str, frames))}: {psnr_db[clip]:.1f} dB"
        figures.append(
            f'<figure class="clip"><figcaption>{said}</figcaption><img class="film" alt="{said}. Dense above, under the plan, difference below" '
            f'src="{data_uri(_sheet(strips))}"></figure>'
        )
    return "".join(figures)


def _sheet(strips: Float[Tensor, "R 3 F Y X"]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Rows of frames, enlarged if they are tiny, with a line between them."""
    small = strips.shape[-1] < _NARROW_PX
    enlarge = max(3, _SHEET_PX // (strips.shape[2] * strips.shape[-1])) if small else 1
    pixels = ((strips.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    pixels = torch.nn.functional.pad(pixels, (0, 1, 0, 1), value=128)
    rows, _, frames, height, width = pixels.shape
    sheet = pixels.permute(0, 3, 2, 4, 1).reshape(rows * height, frames * width, 3)
    return sheet.repeat_interleave(enlarge, 0).repeat_interleave(enlarge, 1).numpy()


def rule_maps(plan: Plan) -> str:
    """One map of layers x heads per range of steps; the filled height is the share of tiles."""
    layout = plan.layout
    shares: dict[str, float] = {}
    if layout is not None:
        shares = {n: static_work(r, layout, plan.block_tokens) for n, r in plan.rules.items() if not r.dynamic}
    return "".join(
        f'<div class="scroll">{rule_map(part, lambda rule: shares.get(rule.label), title=f"query head, {title}")}</div>'
        for title, part in _parts(plan).items()
    )


def _parts(plan: Plan) -> dict[str, Plan]:
    """The plan in each range of steps, by what the range is called."""
    schedule = plan.schedule
    if schedule is None:
        return {"all steps": plan}
    return {
        f"steps {item.first} to {item.end - 1} of {schedule.num_steps}"
        + (
            "" if item.chunk_span[0] == 0 and not schedule.by_chunk else f", chunks from {item.chunk_span[0]}"
        ): plan.at_step(item.first, chunk=item.chunk_span[0])
        for item in schedule.ranges
    }
