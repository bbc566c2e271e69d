"""Putting a plan on a live diffusers transformer or pipeline, and taking it off again without a trace."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sparsesearch.errors import PlanMismatchError, SparseSearchError, SpecError, UnsupportedModelError, nearest
from sparsesearch.kernels.dispatch import BACKENDS, Backend
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.runtime.diffusion.attention import Probe, SparseLayer
from sparsesearch.runtime.diffusion.call import install, uninstall
from sparsesearch.runtime.diffusion.families import family_of
from sparsesearch.runtime.diffusion.specialise import specialise
from sparsesearch.runtime.fingerprint import parameters_sha256, require_weights
from sparsesearch.runtime.removable import Removable


@dataclass(frozen=True)
class TransformerSite:
    """One self-attention module of a transformer."""

    path: str
    module: Any
    num_heads: int
    head_dim: int


def transformer_sites(model: Any) -> tuple[TransformerSite, ...]:
    """The self-attention modules that a plan may change.

    Raises:
        UnsupportedModelError: the class is not known, or has none.
    """
    sites = []
    for blocks, attribute in family_of(model).blocks.items():
        for index, block in enumerate(getattr(model, blocks)):
            attention = getattr(block, attribute)
            heads = int(attention.heads)
            sites.append(
                TransformerSite(
                    f"{blocks}.{index}.{attribute}", attention, heads, attention.to_q.weight.shape[0] // heads
                )
            )
    if not sites:
        raise UnsupportedModelError(f"this {type(model).__name__} has no blocks, hence no attention to plan.")
    return tuple(sites)


def output_weights(model: Any) -> dict[str, Float[Tensor, "O HD"]]:
    """What each module's attention output is multiplied with: its own projection, or the attention's part of its block's joint one."""
    found = {}
    for site in transformer_sites(model):
        own = getattr(site.module, "to_out", None)
        block = model.get_submodule(site.path.rpartition(".")[0])
        weight = block.proj_out.weight if own is None else own[0].weight
        found[site.path] = weight.detach()[:, : site.num_heads * site.head_dim]
    return found


def describe_transformer(model: Any, name_or_path: str) -> BaseModelInfo:
    """Attention modules and a fingerprint of the weights."""
    sites = transformer_sites(model)
    return BaseModelInfo(
        name_or_path=name_or_path,
        model_type=type(model).__name__,
        modules=tuple(site.path for site in sites),
        num_heads=tuple(site.num_heads for site in sites),
        num_kv_heads=tuple(site.num_heads for site in sites),
        head_dim=tuple(site.head_dim for site in sites),
        weights_sha256=parameters_sha256(model),
    )


class AppliedTransformer(Removable):
    """A plan on a diffusers transformer. Use it as a context manager, or keep it and call `remove`, which may be called twice.

    Attributes:
        model: the transformer.
        plan: the plan.
        layers: path of an attention module -> what answers its calls.
        heads_patched: heads whose rule is not dense at some step.
    """

    def __init__(self, model: Any, plan: Plan, backend: Backend) -> None:
        self.model, self.plan = model, plan
        sites = transformer_sites(model)
        _check_geometry(plan.base_model, sites)
        self._hook = install(model, family_of(model))
        self.layers: dict[str, SparseLayer] = {}
        self._processors: list[tuple[Any, Any, Any]] = []
        self._active = True
        try:
            for site in sites:
                layer = SparseLayer(site.path, plan, self._hook, backend)
                before = site.module.processor
                ours = specialise(before, layer)
                site.module.set_processor(ours)
                self._processors.append((site.module, before, ours))
                self.layers[site.path] = layer
        except BaseException:
            self.remove()
            raise
        self.heads_patched = sum(
            any(rule.kind != "dense" for rule in ranges)
            for layer in self.layers.values()
            for ranges in zip(*layer.rules, strict=True)
        )

    def at_step(self, index: int | None, num_steps: int | None = None) -> None:
        """Say by hand at which denoising step the next calls are; None lets the pipeline say it again."""
        self._hook.by_hand = None if index is None or num_steps is None else (index, num_steps)

    def at_chunk(self, index: int | None) -> None:
        """Say which piece of the video the next calls generate, for schedules with budgets per chunk; no pipeline tells it."""
        self._hook.chunk = index

    def watch(self, scheduler: Any) -> None:
        """Read steps from a pipeline's scheduler where the pipeline itself does not tell them."""
        self._hook.scheduler = scheduler

    def probe(self, probe: Probe | None) -> None:
        """Show every self-attention call to `probe`; what it returns, if anything, replaces the output."""
        for layer in self.layers.values():
            layer.probe = probe

    @property
    def backends(self) -> set[str]:
        """Backends that served the last sparse calls."""
        return {layer.taken for layer in self.layers.values() if layer.taken is not None}

    def remove(self) -> None:
        """Restore the transformer exactly as it was before.

        Raises:
            SparseSearchError: somebody has set other processors since; nothing has been touched then.
        """
        if not self._active:
            return
        if any(module.processor is not ours for module, _, ours in self._processors):
            raise SparseSearchError(
                "a plan can be removed while its own attention processors are set, but others have been set since. Unset those first."
            )
        self._active = False
        for module, before, _ in self._processors:
            module.set_processor(before)
        uninstall(self.model)


