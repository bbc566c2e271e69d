"""The embedded model: an unmodified `WanTransformer3DModel` in pixel space, and the embedding of its captions."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsesearch.errors import UnsupportedModelError
from sparsesearch.presets import preset_path
from sparsesearch.testbed.clips import VOCABULARY

MODEL = "wan-tiny-11m"
CAPTION_WIDTH = 64
CONDITION_CHANNELS = 4  # a mask and the first frame, as in Wan 2.1 image-to-video without its image encoder


@dataclass(frozen=True)
class VideoBed:
    """Model and caption embedding, on one device.

    Attributes:
        transformer: predicts the velocity ε − x₀ at time 1000·σ.
        captions: symbol -> vector.
    """

    transformer: Any
    captions: nn.Embedding

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.captions.weight.device

    @torch.no_grad()
    def velocity(
        self,
        x: Float[Tensor, "B 3 F Y X"],
        sigma: float,
        condition: Float[Tensor, "B 4 F Y X"],
        captions: Int[Tensor, "B 13"],
    ) -> Float[Tensor, "B 3 F Y X"]:
        """One call of the model, at one noise level."""
        dtype = self.transformer.dtype
        output = self.transformer(
            torch.cat([x, condition], 1).to(dtype),
            torch.full((x.shape[0],), sigma * 1000, device=x.device),
            self.captions(captions).to(dtype),
            return_dict=False,
        )
        velocity: Tensor = output[0].float()
        return velocity


def load_bed(device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VideoBed:
    """Load the embedded model in evaluation mode.

    Args:
        device: where to put it.
        dtype: of the transformer; float32 on the CPU and bfloat16 elsewhere by default.

    Raises:
        UnsupportedModelError: diffusers is not installed.
    """
    require_diffusers()
    from diffusers import WanTransformer3DModel

    folder = preset_path("models", MODEL)
    chosen = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    transformer = WanTransformer3DModel.from_pretrained(folder, torch_dtype=chosen).to(device)
    transformer.train(False)
    embedding = nn.Embedding(VOCABULARY, CAPTION_WIDTH)
    embedding.weight.data.copy_(load_file(folder / "caption_embedding.safetensors")["embedding.weight"])
    return VideoBed(transformer, embedding.to(device).requires_grad_(False))


def require_diffusers() -> None:
    """Refuse early and clearly.

    Raises:
        UnsupportedModelError: diffusers is not installed.
    """
    if find_spec("diffusers") is None:
        raise UnsupportedModelError(
            "video and image transformers need diffusers, which is not installed. pip install 'sparsesearch[diffusers]'."
        )
