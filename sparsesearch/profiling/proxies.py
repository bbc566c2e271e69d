"""Accuracy proxies: what a plan is predicted to lose, unit by unit, from one profile.

| proxy | per unit and candidate | unit of measure |
|---|---|---|
| text | ½ E[(Σ_n g_n·δ_n)²] / S, Fisher probes, steadied by output_error (`moderation`) | predicted KL to dense, nats per token |
| answer | Σ_n (g_n·δ_n)² of the answer log-odds / answers | squared log-odds per answer token |
| output_error | Σ_n ‖W_o δ_n‖² / Σ_n ‖W_o o_n‖² of the layer | share of the layer's output energy |
| dropped_mass | 1 - attention mass inside the chosen tiles | share of attention |
| moa | Σ |Ē| over the tiles a static candidate drops, Ē the mean first-order influence | nats |

δ = sparse minus dense attention output of the unit's heads, g the gradient of the loss with respect to it. Text and answer see different
things (rank agreement with the truth is printed by `sparsesearch validate-proxy`), so the default objective is their sum, each divided by
its value when every unit takes the reference window.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError, nearest
from sparsesearch.profiling.layer_scores import late_from
from sparsesearch.profiling.moderation import moderated
from sparsesearch.profiling.published import PUBLISHED, allowed
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.step_outputs import chooses_steps
from sparsesearch.shapes import Granularity, Unit, units_of

PROXIES = ("text", "answer", "output_error", "dropped_mass", "moa")
OBJECTIVES = ("combined", *PROXIES, *PUBLISHED)
_REFERENCE_DENSITY = 0.25

NOTHING = 1e-9
"""Losses below it are rounding: of dense, and of rules that keep everything at the profiled lengths. The reference window's sum to 1."""


@dataclass(frozen=True)
class LengthTerms:
    """Every proxy at one length, averaged over samples, and the tiles each candidate computes."""

    proxies: dict[str, Float[ndarray, "U C"]]
    """Besides PROXIES, unless the profile is older than they are: `decode_text` and `decode_answer` of decoding alone, `prompt_answer` of the
    prompt alone, `served_text` and `served_answer` of both, where a rule that chooses anew for every decoded token does so."""
    tiles: Float[ndarray, "U C"]


def length_terms(
    profile: Profile, length: int, granularity: Granularity, *, sample_weights: tuple[float, ...] | None = None
) -> LengthTerms:
    """Read one length's proxies. Where no sample has an answer, the answer proxy is of the model's own predictions.

    `sample_weights` mixes the calibration sequences otherwise than equally; only their ratios count.
    """
    if sample_weights is None:
        key = "length_terms", length, granularity
        if key not in profile.derived:
            profile.derived[key] = _terms(profile, length, granularity, None)
        found: LengthTerms = profile.derived[key]
        return found
    return _terms(profile, length, granularity, sample_weights)


def _terms(
    profile: Profile, length: int, granularity: Granularity, sample_weights: tuple[float, ...] | None
) -> LengthTerms:
    scores = profile.scores(length)
    answers = np.array(profile.manifest.num_answers[str(length)])
    share = (
        np.ones(len(answers))
        if sample_weights is None
        else np.array(sample_weights) * (len(answers) / sum(sample_weights))
    )
    counted = (answers * share).sum()
    weight = share * (answers > 0) / counted if counted else share / (length * len(answers))
    if sample_weights is not None:
        scores = _weighed(scores, torch.from_numpy(share).float())
    layers = range(len(profile.manifest.base_model.modules))
    weighing = _Weighing(torch.from_numpy(weight).float(), float(share.sum() ** 2 / (share**2).sum()))
    parts = [_layer_terms(profile, scores, f"{layer:03d}.", length, weighing, granularity) for layer in layers]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    tiles = joined.pop("tiles")
    return LengthTerms(joined, tiles)


@dataclass(frozen=True)
class _Weighing:
    """How sequences count.

    Attributes:
        answer: of each in the answer proxies.
        num_samples: equally weighed ones that would say as much.
    """

    answer: Float[Tensor, " n"]
    num_samples: float


def _weighed(scores: dict[str, Tensor], share: Float[Tensor, " n"]) -> dict[str, Tensor]:
    """Scores whose plain mean over samples is the weighted one; Fisher products enter squared."""

    def of(name: str, x: Tensor) -> Tensor:
        weight = share.view(-1, *[1] * (x.dim() - 1))
        match name.rpartition(".")[2]:
            case "fisher" | "prompt_fisher" | "late_fisher":
                return x * weight.sqrt()
            case "kept_mass":  # read as 1 - mass
                return 1 - (1 - x) * weight
            case "tiles" | "output_error" | "late_error":
                return x * weight
        return x

    return {name: of(name, x) for name, x in scores.items()}


