"""What a calibration measures: shapes, lengths and batches, and the models whose whole layers show what the parts leave out."""

from dataclasses import dataclass
from typing import Literal

from sparsesearch.cost.device.tile_cases import tile_cases
from sparsesearch.cost.layer_parts import linear_widths
from sparsesearch.model_shapes import ModelShape
from sparsesearch.rules import Rule, rule_kinds
from sparsesearch.rules.dense_source import DenseSource

PROBE = ModelShape("probe", "llama", 4, 3072, 8192, 32, 8, 128, 1024, False, 5e5, 1 << 18)
"""Whole layers of this shape, which no known model has, show what the parts leave out when they run together."""

EVICTING = ModelShape("evicting", "llama", 36, 4096, 13312, 32, 8, 128, 128256, False, 5e5, 1 << 18)
"""The same with weights that each exceed a GPU's cache and together are 15.6 GB, and a vocabulary as large as a real one: on an H200 a
layer of an 8B model takes a tenth longer than one of the same size among five. Also with a single layer, which shows what a step takes
besides its layers."""

SHORT = ModelShape("short", "llama", 24, 640, 1536, 12, 4, 64, 1024, False, 5e5, 1 << 18)
"""Fused layers of a small model: their products are too short to hide the launches between them, which those of `EVICTING` do, and no power
of two long, so that the last step along their weights is not a full one. All weights together are 3 times an H200's cache."""

PROBE_KV_TOKENS = 4096
SHORT_KV_TOKENS = 512
"""What a small model keeps under a plan: reading it takes less than the launches around it."""

HAVE_KERNELS = ("vertical_slash", "pooled_topk")
"""Dynamic rules whose choice is a few launches for any number of heads, which a graph can hold."""

MANY_HEADS = 64
STEP_GROUP, STEP_BLOCK_TOKENS = 4, 64
"""Query heads per KV head and keys per block of steps whose heads choose what they read."""
LAYER_WIDTHS: tuple[tuple[int, int], ...] = (
    (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096), (2048, 2048), (8192, 8192), (512, 512),
)  # fmt: skip

SkinnyUse = Literal["normed", "gated", "added"]
"""What a product of the fused step does besides: the norm before it, that and SiLU(gate) · up, or the residual and the norm after it."""

SKINNY: tuple[tuple[int, int, SkinnyUse], ...] = (
    (6144, 4096, "normed"), (4096, 4096, "added"), (26624, 4096, "gated"), (4096, 13312, "added"), (128256, 4096, "normed"),
    (16384, 3072, "gated"), (3072, 8192, "added"), (6144, 2560, "normed"), (49152, 1024, "normed"), (1024, 576, "normed"),
    (3072, 576, "gated"), (576, 1536, "added"), (32768, 640, "normed"),
)  # fmt: skip
"""Lines of weights, inner columns and use: every tiling of `kernels.skinny_tiling`, short and long."""


def estimators() -> dict[str, Rule]:
    """A generous example of every dynamic rule that chooses by itself in a causal prompt."""
    kinds = rule_kinds().items()
    return {kind: r.examples()[-1] for kind, r in kinds if r.dynamic and not r.reuses and not r.needs_layout}


def step_rules() -> dict[str, Rule]:
    """An example of every dynamic rule that chooses by itself for a decoded token."""
    return {kind: rule for kind, rule in estimators().items() if rule.decodes and not isinstance(rule, DenseSource)}


