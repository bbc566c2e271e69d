"""What scoring one layer on one sequence needs, and what it finds."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LATE_SHARE = 0.125
"""Of a sequence's queries, the share that stands for decoded ones: their context is nearly the whole prompt."""


@dataclass(frozen=True)
class LayerInput:
    """One layer's tensors for one sequence; keys and values repeated to the query heads.

    Attributes:
        probes: gradients of R scalar losses; each error's product with them is kept signed.
        answer: gradient of the answer log-odds.
        answer_ce: gradient of the answer cross-entropy.
        projection_gram: W_oᵀ W_o of each head's slice of the output projection; errors are measured behind it.
        generated: queries that count as decoding for the answer: those that hold an answer token; None for the late ones.
    """

    q: Float[Tensor, "H S D"]
    k: Float[Tensor, "H S D"]
    v: Float[Tensor, "H S D"]
    probes: Float[Tensor, "R H S D"]
    answer: Float[Tensor, "H S D"]
    answer_ce: Float[Tensor, "H S D"]
    projection_gram: Float[Tensor, "H D D"]
    sliding_window: int | None
    num_kv_heads: int
    generated: Bool[Tensor, " S"] | None = None


@dataclass
class LayerScores:
    """Sums over one sequence, per head (H) or KV group (G) and candidate (C).

    Attributes:
        fisher: Σ_n g_n·δ_n per probe; signed, so that heads of a group, or of a plan, can be added before squaring.
        answer: Σ_n (g_n·δ_n)² of the log-odds gradient.
        answer_group: the same with the heads of a KV group added inside the square.
        output_error: Σ_n |W_o δ_n|².
        output_norm: Σ_n |W_o o_n|², the scale of the above.
        kept_mass: attention mass inside the chosen tiles, averaged over queries.
        tiles: computed tiles.
        mass: attention mass per tile.
        influence: MoA's first-order influence per tile, of the answer cross-entropy.
        late_fisher: `fisher` of the late queries alone, the last LATE_SHARE of the sequence, as decoding has them.
        decode_answer: `answer` of the generated queries alone, as decoding has them.
        decode_answer_group: likewise of `answer_group`.
        prompt_fisher: the part of `fisher` from the queries before the late ones.
        prompt_answer: the part of `answer` from the queries that are not generated.
        prompt_answer_group: likewise of `answer_group`.
        late_error: `output_error` of the late queries alone, as decoding has them.
        late_norm: the part of `output_norm` from the late queries.

    As decoding has them: where a rule chooses anew for every decoded token, with what it would choose for each of these queries
    (`step_outputs`); elsewhere with the tiles of their rows. Everything else is of those tiles alone.
    """

    fisher: Float[Tensor, "R H C"]
    answer: Float[Tensor, "H C"]
    answer_group: Float[Tensor, "G C"]
    output_error: Float[Tensor, "H C"]
    output_norm: Float[Tensor, " H"]
    kept_mass: Float[Tensor, "H C"]
    tiles: Float[Tensor, "H C"]
    mass: Float[Tensor, "H N N"]
    influence: Float[Tensor, "H N N"]
    late_fisher: Float[Tensor, "R H C"]
    decode_answer: Float[Tensor, "H C"]
    decode_answer_group: Float[Tensor, "G C"]
    prompt_fisher: Float[Tensor, "R H C"]
    prompt_answer: Float[Tensor, "H C"]
    prompt_answer_group: Float[Tensor, "G C"]
    late_error: Float[Tensor, "H C"]
    late_norm: Float[Tensor, " H"]

    @classmethod
    def zeros(cls, layer: LayerInput, num_candidates: int, num_blocks: int) -> Self:
        """Before anything is added."""
        (num_probes, heads), groups = layer.probes.shape[:2], layer.num_kv_heads
        sizes = {"R": (num_probes, heads, num_candidates), "H": (heads, num_candidates), "G": (groups, num_candidates)}
        special = {"output_norm": (heads,), "late_norm": (heads,)} | dict.fromkeys(
            ("mass", "influence"), (heads, num_blocks, num_blocks)
        )

        def size(name: str) -> tuple[int, ...]:
            kind = "R" if name.endswith("fisher") else "G" if name.endswith("_group") else "H"
            return special.get(name, sizes[kind])

        return cls(**{field.name: torch.zeros(size(field.name), device=layer.q.device) for field in fields(cls)})


def late_from(length: int) -> int:
    """The first late query of a sequence."""
    return length - max(1, round(LATE_SHARE * length))


def add_products(
    scores: LayerScores,
    products: Float[Tensor, "H C K T"],
    decoded: Float[Tensor, "H C K T"],
    layer: LayerInput,
    span: slice,
) -> None:
    """Add the products of one strip's errors with the probes and, last, with the answer's gradient: by rows of tiles, and as decoding has them."""
    late = max(0, late_from(layer.v.shape[1]) - span.start)
    probes = products[:, :, :-1]
    prompt, rows = (part.sum(-1).permute(2, 0, 1) for part in (probes[..., :late], probes[..., late:]))
    scores.fisher += prompt + rows
    scores.prompt_fisher += prompt
    as_rows = decoded is products
    scores.late_fisher += rows if as_rows else decoded[:, :, :-1, late:].sum(-1).permute(2, 0, 1)
    position = torch.arange(span.start, span.stop, device=products.device)
    generated = position - span.start >= late if layer.generated is None else layer.generated[span]
    generated = generated.to(products.dtype)
    answer, group = _squares(products[:, :, -1], layer.num_kv_heads)
    scores.answer += answer.sum(-1)
    scores.answer_group += group.sum(-1)
    scores.prompt_answer += answer @ (1 - generated)
    scores.prompt_answer_group += group @ (1 - generated)
    if not as_rows:
        answer, group = _squares(decoded[:, :, -1], layer.num_kv_heads)
    scores.decode_answer += answer @ generated
    scores.decode_answer_group += group @ generated


def _squares(products: Float[Tensor, "H C T"], groups: int) -> tuple[Float[Tensor, "H C T"], Float[Tensor, "G C T"]]:
    """Per head, and with the heads of a KV group added before squaring."""
    return products.square(), products.unflatten(0, (groups, -1)).sum(1).square()


def add_errors(
    scores: LayerScores,
    delta: Float[Tensor, "H C T D"],
    decoded: Float[Tensor, "H C T D"],
    stepping: Sequence[int],
    dense: Float[Tensor, "H T D"],
    layer: LayerInput,
    span: slice,
) -> None:
    """Add the energies of one strip's errors and outputs behind the projection; `decoded` differs from `delta` in columns `stepping` alone."""
    late = max(0, late_from(layer.v.shape[1]) - span.start)
    energy = _energy(delta, layer)
    scores.output_error += energy.sum(-1)
    of_late = energy[..., late:].sum(-1)
    if stepping and late < delta.shape[2]:
        of_late[:, stepping] = _energy(decoded[:, stepping, late:], layer).sum(-1)
    scores.late_error += of_late
    norm = _energy(dense[:, None], layer)[:, 0]
    scores.output_norm += norm.sum(-1)
    scores.late_norm += norm[:, late:].sum(-1)


def _energy(x: Float[Tensor, "H C T D"], layer: LayerInput) -> Float[Tensor, "H C T"]:
    """Squared norms behind the projection."""
    flat = x.flatten(1, 2)
    behind = flat @ layer.projection_gram
    energy: Tensor = behind.mul_(flat).sum(-1).unflatten(1, x.shape[1:3])
    return energy
