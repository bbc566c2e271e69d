"""Templates of a search space as rules of single heads: calibrated on all sequences for the plan, on the others for a sequence's scores.

A bitmap that is scored on the sequences it was made from looks better than it is: on SmolLM2 at 4096 tokens (18 sequences, 8 x 4096 on an H200) such
scores led the search to bitmaps in 59 of 270 heads, and to a KL of 0.046 at 0.4 of dense's time, where windows alone reach 0.040.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sparsesearch.profiling.layer_inputs import Calibrated
from sparsesearch.rules import Rule

FOLDS = 2


@dataclass(frozen=True)
class FittedTemplates:
    """Every head's rules.

    Attributes:
        rules: calibrated on all sequences; what a plan takes.
        unseen: per fold, calibrated on the sequences of the other folds; empty where one sequence is all there is.
    """

    rules: Calibrated
    unseen: tuple[Calibrated, ...] = ()

    def for_scoring(self, index: int) -> Calibrated:
        """The rules that have not seen a sequence."""
        return self.unseen[index % FOLDS] if self.unseen else self.rules

    @classmethod
    def fit(
        cls,
        templates: Sequence[Rule],
        modules: Sequence[str],
        masses: Iterable[Sequence[Float[Tensor, "H N N"]]],
    ) -> "FittedTemplates":
        """Calibrate.

        Args:
            templates: rules that need it.
            modules: paths of the attention modules.
            masses: of every sequence in order, each layer's attention mass per tile.
        """
        totals: list[list[Tensor]] = [[] for _ in range(FOLDS)]
        counts = [0] * FOLDS
        for index, found in enumerate(masses):
            fold = index % FOLDS
            known = totals[fold]
            totals[fold] = [old + new for old, new in zip(known, found, strict=True)] if known else list(found)
            counts[fold] += 1

        def rules(folds: Sequence[int]) -> Calibrated:
            count = sum(counts[fold] for fold in folds)
            layers = [sum(own[1:], own[0]) / count for own in zip(*(totals[fold] for fold in folds), strict=True)]
            return {
                template.label: {
                    module: tuple(template.calibrated(head) for head in layers[layer])
                    for layer, module in enumerate(modules)
                }
                for template in templates
            }

        used = [fold for fold in range(FOLDS) if counts[fold]]
        if len(used) < FOLDS:
            return cls(rules(used))
        return cls(rules(used), tuple(rules([other for other in used if other != fold]) for fold in used))
