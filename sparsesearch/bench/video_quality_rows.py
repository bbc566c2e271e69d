"""Rows of the record that `bench.video_quality` writes."""

from collections.abc import Sequence
from typing import Any

import torch

from sparsesearch.denoising.corridor import Accepted
from sparsesearch.denoising.judgement import Judgement

OURS = "video_mixture"


def search_row(way: Accepted) -> dict[str, Any]:
    """What the replay on calibration clips said of every rival."""
    schedule = way.plan.schedule
    ranges = None if schedule is None else [[item.first, item.end] for item in schedule.ranges]
    return {"weighting": way.weighting, "ranges": ranges, "log10_error": way.log10_error}


def paired_rows(found: Judgement, densities: Sequence[float]) -> dict[str, Any]:
    """Our plan beside every other variant of its budget, and Sparse-vDiT's menu beside the uniform plan."""
    rows = {}
    for density in densities:
        names = [name for name in found.variants if name.endswith(f" {density}") or f" {density} #" in name]
        pairs = [(f"{OURS} {density}", name) for name in names]
        for first, second in [*pairs, (f"sparse_vdit {density}", f"uniform {density}")]:
            if first != second and first in found.variants:
                pair = found.paired(first, second)
                row = {"mean": pair.mean, "standard_error": pair.standard_error, "won": pair.won}
                rows[f"{first} - {second}"] = row
    return rows


def provenance(device: str, command: Sequence[str]) -> dict[str, str]:
    """Device, versions and command line."""
    import diffusers

    where = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return {"device": where, **versions, "command": " ".join(command)}
