"""One entrance to every model that denoises over steps: diffusers transformers, and masked diffusion language models."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from sparsesearch.errors import SpecError, UnsupportedModelError, nearest
from sparsesearch.kernels.dispatch import BACKENDS
from sparsesearch.plan import Plan
from sparsesearch.runtime.masked_diffusion import AppliedMasked, MaskedDenoiser, masked_sites

_PROJECTIONS = ("o_proj", "out_proj", "dense", "Wo", "wo")


def apply_masked(denoiser: MaskedDenoiser, plan: Plan, *, backend: str = "auto") -> AppliedMasked:
    """Run a plan on a masked diffusion model, until the returned handle is removed or its `with` block ends.

    Raises:
        PlanMismatchError: it is not the plan's model. Nothing has been touched then.
        UnsupportedModelError: it is not bidirectional. Nothing has been touched then.
        SpecError: unknown backend, or a plan is already applied.
    """
    for known in BACKENDS:
        if backend == known:
            return AppliedMasked(denoiser, plan, known)  # type: ignore[arg-type]  # one of the literals
    raise SpecError(f"unknown backend {backend!r}.{nearest(backend, BACKENDS)}")


def apply_denoiser(model: Any, plan: Plan, *, scheduler: Any = None) -> Any:
    """Run a plan on a model of either kind, whatever its weights: a context manager with `probe`.

    Args:
        model: a diffusers transformer or a masked language model.
        plan: for that model.
        scheduler: of the pipeline that samples, where steps are counted by its timesteps.
    """
    if isinstance(model, MaskedDenoiser):
        return apply_masked(model, plan)
    from sparsesearch.runtime.diffusion.live import apply_to_transformer

    return apply_to_transformer(model, plan, allow_other_weights=True, scheduler=scheduler)


def projections_of(model: Any) -> dict[str, Float[Tensor, "O HD"]]:
    """What each module's attention output is multiplied with.

    Raises:
        UnsupportedModelError: no child of a module is recognised as its output projection.
    """
    if not isinstance(model, MaskedDenoiser):
        from sparsesearch.runtime.diffusion.live import output_weights

        return output_weights(model)
    found = {}
    for site in masked_sites(model):
        children = [getattr(site.module, name) for name in _PROJECTIONS if hasattr(site.module, name)]
        if not children:
            raise UnsupportedModelError(
                f"{site.path} must have an output projection named one of {', '.join(_PROJECTIONS)}, but has none. Open an issue with the model's name."
            )
        found[site.path] = children[0].weight.detach()
    return found
