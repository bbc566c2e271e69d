"""The menu of a sublayer: which heads or channels go at each size, and what each criterion says that costs.

| criterion | score of an input (head or channel), to be summed over what goes |
|---|---|
| reconstruction | ½ tr(F E): output error after least-squares compensation, weighted by the output's Fisher information; nats (or 1 − cosine) |
| fisher | ½ E[(Σ_n x·Wᵀg)²]: Fisher information of taking the inputs away, without compensation; same unit |
| taylor | (Σ_n x·Wᵀg)² of the model's own loss: first order, squared |
| activation_magnitude | ‖W_:c‖² E[x_c²] |
| magnitude | ‖W_:c‖² |
| vtrans | ½ log(1 + μ²/σ²) of the input: the KL of a variational mask with a log-uniform prior; small means mostly noise |
| ofb | importance ⊗ sparsity: rank of the Fisher score times rank of the norm of the input's own weights |
| sparse_then_prune | ‖W_in‖₁ + ‖W_out‖₁ of the input: what an L1 penalty would shrink first |
| learned | logistic of the gate that `gates.py` optimised; only where it was asked for |

Sources: taylor: Molchanov et al. 2019, arXiv:1906.10771, equation 8. fisher: Liu et al. 2021, Group Fisher Pruning, arXiv:2108.00708, section
3.2, with the model's own labels. activation_magnitude: Sun et al. 2023, Wanda, arXiv:2306.11695, summed over a column.

Three criteria stand for methods that train. What is theirs, and what is our training-free reading:
- vtrans (Dutta et al., VTrans). Theirs: a mean μ and a variance σ² are learned per unit (embedding, head, layer) under an information
  bottleneck, units of low μ²/σ² go, the model is tuned. Ours: μ and σ² are moments of the unit's input over calibration tokens, so nothing
  is learned and the task does not enter; embeddings are not pruned.
- ofb (Once for Both). Theirs: a score of importance and a differentiable score of sparsity per channel make one mask that is searched in a
  single training stage, with a one-hot loss and masked image modelling. Ours: ranks of two fixed scores, multiplied; no stage is trained.
- sparse_then_prune. Theirs: a vision transformer is trained with an L1 penalty, pruned by magnitude, tuned for 20 epochs. Ours: the L1 norm
  of the weights as they are, of whole heads and channels.
None of the three papers' results carries over. Masks that are learned, on frozen weights, are `gates.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.pruning.moments import SublayerStatistics
from sparsesearch.pruning.reconstruction import Elimination
from sparsesearch.runtime.sublayers import Layer

Criterion = Literal[
    "reconstruction",
    "fisher",
    "taylor",
    "activation_magnitude",
    "magnitude",
    "vtrans",
    "ofb",
    "sparse_then_prune",
    "learned",
]
CRITERIA: tuple[Criterion, ...] = tuple(name for name in get_args(Criterion) if name != "learned")
"""Those that every profile holds."""
_STEPS_PER_LEVEL = 8
"""Channels of one level leave in this many steps, each scored after the ones before."""


@dataclass(frozen=True)
class Option:
    """One size of a sublayer: what goes, and what is left.

    Attributes:
        removed: heads or channels, ascending.
        loss: what the criterion says.
    """

    removed: tuple[int, ...]
    loss: float


@dataclass(frozen=True)
class Scoring:
    """How inputs of a layer's output projections are scored.

    Attributes:
        layer: whose.
        statistics: of the projection in question.
        criterion: see the module's table.
        bias: whether a mean that is taken away may go into a bias.
        gates: learned log-odds per head or channel, for `learned`.
    """

    layer: Layer
    statistics: SublayerStatistics
    criterion: Criterion
    bias: bool = True
    gates: Float[Tensor, " U"] | None = None


def channel_options(scoring: Scoring, *, multiple: int) -> list[Option]:
    """Widths from whole to nothing, in steps that leave a multiple of `multiple` channels."""
    count = scoring.layer.num_channels
    widths = [*range((count - 1) // multiple * multiple, 0, -multiple), 0]
    counts = [count - width for width in widths]
    scorer = _scorer(scoring, "feed_forward")
    if isinstance(scorer, _Additive):
        values, columns = scorer.scores.sort(stable=True)  # what going step by step would find
        return _nested(columns, values.cumsum(0)[[number - 1 for number in counts]], counts)
    losses, order, now = [], [], count
    for width in widths:
        step = max(1, (now - width) // _STEPS_PER_LEVEL)
        while now > width:
            size = min(step, now - width)
            order.append(torch.topk(scorer.single_losses(), size, largest=False).indices)
            scorer.remove(order[-1])
            now -= size
        losses.append(scorer.loss)
    return _nested(torch.cat(order), torch.stack(losses), counts)


def _nested(order: Int[Tensor, " I"], losses: Float[Tensor, " C"], counts: Sequence[int]) -> list[Option]:
    """Options that take inputs away in an order, after the one that takes nothing."""
    places = order.tolist()
    taken = zip(counts, losses.tolist(), strict=True)
    return [Option((), 0.0), *(Option(tuple(sorted(places[:count])), loss) for count, loss in taken)]


def head_options(scoring: Scoring, *, thin: bool) -> list[Option]:
    """Every number of KV groups with, if `thin`, every number of query heads in each of them; greedy, nested in the groups."""
    layer = scoring.layer
    groups, size = layer.num_kv_heads, layer.num_heads // max(layer.num_kv_heads, 1)
    untouched = _scorer(scoring, "attention")
    removed, losses = [], []
    for per_group in range(size, 0, -1) if thin else (size,):
        scorer = deepcopy(untouched)
        for group in range(groups):
            for _ in range(size - per_group):
                scorer.remove_cheapest([(head,) for head in _left(scorer, group, size)])
        for left in range(groups, 0, -1):
            removed.append(tuple(sorted(scorer.gone_heads)))
            losses.append(scorer.loss)
            if left > 1:
                sets = (_left(scorer, group, size) for group in range(groups))
                scorer.remove_cheapest([heads for heads in sets if heads])
    untouched.remove_heads(tuple(range(layer.num_heads)))
    removed.append(tuple(sorted(untouched.gone_heads)))
    losses.append(untouched.loss)
    return [Option(gone, loss) for gone, loss in zip(removed, torch.stack(losses).tolist(), strict=True)]


def _left(scorer: "_Scorer", group: int, size: int) -> tuple[int, ...]:
    """Query heads of a KV group that are still there."""
    return tuple(head for head in range(group * size, (group + 1) * size) if head not in scorer.gone_heads)


class _Scorer(ABC):
    """Removes inputs of one output projection under one criterion. Heads are runs of `head_dim` inputs.

    What needs the covariance stays where the model is; sums of scores are small and made on the host, where a step costs less than a launch.
    """

    def __init__(self, head_dim: int, like: Float[Tensor, " I"]) -> None:
        self.head_dim, self.loss = head_dim, like.new_zeros(())
        self.left = torch.ones_like(like, dtype=torch.bool)
        self.gone_heads: set[int] = set()

    @abstractmethod
    def single_losses(self) -> Float[Tensor, " I"]:
        """Loss of removing each input alone."""

    @abstractmethod
    def set_losses(self, sets: Int[Tensor, "C K"]) -> Float[Tensor, " C"]:
        """Loss of removing each set of inputs together."""

    @abstractmethod
    def remove(self, columns: Int[Tensor, " K"]) -> None:
        """Take these inputs away."""

    def remove_cheapest(self, sets: Sequence[tuple[int, ...]]) -> None:
        """Take away the set of heads that adds the least; all sets are of one size."""
        losses = self.set_losses(torch.stack([self.columns(heads) for heads in sets]).to(self.left.device))
        self.remove_heads(sets[int(losses.argmin())])

    def remove_heads(self, heads: tuple[int, ...]) -> None:
        self.remove(self.columns(heads).to(self.left.device))
        self.gone_heads |= set(heads)

    def columns(self, heads: Sequence[int]) -> Int[Tensor, " K"]:
        return (torch.tensor(heads)[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()


class _Reconstruction(_Scorer):
    def __init__(self, head_dim: int, state: Elimination) -> None:
        super().__init__(head_dim, state.inverse_diagonal)
        self.state = state

    def single_losses(self) -> Float[Tensor, " I"]:
        return self.state.single_losses()

    def set_losses(self, sets: Int[Tensor, "C K"]) -> Float[Tensor, " C"]:
        return self.state.set_losses(sets)

    def remove(self, columns: Int[Tensor, " K"]) -> None:
        self.state.remove(columns)
        self.loss = self.state.loss


class _Signed(_Scorer):
    """½ mean (Σ_c s_rc)²: effects of what goes are added before they are squared."""

    def __init__(self, head_dim: int, effects: Float[Tensor, "P I"], scale: float) -> None:
        self.effects, self.scale = effects.cpu(), scale
        super().__init__(head_dim, self.effects[0])
        self.alone = self.effects.square().mean(0)
        self.gone = torch.zeros_like(self.effects[:, 0])

    def single_losses(self) -> Float[Tensor, " I"]:
        grown = self.alone + 2 * (self.gone @ self.effects) / len(self.effects)
        return torch.where(self.left, self.scale * grown, torch.inf)

    def set_losses(self, sets: Int[Tensor, "C K"]) -> Float[Tensor, " C"]:
        added = self.effects[:, sets].sum(-1)
        return self.scale * ((self.gone[:, None] + added).square().mean(0) - self.gone.square().mean())

    def remove(self, columns: Int[Tensor, " K"]) -> None:
        self.gone = self.gone + self.effects[:, columns].sum(1)
        self.loss = self.scale * self.gone.square().mean()
        self.left.index_fill_(0, columns, False)


class _Additive(_Scorer):
    def __init__(self, head_dim: int, scores: Float[Tensor, " I"]) -> None:
        self.scores = scores.cpu()
        super().__init__(head_dim, self.scores)

    def single_losses(self) -> Float[Tensor, " I"]:
        return torch.where(self.left, self.scores, torch.inf)

    def set_losses(self, sets: Int[Tensor, "C K"]) -> Float[Tensor, " C"]:
        return self.scores[sets].sum(-1)

    def remove(self, columns: Int[Tensor, " K"]) -> None:
        self.loss = self.loss + self.scores[columns].sum()
        self.left.index_fill_(0, columns, False)


def _scorer(scoring: Scoring, kind: str) -> _Scorer:
    layer, statistics = scoring.layer, scoring.statistics
    layout = dict(layer.sublayers)[kind]
    weight = layer.projection(layout.out).weight.detach().double()
    size = layer.head_dim if kind == "attention" else 1
    norm = weight.square().sum(0)
    moment = statistics.second_moment.diagonal()
    match scoring.criterion:
        case "reconstruction":
            covariance = statistics.second_moment
            if scoring.bias:
                covariance = covariance - torch.outer(statistics.mean, statistics.mean)
            return _Reconstruction(size, Elimination.start(weight, covariance, statistics.sensitivity))
        case "fisher":
            samples = len(statistics.taylor)
            return _Signed(size, statistics.fisher, 0.5 * samples / statistics.items)
        case "taylor":
            return _Signed(size, statistics.taylor, 1.0 / statistics.items**2)
        case "activation_magnitude":
            return _Additive(size, norm * moment)
        case "magnitude":
            return _Additive(size, norm)
        case "vtrans":
            variance = (moment - statistics.mean.square()).clamp(min=1e-12)
            return _Additive(size, 0.5 * torch.log1p(moment / variance))
        case "ofb":
            importance = statistics.fisher.square().mean(0)
            return _Additive(size, _rank(importance) * _rank(_own_norm(layer, kind, norm)))
        case "learned":
            assert scoring.gates is not None
            return _Additive(size, torch.sigmoid(scoring.gates.to(norm)).repeat_interleave(size) / size)
        case "sparse_then_prune":
            return _Additive(size, _own_norm(layer, kind, weight.abs().sum(0), power=1))


def _own_norm(layer: Layer, kind: str, outgoing: Float[Tensor, " I"], *, power: int = 2) -> Float[Tensor, " I"]:
    """Norm of an input's outgoing column plus that of the weights that make it."""
    layout = dict(layer.sublayers)[kind]
    total = outgoing.clone()
    into = layout.into if kind == "feed_forward" else layout.into[2:]  # a head's own content comes through its values
    for name in into:
        rows = layer.projection(name).weight.detach().double().abs().pow(power).sum(1)
        if len(rows) != len(total):
            repeats = len(total) // len(rows)
            rows = rows.unflatten(0, (-1, layer.head_dim)).repeat_interleave(repeats, 0).flatten()
        total += rows
    return total


def _rank(values: Float[Tensor, " I"]) -> Float[Tensor, " I"]:
    """Share of inputs with a smaller value, (0, 1]."""
    return (values.argsort().argsort().double() + 1) / len(values)
