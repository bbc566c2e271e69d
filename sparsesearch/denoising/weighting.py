"""How much an error in each range of steps, layer and head counts: measured sensitivities, believed more or less."""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace

from jaxtyping import Float
from torch import Tensor

from sparsesearch.profiling.denoising.record import DenoisingProfile


@dataclass(frozen=True)
class Weighting:
    """Powers of the three parts of the measured sensitivities: 0 ignores a part, 1 believes it.

    The logarithm of a sensitivity is a mean, what its range of steps adds, what its layer adds, and a rest: of the layer in this range, and of
    the head where heads were perturbed apart. A search that
    believes all of it follows the noise of single replays; one that believes nothing spends the budget where it does not matter.

    Attributes:
        range: power of the part of the range of steps.
        layer: power of the layer's part.
        rest: power of what is left.
    """

    range: float
    layer: float
    rest: float

    def of(self, profile: DenoisingProfile) -> Float[Tensor, "R L H"]:
        """The weight of every head's error."""
        logs = profile.sensitivity.clamp_min(1e-12).log()
        mean = logs.mean()
        by_range = logs.mean((1, 2), keepdim=True) - mean
        by_layer = logs.mean((0, 2), keepdim=True) - mean
        rest = logs - mean - by_range - by_layer
        return (mean + self.range * by_range + self.layer * by_layer + self.rest * rest).exp()

    def __str__(self) -> str:
        return f"range^{self.range:g} layer^{self.layer:g} rest^{self.rest:g}"

    def neighbours(self, step: float) -> Iterator["Weighting"]:
        """One power more and one less, in turn."""
        for name, value in zip(("range", "layer", "rest"), astuple(self), strict=True):
            for moved in (value + step, value - step):
                if 0 <= moved <= 1.5:
                    yield replace(self, **{name: moved})


STARTS = tuple(
    Weighting(*powers) for powers in ((0, 0, 0), (1, 1, 0), (1, 1, 1), (1, 1, 0.5), (0.5, 0.5, 0.5), (0, 0.5, 0.5))
)
"""Tried in any case, from equal errors to the sensitivities as they were measured."""


def descend(
    value: Callable[[Weighting], float], start: Weighting, *, evaluations: int, steps: tuple[float, ...] = (0.5, 0.25)
) -> Iterator[Weighting]:
    """Weightings to try after `start`, each chosen by what the tries before it were worth: the first better neighbour is the next centre.

    Args:
        value: of a weighting; less is better. Asked once for each one that is yielded, and for the start.
        start: the best so far.
        evaluations: how many to yield at most.
        steps: sizes of a move, each tried until it finds nothing.
    """
    known, centre = {start: value(start)}, start
    for step in steps:
        moving = True
        while moving:
            moving = False
            for option in centre.neighbours(step):
                if option in known:
                    continue
                if evaluations == 0:
                    return
                evaluations -= 1
                yield option
                known[option] = value(option)
                if known[option] < known[centre]:
                    centre, moving = option, True
                    break
