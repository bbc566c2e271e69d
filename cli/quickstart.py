"""The command that runs the whole corridor on an embedded model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from . import options as o
from .errors import guarded, usage
from .render import emit_json, lines, progress_bar, say, table

if TYPE_CHECKING:
    from sparsesearch.quickstart import Quickstart

FOR_TEXT = ("from_scratch", "evaluations", "num_sequences", "seed")
"""Options that mean nothing with --video."""


def quickstart(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder to fill: new, empty, or of an interrupted run.")
    ] = Path("quickstart"),
    density: Annotated[
        float, typer.Option(help="Share of dense attention's tiles the plan may compute.", min=0.01, max=1)
    ] = 0.25,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Profile here instead of using the profile shipped with the package.")
    ] = False,
    evaluations: Annotated[int, typer.Option(help="Plans that the refinement may replay.", min=0)] = 3,
    num_sequences: Annotated[int, typer.Option(help="Held-out sequences to judge on.", min=1)] = 18,
    video: Annotated[
        bool, typer.Option("--video", help="The embedded video model instead; on a CPU a reduced run. Needs diffusers.")
    ] = False,
    mode: Annotated[
        str, typer.Option(help="t2v (text to video) or i2v (image to video).", rich_help_panel="With --video")
    ] = "t2v",
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Run the whole corridor on the embedded model. It does profile, search, apply, eval, check, report."""
    if video:
        o.refuse_given(context, "is for the embedded language model, and not for --video", *FOR_TEXT)
        _quickstart_video(out, density, mode, json)
        return
    o.refuse_given(context, "is for --video, which was not given", "mode")
    from sparsesearch.quickstart import quickstart as run

    with progress_bar() as progress:
        found = run(
            out,
            density_budget=density,
            from_scratch=from_scratch,
            evaluations=evaluations,
            num_sequences=num_sequences,
            seed=seed,
            progress=progress,
        )
    summary = found.summary()
    if json:
        emit_json(summary)
        return
    _show(found, summary, out)


def _show(found: "Quickstart", summary: dict[str, Any], out: Path) -> None:
    """What the plan costs and keeps, beside dense and a uniform window."""
    say(f"profile: {found.profile_source}")
    names = list(found.metrics.variants)
    shares = {"dense": 1.0, "uniform_window": summary["density_uniform_window"], "plan": summary["density"]}
    table(
        f"needle-7m, {summary['num_sequences']} held-out sequences of {summary['quality_length_tokens']} tokens",
        [
            "variant",
            "density",
            "needle",
            "KL to dense",
            "text loss",
            f"prefill {summary['prefill_length_tokens']} (ms)",
        ],
        [
            [
                name.replace("_", " "),
                shares[name],
                summary["needle_accuracy"][name],
                summary["kl_to_dense"][name],
                summary["heldout_loss"][name],
                summary["prefill_s"][name] * 1e3,
            ]
            for name in names
        ],
    )
    gap = "none stated" if summary["gap"] is None else f"{summary['gap']:.2g}"
    lines(
        f"proven gap of the search: {gap};  check: {'passed' if found.check.passed else 'FAILED'}",
        f"written: {out}/report.html",
    )


def _quickstart_video(out: Path, density: float, mode: str, json: bool) -> None:
    """Run the corridor on the embedded video model."""
    import torch

    from sparsesearch.quickstart_video import quickstart_video as run
    from sparsesearch.quickstart_video import size_for
    from sparsesearch.testbed.sampling import Mode

    with usage("--mode"):
        chosen = _mode(mode, get_args(Mode))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"on {device}, this takes {size_for(device).expected}")
    with progress_bar() as progress:
        found = run(out, mode=chosen, density=density, device=device, progress=progress)
    summary = found.summary()
    if json:
        emit_json(summary)
        return
    rows = []
    for name in found.judgement.variants:
        pair = "" if name == "plan" else str(found.judgement.paired("plan", name))
        share = summary["density"][name]
        rows.append([name, share, summary["psnr_db"][name], summary["ssim"][name], pair])
    table(
        f"wan-tiny-11m, {mode}, {summary['clips']} held-out clips, {summary['steps']} steps",
        ["variant", "density, all steps", "PSNR to dense (dB)", "SSIM", "plan better by ± SE (won)"],
        rows,
    )
    lines(f"weighting taken by replay: {summary['weighting']}", f"written: {out} (open {out / 'report.html'})")


def _mode(text: str, known: tuple[str, ...]) -> Any:
    from sparsesearch.errors import SpecError, nearest

    if text not in known:
        raise SpecError(f"unknown mode {text!r}.{nearest(text, known)}")
    return text


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command("quickstart")(guarded(quickstart))
