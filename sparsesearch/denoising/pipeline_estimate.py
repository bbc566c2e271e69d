"""What a profile of a pipeline would take, from its configuration alone: no weights are read."""

import json
from pathlib import Path
from typing import Any

from sparsesearch.artifacts import read_text
from sparsesearch.denoising.sampling_run import SamplingRun
from sparsesearch.errors import UnsupportedModelError
from sparsesearch.runtime.diffusion.families import FAMILIES
from sparsesearch.search_space import SearchSpace

_LAYERS = ("num_layers", "num_single_layers")


def estimate(folder: Path, run: SamplingRun, space: SearchSpace, *, sensitivity: str) -> dict[str, Any]:
    """Transformers, heads, and how often the whole run would be sampled; the user knows what one sample takes.

    Args:
        folder: of the pipeline.
        run: what is sampled.
        space: candidates.
        sensitivity: none, layer or head.

    Raises:
        UnsupportedModelError: no transformer of it has a sparse runtime.
    """
    configs = {path.parent.name: json.loads(read_text(path)) for path in sorted(folder.glob("*/config.json"))}
    found = {name: config for name, config in configs.items() if config.get("_class_name") in FAMILIES}
    if not found:
        raise UnsupportedModelError(f"{folder} must have one of {', '.join(FAMILIES)} to run sparse, but has none.")
    layers = {name: sum(config.get(field) or 0 for field in _LAYERS) for name, config in found.items()}
    heads = {name: layers[name] * config["num_attention_heads"] for name, config in found.items()}
    calibrated = [rule for rule in space.candidates if rule.needs_calibration]
    orders = len({rule.token_order for rule in calibrated})
    replays = {"none": 0, "layer": sum(layers.values()), "head": sum(heads.values())}[sensitivity] * len(
        run.step_ranges
    )
    passes = 1 + len(found) * (1 + bool(calibrated))  # dense once for all, then masses and errors of each
    blocks = f"{4 * orders * sum(heads.values())} bytes x (tokens / {space.block_tokens})^2" if calibrated else "none"
    return {
        "transformers": ", ".join(found),
        "layers": sum(layers.values()),
        "heads": sum(heads.values()),
        "candidates": len(space.candidates),
        "samples_of_the_run": run.num_samples,
        "runs": passes + replays,
        "of_them_replays_for_sensitivities": replays,
        "tile_masses_per_captured_step": blocks,
        "captured_steps": run.captured_per_range * len(run.step_ranges),
    }