@dataclass(frozen=True)
class RunPlan:
    """What a calibration measures.

    Attributes:
        tile_kinds: (head_dim, block_tokens) of the tile kernel.
        dense_tokens: prompt lengths of the model's own dense attention, at every `decode_head_dims`.
        decode: (batch, keys per sequence); 8 KV heads of four query heads.
        decode_few: keys of one sequence; 2 KV heads, since every head's parts are merged from as many more workers as there are fewer heads.
        decode_head_dims: head sizes of decoding and of dense attention.
        step_batches: batches of steps whose heads choose what they read; 32 query heads of 8 KV heads.
        step_blocks: blocks among which a head chooses.
        step_keys: keys that it reads.
        steps_held_out: (batch, blocks, keys read) of steps that choose and read, to which nothing is fitted.
        gemm_tokens: rows of the activations of a linear layer.
        gemm_widths: (outputs, inputs) of a linear layer.
        skinny_rows: rows of the fused step's products.
        skinny: (lines of weights, inner columns, use) of these.
        pointwise_tokens: rows of the activations of norms and the like.
        estimator_tokens: prompt lengths of the dynamic rules.
        layer_batches: batches of whole decoding layers.
        layer_tokens: prompt lengths of whole layers.
        peak_side: side of the matrices whose product is the peak.
        longest_tokens: tile cases beyond this length are left out.
        time_share: share of the usual time per case.
    """

    tile_kinds: tuple[tuple[int, int], ...] = ((128, 128), (64, 128), (128, 64), (64, 64))
    dense_tokens: tuple[int, ...] = (1024, 4096, 16384, 65536)
    decode: tuple[tuple[int, int], ...] = (
        (1, 256), (1, 1024), (1, 2048), (1, 4096), (1, 16384), (1, 65536), (1, 131072), (8, 512), (8, 2048), (8, 8192), (8, 32768), (32, 512), (32, 2048),
        (32, 8192),
    )  # fmt: skip
    decode_few: tuple[int, ...] = (256, 1024, 4096, 8192, 32768)
    decode_head_dims: tuple[int, ...] = (64, 128)
    step_batches: tuple[int, ...] = (1, 8)
    step_blocks: tuple[int, ...] = (128, 512, 2048)
    step_keys: tuple[int, ...] = (512, 2048, 8192)
    steps_held_out: tuple[tuple[int, int, int], ...] = ((1, 1024, 4096), (4, 768, 1024), (8, 1024, 2048))
    gemm_tokens: tuple[int, ...] = (1, 4, 8, 16, 32, 128, 512, 2048, 8192, 32768)
    gemm_widths: tuple[tuple[int, int], ...] = LAYER_WIDTHS
    skinny_rows: tuple[int, ...] = (1, 8, 16)
    skinny: tuple[tuple[int, int, SkinnyUse], ...] = SKINNY
    pointwise_tokens: tuple[int, ...] = (1, 8, 32, 1024, 8192, 65536)
    estimator_tokens: tuple[int, ...] = (4096, 16384, 65536)
    layer_batches: tuple[int, ...] = (1, 4, 8, 16, 32)
    layer_tokens: tuple[int, ...] = (4096, 8192, 16384, 65536)
    peak_side: int = 8192
    longest_tokens: int = 1 << 20
    time_share: float = 0.5

    @property
    def probe_widths(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of the probes' linear layers that are not measured anyway."""
        if not self.layer_batches:
            return ()
        found = [width for shape in (PROBE, EVICTING) for width in linear_widths(shape)]
        return tuple(width for width in dict.fromkeys(found) if width not in self.gemm_widths)

    @property
    def fused_batches(self) -> tuple[int, ...]:
        """Batches of whole fused layers."""
        return tuple(batch for batch in self.layer_batches if batch in self.skinny_rows)

    @property
    def count(self) -> int:
        """Rows to expect, for a progress bar; a few large cases may be left out."""
        tiles = sum(case.length <= self.longest_tokens for kind in self.tile_kinds for case in tile_cases(*kind))
        decode = (len(self.dense_tokens) + len(self.decode) + len(self.decode_few)) * len(self.decode_head_dims)
        gemm = len(self.gemm_tokens) * len(self.gemm_widths)
        skinny = len(self.skinny_rows) * len(self.skinny)
        layers = (3 + len(self.probe_widths)) * len(self.layer_batches) + len(self.layer_tokens)
        fused = 4 * len(self.fused_batches)
        read = len(self.step_keys) * len(self.decode_head_dims)
        steps = len(self.step_batches) * (len(self.step_blocks) * len(step_rules()) + read + 1)
        steps += len(self.steps_held_out)
        return (
            4
            + tiles
            + decode
            + gemm
            + skinny
            + layers
            + fused
            + 5 * len(self.pointwise_tokens)
            + len(self.estimator_tokens) * (1 + len(estimators()))
            + len(self.estimator_tokens[:2]) * len(HAVE_KERNELS)
            + steps
        )


FULL = RunPlan()
QUICK = RunPlan(
    tile_kinds=((128, 128),),
    dense_tokens=(1024, 16384),
    decode=((1, 4096), (8, 32768)),
    decode_few=(),
    decode_head_dims=(128,),
    step_blocks=(128, 1024),
    step_keys=(512, 2048),
    gemm_tokens=(1, 512, 8192),
    gemm_widths=((4096, 4096), (14336, 4096)),
    pointwise_tokens=(1, 1024, 8192),
    estimator_tokens=(4096, 16384),
    skinny=((6144, 4096, "normed"), (26624, 4096, "gated")),
    layer_batches=(1, 8),
    layer_tokens=(4096, 16384),
    longest_tokens=16384,
    time_share=0.4,
)
