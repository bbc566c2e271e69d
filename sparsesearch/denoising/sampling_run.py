"""A run of a diffusers pipeline, written down: prompts, seeds, size, steps. Plans are calibrated on one and judged on another."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import torch
import yaml
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from sparsesearch.artifacts import canonical_json, read_text, sha256_file, sha256_text
from sparsesearch.errors import SpecError, first_problem, nearest

Output = Literal["latent", "pt"]


class SamplingRun(BaseModel):
    """What to sample.

    Sample i takes prompt i, image i, row i of the inputs, and `seed + i` for its noise; they are sampled one after another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompts: tuple[str, ...] = Field((), description="one text per sample")
    prompts_file: str | None = Field(
        None, description="instead: a file with one prompt per line, beside the run's file"
    )
    images: tuple[str, ...] = Field((), description="image to video: one file per sample")
    inputs: str | None = Field(
        None, description="safetensors file of further arguments with a row per sample, such as prompt_embeds"
    )
    steps: int = Field(30, ge=1, description="denoising steps")
    seed: int = Field(0, ge=0, description="of the first sample's noise")
    height: int | None = Field(None, ge=1, description="pixels; the pipeline's own by default")
    width: int | None = Field(None, ge=1, description="pixels")
    num_frames: int | None = Field(None, ge=1, description="of a video")
    guidance_scale: float | None = Field(None, description="the pipeline's own by default")
    negative_prompt: str | None = Field(None, description="for guidance")
    arguments: dict[str, JsonValue] = Field({}, description="any other argument of the pipeline's call")
    step_ranges: tuple[float, ...] = Field(
        (0.2, 0.5, 1.0), description="profiling: where ranges of steps end, as shares of the run"
    )
    captured_per_range: int = Field(2, ge=1, description="profiling: steps to look at in each range")
    bitmaps: Literal["range", "run"] = Field(
        "range",
        description="profiling: calibrate for each range, or for all steps so that `search --max-ranges` can merge ranges",
    )
    query_blocks: int | None = Field(
        None, ge=1, description="profiling: score so many blocks of queries instead of all; for very long sequences"
    )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a YAML file; other files that it names are looked for beside it.

        Raises:
            SpecError: it is not YAML, has unknown keys, or says nothing to sample.
        """
        try:
            found = cls.model_validate(yaml.safe_load(read_text(path)))
        except yaml.YAMLError as error:
            raise SpecError(f"{path} must be YAML, but is damaged. Correct it.") from error
        except ValidationError as error:
            raise SpecError(f"{path}: {first_problem(error, cls.model_fields)}") from error
        beside = {
            name: str(path.parent / given) for name in ("prompts_file", "inputs") if (given := getattr(found, name))
        }
        images = tuple(str(path.parent / image) for image in found.images)
        found = found.model_copy(update={**beside, "images": images})
        if found.prompts_file is not None:
            if found.prompts:
                raise SpecError(f"{path}: give prompts or prompts_file, not both.")
            texts = tuple(line.strip() for line in read_text(Path(found.prompts_file)).splitlines() if line.strip())
            found = found.model_copy(update={"prompts": texts, "prompts_file": None})
        found.num_samples  # noqa: B018  # refuses now what could not be sampled later
        return found

    @property
    def num_samples(self) -> int:
        """Samples of one run.

        Raises:
            SpecError: there are none, or prompts, images and inputs disagree.
        """
        counts = {name: len(given) for name in ("prompts", "images") if (given := getattr(self, name))}
        counts |= {f"inputs: {name}": len(value) for name, value in self.tensors().items()}
        if not counts or len(set(counts.values())) > 1:
            raise SpecError(
                f"prompts, images and inputs must tell one number of samples, but tell {counts or 'none'}. Give one of each per sample."
            )
        return next(iter(counts.values()))

    @property
    def name(self) -> str:
        """For the record, and for resuming: what is sampled, and a digest of everything that matters."""
        content = self.model_dump(mode="json", exclude={"step_ranges", "captured_per_range", "bitmaps", "query_blocks"})
        files = [sha256_file(Path(file)) for file in (*self.images, *([self.inputs] if self.inputs else []))]
        return f"{self.num_samples} samples of {self.steps} steps, run {sha256_text(canonical_json([content, files]))[:12]}"

    def tensors(self) -> dict[str, Tensor]:
        """The inputs of all samples."""
        return {} if self.inputs is None else load_file(self.inputs)

    def sample(self, pipeline: Any, output: Output) -> Iterator[Float[Tensor, "..."]]:
        """Every sample in turn: final latents as the pipeline returns them, or pixels [3, F, Y, X] in [-1, 1].

        Raises:
            SpecError: the pipeline takes no such argument.
        """
        tensors = self.tensors()
        for index in range(self.num_samples):
            given = self._arguments(index, {name: value[index : index + 1] for name, value in tensors.items()})
            known = inspect.signature(pipeline.__call__).parameters
            for name in given:
                if name not in known:
                    raise SpecError(f"a {type(pipeline).__name__} takes no argument {name!r}.{nearest(name, known)}")
            found = pipeline(
                **given,
                generator=torch.Generator().manual_seed(self.seed + index),
                output_type=output,
                return_dict=False,
            )[0]
            yield found[0] if output == "latent" else _pixels(found)

    def _arguments(self, index: int, row: dict[str, Tensor]) -> dict[str, Any]:
        sizes = ("height", "width", "num_frames", "guidance_scale", "negative_prompt")
        given = {name: value for name in sizes if (value := getattr(self, name)) is not None}
        if self.prompts:
            given["prompt"] = self.prompts[index]
        if self.images:
            from PIL import Image

            given["image"] = Image.open(self.images[index]).convert("RGB")
        return {**self.arguments, **given, **row, "num_inference_steps": self.steps}


def _pixels(found: Tensor) -> Float[Tensor, "3 F Y X"]:
    """Of one video [1, F, 3, Y, X] or image [1, 3, Y, X] in [0, 1]; an image is one frame."""
    video = found[0] if found.ndim == 5 else found
    return video.float().cpu().transpose(0, 1) * 2 - 1
