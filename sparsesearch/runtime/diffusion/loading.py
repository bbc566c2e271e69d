"""What `import sparsesearch` does to diffusers, now or as soon as somebody imports it: bind the plan that a model's config carries."""

import functools
import importlib.abc
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sparsesearch.embedded_plan import read_embedded
from sparsesearch.runtime.diffusion.guard import CONFIG_KEY, guarded, unguarded

_WRAPPED = "_sparsesearch_wrapped"
_MODELS, _PIPELINES = "diffusers.models.modeling_utils", "diffusers.pipelines.pipeline_utils"
_CONFIGS = "diffusers.configuration_utils"
_binding = [True]


def register() -> None:
    """Wrap how diffusers loads models, reads and writes their configs, and makes pipelines; a second call changes nothing."""
    for name, wrap in ((_CONFIGS, _wrap_configs), (_MODELS, _wrap_models), (_PIPELINES, _wrap_pipelines)):
        if name in sys.modules:
            wrap(sys.modules[name])
        elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name, wrap))


@contextmanager
def without_plans() -> Iterator[None]:
    """Load models without binding the plans they carry."""
    before, _binding[0] = _binding[0], False
    try:
        yield
    finally:
        _binding[0] = before


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs `then` on a module when it is first imported; importing diffusers for everybody would cost seconds."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as if we were not here, and hook its execution."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute: Callable[[ModuleType], None] = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _wrap_models(module: ModuleType) -> None:
    original: Any = module.ModelMixin.from_pretrained.__func__
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        result = original(cls, *args, **kwargs)
        bind_loaded(result[0] if isinstance(result, tuple) else result)
        return result

    setattr(from_pretrained, _WRAPPED, True)
    module.ModelMixin.from_pretrained = classmethod(from_pretrained)


def _wrap_configs(module: ModuleType) -> None:
    """Take the mark off a config that is read, and put it on one that is written."""
    read: Any = module.ConfigMixin.load_config.__func__
    write: Any = module.ConfigMixin.to_json_string
    if getattr(read, _WRAPPED, False):
        return

    @functools.wraps(read)
    def load_config(cls: type, *args: Any, **kwargs: Any) -> Any:
        result = read(cls, *args, **kwargs)
        return (unguarded(result[0]), *result[1:]) if isinstance(result, tuple) else unguarded(result)

    @functools.wraps(write)
    def to_json_string(self: Any) -> str:
        text: str = write(self)
        config = json.loads(text)
        return json.dumps(guarded(config), indent=2, sort_keys=True) + "\n" if CONFIG_KEY in config else text

    setattr(load_config, _WRAPPED, True)
    module.ConfigMixin.load_config = classmethod(load_config)
    module.ConfigMixin.to_json_string = to_json_string


def _wrap_pipelines(module: ModuleType) -> None:
    original: Any = module.DiffusionPipeline.register_modules
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def register_modules(self: Any, **kwargs: Any) -> Any:
        result = original(self, **kwargs)
        watch_scheduler(self, kwargs)
        return result

    setattr(register_modules, _WRAPPED, True)
    module.DiffusionPipeline.register_modules = register_modules


def bind_loaded(model: Any) -> None:
    """Bind the plan that a model's config carries.

    Raises:
        PlanMismatchError: the plan is for another architecture.
    """
    from sparsesearch.runtime.diffusion.live import AppliedTransformer

    content = dict(model.config).get(CONFIG_KEY) if _binding[0] else None
    if content is not None:
        where = f"{model.config.get('_name_or_path', type(model).__name__)}: config.json: {CONFIG_KEY}"
        AppliedTransformer(model, read_embedded(content, source=where), "auto")


def watch_scheduler(pipeline: Any, modules: dict[str, Any]) -> None:
    """Let bound transformers of a pipeline read the denoising step from its scheduler."""
    from sparsesearch.runtime.diffusion.call import hook_of

    scheduler = modules.get("scheduler", getattr(pipeline, "scheduler", None))
    for part in modules.values():
        hook = hook_of(part)
        if hook is not None:
            hook.scheduler = scheduler
