"""Some frames of judged samples, on disk beside their metrics, for the report."""

from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from sparsesearch.artifacts import write_bytes
from sparsesearch.errors import ArtifactError


def frames_path(metrics: Path) -> Path:
    """Where the frames of a metrics file lie."""
    return metrics.with_suffix(".frames.safetensors")


def save_frames(metrics: Path, frames: Mapping[str, Float[Tensor, "B 3 F Y X"]]) -> None:
    """Write pixels in [-1, 1], in 8 bits, by variant."""
    pixels = {
        name: ((video.cpu() + 1) * 127.5).round().clamp(0, 255).byte().contiguous() for name, video in frames.items()
    }
    write_bytes(frames_path(metrics), save(pixels))


def load_frames(metrics: Path) -> dict[str, Float[Tensor, "B 3 F Y X"]]:
    """What `save_frames` wrote.

    Raises:
        ArtifactError: it is missing.
    """
    path = frames_path(metrics)
    if not path.is_file():
        raise ArtifactError(
            f"{metrics} must have its frames beside it, but there is no {path.name}. Make both again with `sparsesearch eval --run`."
        )
    return {name: video.float() / 127.5 - 1 for name, video in load_file(path).items()}
