"""Prefill on Hopper: which shape of the kernel in `hopper_attention` serves a call, and its launch."""

from dataclasses import dataclass

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparsesearch.kernels.hopper_attention import hopper_attention


@dataclass(frozen=True)
class HopperConfig:
    """Compile-time shape of the kernel for one (head_dim, block size).

    Attributes:
        tile_keys: keys per block (BN).
        stages: depth of the K/V ring.
        overlap_tiles: Q has two buffers and O its own, so that a tile's first scores are computed beside the last product of the one
            before. Where shared memory is too small, O reuses Q's buffer and tiles follow one another.
    """

    tile_keys: int
    stages: int
    overlap_tiles: bool = True


LONG_KEYS = 4096
"""From here on, in causal attention up to head_dim 64, registers hold a tile's queries (HELD), which spares a fifth of what the products read from
shared memory, and the consumers issue in turn (TURNS, `hopper_turns`). Measured in one run on an H200 against neither: 2-5 % faster at 8k, 2 % on
average at 4k (from 2 % slower, 31 of 32 heads streaming, to 7 % faster, sparse). Without a causal mask it gained nothing. At head_dim 128, queries would spill 150 bytes a thread, and turns gained nothing."""
TILE_ROWS = 128
"""Three consumers of 64 rows would have 160 registers each: ptxas spills 1.2 KB of the late softmax at head_dim 64, 256 bytes of the exact one."""
CONFIGS: dict[tuple[int, int], HopperConfig] = {
    (32, 64): HopperConfig(64, 4),
    (32, 128): HopperConfig(128, 4),
    (64, 64): HopperConfig(64, 4),
    (64, 128): HopperConfig(128, 3),
    (96, 64): HopperConfig(64, 4),
    (96, 128): HopperConfig(128, 2),
    (128, 64): HopperConfig(64, 4),
    (128, 128): HopperConfig(128, 2),
    (256, 64): HopperConfig(64, 2, overlap_tiles=False),
}


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of [B, H, S, D] that copies `rows` rows of one head; columns are filled up to a power of two with zeros."""
    block = [1, 1, rows, padded_head_dim(x.shape[-1])]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # any 16-bit type has this layout
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def padded_head_dim(head_dim: int) -> int:
    """Width of the tile in shared memory: the next power of two."""
    return 1 << (head_dim - 1).bit_length()


def constants(
    config: HopperConfig,
    *,
    num_heads: int,
    group: int,
    head_dim: int,
    num_keys: int,
    causal: bool,
    bias: bool,
    masks: bool,
) -> dict[str, int | bool]:
    """Compile-time arguments of `hopper_attention`."""
    turns = causal and head_dim <= 64 and num_keys >= LONG_KEYS
    return {
        "HEADS": num_heads,
        "GROUP": group,
        "BN": config.tile_keys,
        "D": padded_head_dim(head_dim),
        "DV": head_dim,
        "STAGES": config.stages,
        "Q_BUFFERS": 1 + config.overlap_tiles,
        "CAUSAL": causal,
        "BIAS": bias,
        "MASKS": masks,
        "HELD": turns and not (bias and masks),  # both leave too few registers
        "TURNS": turns,
    }


OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
"""168 registers for twelve warps; the consumers then take 240 each and leave the producer 24."""


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, parts: Tensor, lse_parts: Tensor, bias: Tensor | None,
    masks: Tensor | None, words: Tensor | None, tiles: Tensor, entries: Tensor, bin_ptr: Tensor, *, scale: float, causal: bool, config: HopperConfig,
) -> None:  # fmt: skip
    """Run the kernel; every tensor is on the same Hopper device. Shapes as in `dispatch.prefill`, parts [slots, 128, padded head_dim] like q, lse_parts [slots, 128]."""
    head_dim = q.shape[-1]
    own_bias = lse if bias is None else bias
    fixed = constants(
        config,
        num_heads=q.shape[1],
        group=q.shape[1] // k.shape[1],
        head_dim=head_dim,
        num_keys=k.shape[2],
        causal=causal,
        bias=bias is not None,
        masks=masks is not None,
    )
    hopper_attention[(bin_ptr.numel() - 1,)](
        describe(q, TILE_ROWS // 2), describe(k, config.tile_keys), describe(v, config.tile_keys), describe(out, TILE_ROWS // 2),
        out, lse, parts, lse_parts, own_bias, entries if masks is None else masks, entries if words is None else words,
        tiles, entries, bin_ptr,
        out.stride(0), out.stride(1), out.stride(2), lse.stride(1), own_bias.stride(0), own_bias.stride(1),
        0 if words is None else words.shape[2], scale,
        **fixed, **OPTIONS,
    )  # fmt: skip
