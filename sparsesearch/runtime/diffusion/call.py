"""What one call of a transformer is about: its tokens, and where it stands in the denoising loop.

One hook of diffusers' own kind on the transformer learns both: the token grid from the shapes of its arguments, the step from the pipeline.
The step comes from the first that knows it: `at_step` (set by hand), the cache context that the Wan pipeline opens around every call, or the
position of the timestep in the scheduler of the pipeline.
"""

import inspect
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import Tensor, nn

from sparsesearch.errors import SpecError, UnsupportedModelError
from sparsesearch.layout import Layout
from sparsesearch.runtime.denoising_call import Call
from sparsesearch.runtime.diffusion.families import Family

HOOK_NAME = "sparsesearch"


class _StepState(StateManager):
    """Hears of every cache context that a pipeline opens on the model."""

    def __init__(self) -> None:
        super().__init__(BaseState)
        self.told: CacheContext | None = None

    def set_context(self, context: CacheContext | None) -> None:
        """Called by `model.cache_context`."""
        self.told = context


class CallHook(ModelHook):
    """Keeps `current` while the transformer runs.

    Attributes:
        current: the call in progress.
        scheduler: of the pipeline, to find a timestep's place in the loop.
        by_hand: step and number of steps set by the caller, before anything else.
        chunk: piece of the video that is generated, set by the caller; None where there are none.
    """

    _is_stateful = True

    def __init__(self, family: Family, signature: inspect.Signature, config: Any) -> None:
        super().__init__()
        self.current: Call | None = None
        self.scheduler: Any = None
        self.by_hand: tuple[int, int] | None = None
        self.chunk: int | None = None
        self._family, self._signature, self._config = family, signature, config
        self._steps = _StepState()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Learn what the call is about."""
        given = self._signature.bind_partial(module, *args, **kwargs).arguments
        layout = self._family.layout(self._config, given)
        told = self._steps.told
        self.current = Call(
            layout,
            _key_lengths(self._family, layout, given),
            self._step(given),
            "" if told is None else told.name,
            self.chunk,
        )
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Forget it."""
        self.current = None
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by the pipeline when a run ends."""
        self._steps.told = None
        return module

    def _step(self, given: dict[str, Any]) -> tuple[int, int] | None:
        if self.by_hand is not None:
            return self.by_hand
        told = self._steps.told
        if told is not None and told.step_index is not None and told.num_inference_steps is not None:
            return told.step_index, told.num_inference_steps
        times = None if self.scheduler is None else getattr(self.scheduler, "timesteps", None)
        timestep = given.get("timestep")
        if times is None or not len(times) or not isinstance(timestep, Tensor):
            return None
        now = float(timestep.max()) * self._family.timestep_scale  # per token, in Wan 2.2 TI2V: clean ones have 0
        return int((times.float() - now).abs().argmin()), len(times)


def install(model: nn.Module, family: Family) -> CallHook:
    """Put a hook on a transformer.

    Raises:
        SpecError: a plan is already applied to it.
    """
    registry = HookRegistry.check_if_exists_or_initialize(model)
    if registry.get_hook(HOOK_NAME) is not None:
        raise SpecError(
            f"a {type(model).__name__} can run one plan at a time, but one is applied already. Remove it first."
        )
    hook = CallHook(family, inspect.signature(type(model).forward), model.config)
    registry.register_hook(hook, HOOK_NAME)
    registry.invalidate_child_registries_cache()
    return hook


def hook_of(model: Any) -> CallHook | None:
    """The hook of a transformer that runs a plan."""
    registry = getattr(model, "_diffusers_hook", None)
    found = None if registry is None else registry.get_hook(HOOK_NAME)
    return found if isinstance(found, CallHook) else None


def uninstall(model: nn.Module) -> None:
    """Take the hook off; a transformer without other hooks is as it was before the first one. A wrapper of accelerate's stays."""
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.remove_hook(HOOK_NAME, recurse=False)
    if not registry.hooks:
        own = model.__dict__.get("forward")
        if getattr(own, "__func__", None) is type(model).forward:
            del model.forward
        del model._diffusers_hook


def _key_lengths(family: Family, layout: Layout, given: dict[str, Any]) -> tuple[int, ...] | None:
    """Real tokens per batch row, from the mask of the text."""
    mask = None if family.key_mask is None else given.get(family.key_mask)
    if mask is None:
        return None
    padded = layout.num_tokens - mask.shape[1]
    real = mask.bool().sum(1).tolist()
    if not bool((mask.bool().long().diff(dim=1) <= 0).all()):
        raise UnsupportedModelError(
            f"{family.key_mask} must mark the first tokens of each prompt as real and the padding behind them, but has holes. "
            "Pad prompts on the right."
        )
    return None if min(real) == mask.shape[1] else tuple(padded + count for count in real)
