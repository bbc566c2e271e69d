"""Putting a plan on a live model, and taking it off again without a trace."""

import functools
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsesearch.embedded_plan import embedded
from sparsesearch.errors import PlanMismatchError, SparseSearchError, SpecError
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.runtime.attention import NAME
from sparsesearch.runtime.backends import checked_backend
from sparsesearch.runtime.binding import LayerBinding, bind, binding_of, bindings_of
from sparsesearch.runtime.configuration import implementation_of, json_implementation, sparse_implementation
from sparsesearch.runtime.fingerprint import AttentionSite, attention_sites, require_weights, weights_sha256
from sparsesearch.runtime.prepare import forget_selections, prepare_call, release_selections
from sparsesearch.runtime.removable import Removable


class AppliedPlan(Removable):
    """A plan on a model. Use it as a context manager, or keep it and call `remove`, which may be called twice.

    After `remove` it may be entered again: what earlier calls left behind (schedules, selectors) is still there.

    Attributes:
        model: the model.
        plan: the plan.
        heads_patched: query heads whose rule is not dense.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, bindings: list[tuple[nn.Module, LayerBinding]], ragged: bool
    ):
        self.model, self.plan = model, plan
        self.heads_patched = sum(rule.kind != "dense" for _, binding in bindings for rule in binding.rules)
        self._own, self._ragged = bindings, ragged
        self._put_on()

    def __enter__(self) -> Self:
        if not self._active:
            self._put_on()
        return self

    def _put_on(self) -> None:
        self._bindings = [(module, binding, binding_of(module)) for module, binding in self._own]
        self._implementation = implementation_of(self.model.config)
        self._config = {key: self.model.config.__dict__.get(key, _MISSING) for key in (NAME, "attn_implementation")}
        self._hooks: list[RemovableHandle] = []
        self._active = True
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        for module, binding, _ in self._bindings:
            bind(module, binding)
        ours = sparse_implementation(self.model.config, [_config_of(module) for module, _, _ in self._bindings])
        self.model.set_attn_implementation(ours)
        setattr(self.model.config, NAME, embedded(self.plan))
        # a plain attribute: save_pretrained writes it, so a re-saved model stays sparse instead of turning dense in silence
        self.model.config.attn_implementation = json_implementation(ours)
        if not all(binding.all_dense for _, binding, _ in self._bindings):
            hook = functools.partial(prepare_call, ragged=self._ragged)
            decoder = decoder_of(self.model, [module for module, _, _ in self._bindings])
            self._hooks.append(decoder.register_forward_pre_hook(hook, with_kwargs=True))
            if any(binding.leaves is not None for _, binding, _ in self._bindings):
                self._hooks.append(decoder.register_forward_pre_hook(forget_selections))
                self._hooks.append(decoder.register_forward_hook(release_selections))

    def remove(self) -> None:
        """Restore the model exactly as it was before.

        Raises:
            SparseSearchError: another plan was applied on top and is still there.
        """
        if not self._active:
            return
        if any(binding_of(module) not in (binding, previous) for module, binding, previous in self._bindings):
            raise SparseSearchError(
                "plans must be removed in reverse order, but a later one is still applied. Remove it first."
            )
        self._active = False
        for hook in self._hooks:
            hook.remove()
        for module, _, previous in self._bindings:
            bind(module, previous)
        self.model.set_attn_implementation(self._implementation)
        for key, value in self._config.items():
            if value is _MISSING:
                self.model.config.__dict__.pop(key, None)
            else:
                setattr(self.model.config, key, value)


_MISSING = object()


def apply(
    model: PreTrainedModel, plan: Plan, *, backend: str = "auto", cache: bool = True, allow_other_weights: bool = False
) -> AppliedPlan:
    """Run `plan` on a live model, until the returned handle is removed or its `with` block ends.

    Args:
        model: the model the plan was made for.
        plan: the plan.
        backend: `torch` (gather + SDPA), `reference` (the oracle, slow), or `auto`.
        cache: whether heads with evicting rules really drop keys in `generate`; False keeps them and only masks.
        allow_other_weights: accept weights whose fingerprint differs, such as a fine-tuned copy.

    Raises:
        PlanMismatchError: modules, head counts or weights are not the plan's. Nothing has been touched then.
        UnsupportedModelError: the model's attention has something no rule can express. Nothing has been touched then.
        SpecError: unknown backend.
    """
    sites = attention_sites(model)
    check_geometry(plan.base_model, sites)
    if not allow_other_weights:
        require_weights(plan.base_model, weights_sha256(model))
    return _applied(model, plan, sites, backend, cache)


def attach(model: PreTrainedModel, plan: Plan) -> AppliedPlan:
    """Bind the plan of a checkpoint just loaded: like `apply`, but its weights may have been trained further since.

    Raises:
        PlanMismatchError: the plan names modules or heads that the model does not have.
    """
    sites = attention_sites(model)
    check_geometry(plan.base_model, sites)
    return _applied(model, plan, sites, "auto", True)


def require_dense(model: PreTrainedModel) -> None:
    """Refuse a model that runs a plan where dense is what plans are compared with.

    Raises:
        SpecError: one is bound to it, by a patched checkpoint or by `apply`.
    """
    if any(not binding.all_dense for module in model.modules() if (binding := binding_of(module)) is not None):
        raise SpecError(
            "the model must run dense to be what plans are compared with, but runs a plan. Load it with "
            "`load_model(..., with_plan=False)`, or leave the `with apply(...)` block first."
        )


def check_geometry(info: BaseModelInfo, sites: tuple[AttentionSite, ...]) -> None:
    """Compare a plan's model with what is there.

    Raises:
        PlanMismatchError: names what differs first.
    """
    expected = list(zip(info.modules, info.num_heads, info.num_kv_heads, info.head_dim, strict=True))
    found = [(site.path, site.num_heads, site.num_kv_heads, site.head_dim) for site in sites]
    for want, have in zip(expected, found, strict=False):
        if want != have:
            raise PlanMismatchError(
                f"the plan was made for {info.name_or_path!r} with {_geometry(want)}, but this model has {_geometry(have)}. "
                "Give the model the plan was made for."
            )
    if len(expected) != len(found) or not found:
        raise PlanMismatchError(
            f"the plan was made for {info.name_or_path!r} with {len(expected)} attention modules, but this model has {len(found)}. "
            "Give the model the plan was made for."
        )


def decoder_of(model: PreTrainedModel, attention: list[nn.Module]) -> PreTrainedModel:
    """The innermost model that holds all attention modules: every way into them passes through its forward."""
    wanted = {id(module) for module in attention}
    holders = [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and wanted <= {id(module) for module in part.modules()}
    ]
    return min(holders, key=lambda part: sum(1 for _ in part.modules()))


def _applied(
    model: PreTrainedModel, plan: Plan, sites: tuple[AttentionSite, ...], backend: str, ragged: bool
) -> AppliedPlan:
    bindings = bindings_of(plan, checked_backend(backend))
    return AppliedPlan(model, plan, [(site.module, bindings[site.path]) for site in sites], ragged)


def _geometry(entry: tuple[str, int, int, int]) -> str:
    return f"{entry[0]}: {entry[1]} query heads, {entry[2]} KV heads of {entry[3]}"


def _config_of(module: nn.Module) -> Any:
    return module.config
