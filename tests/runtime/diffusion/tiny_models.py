"""Tiny random transformers of every supported family, made from configs, with inputs; no network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsesearch.layout import Layout, Segment, video_layout

FRAMES, HEIGHT, WIDTH = 3, 4, 6  # tokens
TEXT = 7


@dataclass(frozen=True)
class Tiny:
    """A model, its arguments for a batch of two, and the layout a hook must learn."""

    model: Any
    inputs: dict[str, Any]
    layout: Layout

    def run(self, **changed: Any) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.model(**{**self.inputs, **changed}, return_dict=False)[0]
        return output


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def wan() -> Tiny:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 4, FRAMES, HEIGHT * 2, WIDTH * 2),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": _randn(2, TEXT, 8),
    }
    return Tiny(model.eval(), inputs, video_layout(FRAMES, HEIGHT, WIDTH))


def cogvideox() -> Tiny:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8, num_layers=2,
        sample_width=WIDTH * 2, sample_height=HEIGHT * 2, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=TEXT, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = _randn(FRAMES * HEIGHT * WIDTH, 16)
    inputs = {
        "hidden_states": _randn(2, FRAMES, 4, HEIGHT * 2, WIDTH * 2),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": _randn(2, TEXT, 8),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return Tiny(model.eval(), inputs, video_layout(FRAMES, HEIGHT, WIDTH, text_first=TEXT))


def hunyuan(real_text: tuple[int, int] = (TEXT, TEXT)) -> Tiny:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, 4, FRAMES, HEIGHT * 2, WIDTH * 2),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": _randn(2, TEXT, 8),
        "encoder_attention_mask": torch.arange(TEXT) < torch.tensor(real_text)[:, None],
        "pooled_projections": _randn(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }
    return Tiny(model.eval(), inputs, video_layout(FRAMES, HEIGHT, WIDTH, text_last=TEXT))


def ltx() -> Tiny:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=2,
        caption_channels=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": _randn(2, FRAMES * HEIGHT * WIDTH, 4),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": _randn(2, TEXT, 8),
        "encoder_attention_mask": torch.ones(2, TEXT, dtype=torch.bool),
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
    }
    return Tiny(model.eval(), inputs, video_layout(FRAMES, HEIGHT, WIDTH))


def flux() -> Tiny:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    height, width = 2 * HEIGHT, 2 * WIDTH
    places = torch.zeros(height, width, 3)
    places[..., 1], places[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    inputs = {
        "hidden_states": _randn(2, height * width, 4),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": _randn(2, TEXT, 8),
        "pooled_projections": _randn(2, 8),
        "img_ids": places.view(-1, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    segments = (Segment(kind="text", shape=(TEXT,)), Segment(kind="image", shape=(height, width)))
    return Tiny(model.eval(), inputs, Layout(segments=segments))


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "wan": wan,
    "cogvideox": cogvideox,
    "hunyuan": hunyuan,
    "ltx": ltx,
    "flux": flux,
}
