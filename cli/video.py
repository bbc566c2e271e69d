"""What `quickstart --video` prints."""

from pathlib import Path
from typing import Any, get_args

from .errors import usage
from .render import emit_json, lines, progress_bar, say, table


def quickstart_video(out: Path, density: float, mode: str, json: bool) -> None:
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
