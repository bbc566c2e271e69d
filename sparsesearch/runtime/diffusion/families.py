"""What differs between model families: which modules are self-attention, and how a call's arguments tell the token grid."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsesearch.errors import UnsupportedModelError, nearest
from sparsesearch.layout import Layout, Segment, video_layout

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One transformer class of diffusers.

    Attributes:
        blocks: attribute of each list of blocks -> attribute of a block's self-attention. Cross-attention and token refiners are not in it.
        layout: (config, arguments of forward) -> the tokens of its self-attention.
        key_mask: argument of forward that marks real text tokens, if the attention masks the others.
        timestep_scale: scheduler's timesteps / the model's argument.
    """

    blocks: dict[str, str]
    layout: Callable[[Any, Arguments], Layout]
    key_mask: str | None = None
    timestep_scale: float = 1.0


def family_of(model: Any) -> Family:
    """The family of a transformer, by its class or a base class.

    Raises:
        UnsupportedModelError: there is none.
    """
    for kind in type(model).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    name = type(model).__name__
    raise UnsupportedModelError(f"no sparse runtime for the diffusers model {name}.{nearest(name, FAMILIES)}")


def _wan(config: Any, given: Arguments) -> Layout:
    """[B, C, F, H, W] in patches of three axes; text goes through cross-attention."""
    sizes = given["hidden_states"].shape[2:]
    frames, height, width = (size // patch for size, patch in zip(sizes, config.patch_size, strict=True))
    return video_layout(frames, height, width)


def _cogvideox(config: Any, given: Arguments) -> Layout:
    """[B, F, C, H, W]; text stands before the video in one sequence."""
    _, frames, _, height, width = given["hidden_states"].shape
    patch, patch_t = config.patch_size, config.patch_size_t or 1
    text = given["encoder_hidden_states"].shape[1]
    return video_layout(-(-frames // patch_t), height // patch, width // patch, text_first=text)


def _hunyuan(config: Any, given: Arguments) -> Layout:
    """[B, C, F, H, W]; text stands behind the video, padded to one length."""
    frames, height, width = given["hidden_states"].shape[2:]
    patch, text = config.patch_size, given["encoder_hidden_states"].shape[1]
    return video_layout(frames // config.patch_size_t, height // patch, width // patch, text_last=text)


def _ltx(config: Any, given: Arguments) -> Layout:
    """Packed tokens; their grid comes as three arguments."""
    grid = tuple(given.get(name) for name in ("num_frames", "height", "width"))
    if None in grid:
        raise UnsupportedModelError(
            "LTX must be called with num_frames, height and width under a sparse plan, as its pipelines do, but was not."
        )
    frames, height, width = (int(size) for size in grid if size is not None)
    return video_layout(frames, height, width)


def _flux(config: Any, given: Arguments) -> Layout:
    """Packed image tokens behind the text; their rows and columns stand in `img_ids`."""
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    height, width = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
    text = given["encoder_hidden_states"].shape[1]
    return Layout(segments=(Segment(kind="text", shape=(text,)), Segment(kind="image", shape=(height, width))))


FAMILIES = {
    "WanTransformer3DModel": Family({"blocks": "attn1"}, _wan),
    "CogVideoXTransformer3DModel": Family({"transformer_blocks": "attn1"}, _cogvideox),
    "HunyuanVideoTransformer3DModel": Family(
        {"transformer_blocks": "attn", "single_transformer_blocks": "attn"}, _hunyuan, "encoder_attention_mask"
    ),
    "LTXVideoTransformer3DModel": Family({"transformer_blocks": "attn1"}, _ltx),
    "FluxTransformer2DModel": Family(
        {"transformer_blocks": "attn", "single_transformer_blocks": "attn"}, _flux, timestep_scale=1000.0
    ),
}
"""Class name -> family. Wan 2.2 A14B is two transformers of the first class, each with its own plan."""
