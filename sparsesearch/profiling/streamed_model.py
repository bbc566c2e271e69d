"""A checkpoint whose layers are read one at a time: everything else is resident, a layer has its weights only while it is needed."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsesearch.artifacts import read_text
from sparsesearch.errors import ArtifactError, SpecError, UnsupportedModelError
from sparsesearch.plan import BaseModelInfo
from sparsesearch.profiling.layer_stack import LayerStack
from sparsesearch.runtime.fingerprint import tensors_sha256
from sparsesearch.runtime.loading import DTYPES, locate
from sparsesearch.runtime.skeleton import describe_config

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Weights:
    """Tensors of a checkpoint, by name, each in its file."""

    files: Mapping[str, Path]

    @classmethod
    def of(cls, folder: Path) -> "Weights":
        """Those of a directory.

        Raises:
            ArtifactError: it holds no safetensors weights, or a file is missing or damaged.
        """
        if (folder / _INDEX).exists():
            table = json.loads(read_text(folder / _INDEX))["weight_map"]
            return cls({name: folder / file for name, file in table.items()})
        if not (folder / _SINGLE).exists():
            raise ArtifactError(
                f"{folder} must hold {_SINGLE} or {_INDEX} to be streamed, but has neither. Convert the weights to safetensors."
            )
        with _opened(folder / _SINGLE) as file:
            return cls(dict.fromkeys(file.keys(), folder / _SINGLE))

    def read(
        self, names: Iterable[str], device: torch.device | str, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """Tensors one after the other; every file is opened once.

        Raises:
            UnsupportedModelError: a name is not in the checkpoint.
            ArtifactError: a file is missing or damaged.
        """
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in names:
                if name not in self.files:
                    raise UnsupportedModelError(
                        f"the checkpoint must name its tensors as the model does to be streamed, but has no {name}. Profile without --stream."
                    )
                path = self.files[name]
                if path not in opened:
                    opened[path] = stack.enter_context(_opened(path, device))
                yield name, opened[path].get_tensor(name).to(dtype)


@dataclass(frozen=True)
class StreamedModel:
    """A model without its layers' weights, and where they are.

    Attributes:
        model: in evaluation mode; embeddings, head and norms resident, layers on the meta device.
        stack: its layers.
        info: geometry and fingerprint, as of the same model loaded whole.
        weights: of the checkpoint.
    """

    model: PreTrainedModel
    stack: LayerStack
    info: BaseModelInfo
    weights: Weights

    @contextmanager
    def present(self, layer: int) -> Iterator[None]:
        """One layer's weights on the device while the block runs."""
        module = self.stack.layers[layer]
        names = [name for name, _ in module.named_parameters()]
        _fill(module, self.weights, names, f"{self.stack.prefix}.{layer}.", self.stack.device, self.model.dtype)
        try:
            yield
        finally:
            for name in names:
                _put(module, name, torch.empty_like(module.get_parameter(name), device="meta"))


def open_streamed(
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> StreamedModel:
    """Open a local or hub checkpoint in safetensors for layer-by-layer use.

    Args:
        source: directory, embedded model or hub id.
        device: where one layer at a time, embeddings and head go.
        dtype: as of `load_model`.
        revision: of a hub id.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        SpecError: unknown dtype, or a GGUF file.
        ArtifactError: there are no safetensors weights.
        UnsupportedModelError: the layers are no plain chain, or tensors are named otherwise than the model's.
    """
    if dtype not in DTYPES:
        raise SpecError(f"dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}.")
    info = describe_config(str(source), revision=revision, trust_remote_code=trust_remote_code)
    folder = _folder(source, revision)
    weights = Weights.of(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    own = "float32" if device == "cpu" else str(config.get_text_config().dtype or torch.float32).removeprefix("torch.")
    chosen: torch.dtype = getattr(torch, own if dtype == "auto" else dtype)
    with _weightless():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=chosen, attn_implementation="sdpa", trust_remote_code=trust_remote_code
        )
    model.train(False)
    _make_resident(model, weights, device, chosen)
    stack = LayerStack.of(model, info.modules, weights=False)
    if stack is None:
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} must each take what the one before returns to be streamed, but do not. "
            "Profile without --stream."
        )
    return StreamedModel(
        model, stack, info.model_copy(update={"weights_sha256": _sha256(model, weights, chosen)}), weights
    )


def _folder(source: str | Path, revision: str | None) -> Path:
    place = locate(source)
    if isinstance(place, Path):
        return place
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(place, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.py"]))


def _make_resident(model: PreTrainedModel, weights: Weights, device: str, dtype: torch.dtype) -> None:
    """Everything that is no layer's: embeddings, head, norms; and all buffers, which are small."""
    layers = {id(p) for p in _layer_parameters(model)}
    outside = [name for name, p in model.named_parameters() if id(p) not in layers]
    tied = {name for name in model.all_tied_weights_keys if name not in weights.files}
    _fill(model, weights, [name for name in outside if name not in tied], "", device, dtype)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _layer_parameters(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module.parameters()


def _fill(
    module: nn.Module, weights: Weights, names: list[str], prefix: str, device: torch.device | str, dtype: torch.dtype
) -> None:
    for name, tensor in weights.read([prefix + name for name in names], device, dtype):
        own = name.removeprefix(prefix)
        if tensor.shape != module.get_parameter(own).shape:
            raise UnsupportedModelError(
                f"{name} must have shape {tuple(module.get_parameter(own).shape)}, but the checkpoint has {tuple(tensor.shape)}. "
                "Profile without --stream."
            )
        _put(module, own, tensor)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _sha256(model: PreTrainedModel, weights: Weights, dtype: torch.dtype) -> str:
    """The fingerprint of the base model's weights, read one tensor at a time."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    names = sorted(name for name, _ in model.base_model.named_parameters())
    found = weights.read([prefix + name for name in names], "cpu", dtype)
    return tensors_sha256((name.removeprefix(prefix), tensor) for name, tensor in found)


@contextmanager
def _weightless() -> Iterator[None]:
    """Modules built inside have parameters without memory; buffers are real, for nobody stores them."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _opened(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    try:
        opened = safe_open(path, framework="pt", device=str(device))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} must be a safetensors file, but cannot be read. Fetch the model again.") from error
    with opened as file:
        yield file