class AppliedPipeline(Removable):
    """Plans on the transformers of a pipeline.

    Attributes:
        components: name of a component -> its applied plan.
    """

    def __init__(self, components: dict[str, AppliedTransformer]) -> None:
        self.components = components

    @property
    def heads_patched(self) -> int:
        """Heads whose rule is not dense at some step."""
        return sum(applied.heads_patched for applied in self.components.values())

    def remove(self) -> None:
        """Restore all transformers."""
        for applied in self.components.values():
            applied.remove()


def apply_diffusers(
    model: Any, plan: Plan | Mapping[str, Plan], *, backend: str = "auto", allow_other_weights: bool = False
) -> AppliedTransformer | AppliedPipeline:
    """Run a plan on a live diffusers transformer or pipeline, until the returned handle is removed or its `with` block ends.

    Args:
        model: a transformer, or a pipeline that has one.
        plan: the plan; for a pipeline also a mapping from component (`transformer`, `transformer_2`) to its plan.
        backend: as in `kernels.dispatch`.
        allow_other_weights: accept weights whose fingerprint differs, such as a fine-tuned copy.

    Raises:
        PlanMismatchError: a component is missing, or is not the plan's model. Nothing has been touched then.
        UnsupportedModelError: the class or one of its attention processors is not supported. Nothing has been touched then.
        SpecError: unknown backend, a plan is already applied, or a single transformer was given several.
    """
    options: Any = {"backend": backend, "allow_other_weights": allow_other_weights}
    if hasattr(model, "components"):
        return apply_to_pipeline(model, {"transformer": plan} if isinstance(plan, Plan) else plan, **options)
    if not isinstance(plan, Plan):
        raise SpecError("a single transformer must get a single plan, but got a mapping. Give the pipeline instead.")
    return apply_to_transformer(model, plan, **options)


def apply_to_transformer(
    model: nn.Module, plan: Plan, *, backend: str = "auto", allow_other_weights: bool = False, scheduler: Any = None
) -> AppliedTransformer:
    """Run `plan` on a live diffusers transformer, until the returned handle is removed or its `with` block ends.

    Args:
        model: the transformer.
        plan: its plan.
        backend: as in `kernels.dispatch`.
        allow_other_weights: accept weights whose fingerprint differs.
        scheduler: of its pipeline, to read steps from where the pipeline itself does not tell them.

    Raises:
        PlanMismatchError: modules, head counts or weights are not the plan's. Nothing has been touched then.
        UnsupportedModelError: the class or one of its attention processors is not supported. Nothing has been touched then.
        SpecError: unknown backend, or a plan is already applied.
    """
    if not allow_other_weights:
        require_weights(plan.base_model, parameters_sha256(model))
    for known in BACKENDS:
        if backend == known:
            applied = AppliedTransformer(model, plan, known)  # type: ignore[arg-type]  # one of the literals
            applied.watch(scheduler)
            return applied
    raise SpecError(f"unknown backend {backend!r}.{nearest(backend, BACKENDS)}")


def apply_to_pipeline(
    pipeline: Any, plans: Mapping[str, Plan], *, backend: str = "auto", allow_other_weights: bool = False
) -> AppliedPipeline:
    """Run one plan per component, such as `transformer` and (Wan 2.2) `transformer_2`; steps come from the pipeline's scheduler.

    Raises:
        PlanMismatchError: the pipeline has no such component, or its plan is for another model. Nothing has been touched then.
    """
    applied: dict[str, AppliedTransformer] = {}
    try:
        for name, plan in plans.items():
            if name not in pipeline.components or pipeline.components[name] is None:
                raise PlanMismatchError(f"the pipeline has no component {name!r}.{nearest(name, pipeline.components)}")
            applied[name] = apply_to_transformer(
                pipeline.components[name],
                plan,
                backend=backend,
                allow_other_weights=allow_other_weights,
                scheduler=pipeline.components.get("scheduler"),
            )
    except BaseException:
        AppliedPipeline(applied).remove()
        raise
    return AppliedPipeline(applied)


def _check_geometry(info: BaseModelInfo, sites: tuple[TransformerSite, ...]) -> None:
    wanted = list(zip(info.modules, info.num_heads, info.head_dim, strict=True))
    found = [(site.path, site.num_heads, site.head_dim) for site in sites]
    if wanted != found:
        differing = next(((w, f) for w, f in zip(wanted, found, strict=False) if w != f), (len(wanted), len(found)))
        raise PlanMismatchError(
            f"the plan was made for {info.name_or_path!r}, whose attention differs from this model's: {differing[0]} there, "
            f"{differing[1]} here. Give the model the plan was made for."
        )