def _layer_terms(
    profile: Profile,
    scores: dict[str, Tensor],
    layer: str,
    length: int,
    weighing: _Weighing,
    granularity: Granularity,
) -> dict[str, Float[ndarray, "u C"]]:
    """One layer's proxies per unit."""
    heads = scores[layer + "tiles"].shape[1]
    groups = scores[layer + "answer_group"].shape[1] if granularity == "kv_group" else heads

    def per_unit(x: Tensor) -> Tensor:
        summed: Tensor = x.unflatten(-2, (groups, heads // groups)).sum(-2)
        return summed

    suffix = "_group" if granularity == "kv_group" else ""
    layer_norm = scores[layer + "output_norm"].sum(-1)[:, None, None]
    error = (per_unit(scores[layer + "output_error"]) / layer_norm).mean(0)

    def predicted_kl(
        fisher: Float[Tensor, "n K H C"], tokens: int, error: Float[Tensor, "u C"]
    ) -> Float[Tensor, "u C"]:
        squares = per_unit(fisher).square().mean((0, 1)) / (2 * tokens)
        degrees = weighing.num_samples * fisher.shape[1]
        return torch.from_numpy(moderated(squares.double().numpy(), error.double().numpy(), degrees))

    def answered(name: str) -> Float[Tensor, "u C"]:
        return torch.einsum("nuc,n->uc", scores[layer + name + suffix], weighing.answer)

    terms = {
        "text": predicted_kl(scores[layer + "fisher"], length, error),
        "answer": answered("answer"),
        "output_error": error,
        "dropped_mass": per_unit(1 - scores[layer + "kept_mass"]).mean(0).clamp(min=0),
        "moa": per_unit(_moa(profile, scores[layer + "influence"], length)),
        "tiles": per_unit(scores[layer + "tiles"]).mean(0),
    }
    if layer + "late_fisher" in scores:
        late, late_error = length - late_from(length), error
        if layer + "late_error" in scores:
            late_norm = scores[layer + "late_norm"].sum(-1)[:, None, None]
            late_error = (per_unit(scores[layer + "late_error"]) / late_norm).mean(0)
        terms |= {
            "decode_text": predicted_kl(scores[layer + "late_fisher"], late, late_error),
            "decode_answer": answered("decode_answer"),
        }
    if layer + "prompt_fisher" in scores:
        both = scores[layer + "prompt_fisher"] + scores[layer + "late_fisher"]
        added = (per_unit(scores[layer + "late_error"]) / layer_norm).mean(0)
        terms |= {
            "prompt_answer": answered("prompt_answer"),
            "served_text": predicted_kl(both, length, (1 - late / length) * error + added),
            "served_answer": answered("prompt_answer") + answered("decode_answer"),
        }
    return {name: term.double().numpy() for name, term in terms.items()}


def _moa(profile: Profile, influence: Float[Tensor, "H N N"], length: int) -> Float[Tensor, "H C"]:
    """MoA's loss of every static candidate; infinite for candidates its method does not have."""
    grid = BlockGrid(length, length, profile.manifest.block_tokens)
    columns = []
    for rule in profile.manifest.candidates:
        if rule.dynamic or rule.needs_calibration or rule.rest != "drop":
            columns.append(torch.full(influence.shape[:1], torch.inf))
        else:
            columns.append((influence.abs() * ~rule.select(grid)).sum((1, 2)))
    return torch.stack(columns, 1)


def reference_candidate(profile: Profile) -> int:
    """The candidate at which proxies are normalised: the window whose uniform density is nearest a quarter, at the longest length.

    Raises:
        SpecError: the space has nothing but dense.
    """
    length = max(profile.manifest.lengths)
    tiles = length_terms(profile, length, "query_head").tiles.sum(0)
    density = tiles / tiles[0]
    rules = profile.manifest.candidates
    eligible = [i for i, rule in enumerate(rules) if rule.kind == "sink_window" and density[i] < 1]
    eligible = eligible or [i for i in range(len(rules)) if 0 < density[i] < 1]
    if not eligible:
        raise SpecError(
            f"some candidate must skip something at {length} tokens, but every one computes all tiles there. Profile longer sequences, or a space "
            "with sparser rules."
        )
    return min(eligible, key=lambda i: abs(density[i] - _REFERENCE_DENSITY))


def objective_loss(
    profile: Profile,
    objective: str,
    granularity: Granularity,
    *,
    answer_weight: float,
    sample_weights: tuple[float, ...] | None = None,
    generates: bool = False,
) -> Float[ndarray, "U C"]:
    """Loss of every candidate in every unit, summed over the profiled lengths.

    A rule acts on all of a sequence alike; but where tokens are generated, one that chooses anew for every decoded token does so for the late
    queries, and may not be taken (infinite) if the profile or the objective says nothing of that.

    Args:
        profile: what was measured.
        objective: a proxy by name; `combined`: text + answer_weight x answer, both normalised; or a published method's own, where rules it
            does not have are infinite.
        granularity: what a unit is.
        answer_weight: see `combined`.
        sample_weights: see `length_terms`.
        generates: whether tokens are decoded under the rules.

    Raises:
        SpecError: unknown objective, or one of a method that decides on other units or has none of the candidates.
    """
    weights = _weights(objective, answer_weight)
    reference, stepping = reference_candidate(profile), chooses_in_steps(profile)
    loss: Float[ndarray, "U C"] = np.zeros((1, 1))
    for length in profile.manifest.lengths:
        terms = length_terms(profile, length, granularity, sample_weights=sample_weights).proxies
        for name, weight in weights.items():
            own = terms[name]
            if generates:
                own = np.where(stepping, terms.get(f"served_{name}", np.inf), own)
            loss = loss + weight * own / max(float(terms[name][:, reference].sum()), 1e-30)
    loss[:, 0] = 0.0  # dense differs from itself by rounding only
    loss[np.abs(loss) < NOTHING] = 0.0
    if objective in PUBLISHED:
        loss = np.where(allowed(objective, profile.manifest.candidates, granularity), loss, np.inf)
    return loss


def phase_losses(
    profile: Profile, objective: str, granularity: Granularity, *, answer_weight: float
) -> tuple[Float[ndarray, "U C"], Float[ndarray, "G C"]]:
    """Losses of a rule in prefill, per unit, and in decoding, per KV group; a pair of rules is taken to lose their sum.

    A rule that chooses anew for every decoded token is judged by what it would choose for the late queries and those that hold answer tokens;
    an older profile does not know that, and its decoding losses are infinite.

    text: the predicted KL per token of the whole sequence, and per token of its late queries (`layer_scores.LATE_SHARE`) for decoding, so
    that a token of either phase counts the same whatever the workload. answer: the squared log-odds that errors at the queries before the
    answers cause, and those at the queries that hold answer tokens; these two add up to the loss of one rule in both phases exactly. What
    is left out is the product of the phases' errors inside the square of `text`, as products between units are left out anyway.

    Raises:
        SpecError: the objective has no such split, or the profile was made before decoding was recorded.
    """
    weights = _weights(objective, answer_weight)
    if not set(weights) <= {"text", "answer"}:
        raise SpecError(
            f"separate decode rules must be chosen by combined, text or answer, but the objective is {objective}."
        )
    reference = reference_candidate(profile)
    prefill: Float[ndarray, "U C"] = np.zeros((1, 1))
    decode: Float[ndarray, "G C"] = np.zeros((1, 1))
    for length in profile.manifest.lengths:
        terms = length_terms(profile, length, granularity).proxies
        groups = length_terms(profile, length, "kv_group").proxies
        if "decode_text" not in terms:
            raise SpecError("separate decode rules need a profile that records decoding. Profile again.")
        for name, weight in weights.items():
            scale = weight / max(float(terms[name][:, reference].sum()), 1e-30)
            before = terms.get("prompt_answer", terms["answer"] - terms["decode_answer"])
            prefill = prefill + scale * np.maximum(before if name == "answer" else terms[name], 0.0)
            decode = decode + scale * groups[f"decode_{name}"]
        if "prompt_answer" not in terms:
            decode = np.where(chooses_in_steps(profile), np.inf, decode)
    for loss in (prefill, decode):
        loss[:, 0] = 0.0
        loss[np.abs(loss) < NOTHING] = 0.0
    return prefill, decode


def chooses_in_steps(profile: Profile) -> Bool[ndarray, " C"]:
    """Which candidates choose anew for every decoded token."""
    grid = BlockGrid(1, 1, profile.manifest.block_tokens)
    return np.array([chooses_steps(rule, grid) for rule in profile.manifest.candidates])


def _weights(objective: str, answer_weight: float) -> dict[str, float]:
    if objective in ("hylra", "rals"):
        raise SpecError(
            f"objective {objective!r} decides which layers reuse another's selection, which a search over rules does not. "
            f"Run `sparsesearch search-reuse PROFILE --objective {objective}`."
        )
    if objective not in OBJECTIVES:
        raise SpecError(f"unknown objective {objective!r}.{nearest(objective, OBJECTIVES)}")
    proxy = PUBLISHED[objective].proxy if objective in PUBLISHED else objective
    return {"text": 1.0, "answer": answer_weight} if proxy == "combined" else {proxy: 1.0}


def profile_units(profile: Profile, granularity: Granularity) -> tuple[Unit, ...]:
    """The units of the profiled model."""
    return units_of(profile.manifest.base_model.geometry, granularity)
