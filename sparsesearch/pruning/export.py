"""`sparsesearch apply` for plans that remove: a checkpoint whose files are really smaller, or (logical) one of the old shapes with zeros.

| mode | shapes | loads with |
|---|---|---|
| physical | a width per layer | plain `from_pretrained` after `import sparsesearch` (own model_type) |
| physical, same widths everywhere, no new biases | stock | plain `from_pretrained` alone; llama.cpp's converter |
| logical | the base's | plain `from_pretrained` alone |

Attention rules in the plan need sparsesearch in every mode, as in any patched checkpoint.
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparsesearch.artifacts import write_bytes
from sparsesearch.cut import Cut
from sparsesearch.embedded_plan import embedded
from sparsesearch.errors import SpecError, UnsupportedModelError
from sparsesearch.plan import Plan
from sparsesearch.pruning.apply import attention_after_cut
from sparsesearch.pruning.compensate import compensate
from sparsesearch.pruning.data import compensation_batches
from sparsesearch.pruning.models import load_prunable
from sparsesearch.runtime.attention import NAME
from sparsesearch.runtime.configuration import json_implementation, sparse_implementation
from sparsesearch.runtime.export import COMPANIONS, PLAN_FILE, check_target, complete_or_nothing
from sparsesearch.runtime.fingerprint import attention_sites, describe, plan_of_weights, weights_sha256
from sparsesearch.runtime.loading import locate
from sparsesearch.runtime.model_card import model_card
from sparsesearch.runtime.pruned_models import FAMILIES, PREFIX, model_class, pruned_config
from sparsesearch.runtime.shrink import Fitted, LayerSizes, sizes_of, sliced_weights
from sparsesearch.runtime.sublayers import Layer, layers_of

Mode = Literal["physical", "logical"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What was written.

    Attributes:
        path: the directory.
        layout: `per layer`, `stock` (same widths everywhere) or `logical`.
        parameters: of the new model.
        base_parameters: of the dense one.
        heads_removed: query heads that are gone.
        channels_removed: FFN channels that are gone.
    """

    path: Path
    layout: str
    parameters: int
    base_parameters: int
    heads_removed: int
    channels_removed: int


def export_pruned(
    plan: Plan,
    model: str | Path,
    out: Path,
    *,
    mode: Mode = "physical",
    overwrite: bool = False,
    allow_other_weights: bool = False,
    command: str | None = None,
    device: str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> PrunedCheckpoint:
    """Cut, refit and write a checkpoint. `out` appears complete or not at all.

    Args:
        plan: with removals.
        model: local directory, hub id, embedded name, or GGUF file.
        out: directory to make.
        mode: see the module's table.
        overwrite: replace a directory that is not empty.
        allow_other_weights: accept weights the plan was not made for.
        command: command line, for the model card.
        device: where the refit runs.
        progress: called with (stage, done, total).

    Raises:
        PlanMismatchError: the plan is for another model.
        SpecError: the plan removes nothing.
        UnsupportedModelError: the family has no pruned model type and widths differ from layer to layer.
    """
    if plan.pruning is None:
        raise SpecError(
            "the plan must remove heads or channels to be exported as a pruned checkpoint, but removes none."
        )
    place = locate(model)
    check_target(out, place, overwrite)
    base, tokenizer = load_prunable(model, device=device, dtype="float32")
    plan = plan_of_weights(plan, weights_sha256(base), allow_other_weights=allow_other_weights)
    assert plan.pruning is not None
    fitted = _fitted(base, tokenizer, plan.pruning, mode, progress)
    stack: nn.Module = base
    stack.to("cpu")
    narrow, layout = (
        (_zeroed(base, plan.pruning, fitted), "logical") if mode == "logical" else _narrow(base, plan.pruning, fitted)
    )
    with complete_or_nothing(out, overwrite) as staging:
        stored: nn.Module = narrow
        stored.to(_stored_dtype(place))
        narrow.save_pretrained(staging)
        _companions(place, tokenizer, staging)
        _write_plan(staging, plan, narrow, mode, place, command)
    cuts = plan.pruning.layers.values()
    return PrunedCheckpoint(
        out, layout, narrow.num_parameters(), base.num_parameters(),
        sum(len(cut.removed_heads) for cut in cuts), sum(len(cut.removed_channels) for cut in cuts),
    )  # fmt: skip


def _fitted(base: PreTrainedModel, tokenizer: Any, cut: Cut, mode: Mode, progress: Progress) -> dict[str, Fitted]:
    if cut.compensation is None:
        return {}
    batches = compensation_batches(base, tokenizer, cut.compensation)
    bias = cut.compensation.bias and mode == "physical"  # a stock model has no place for new biases
    found = compensate(base, cut, batches, bias=bias, progress=progress)
    return {path: Fitted(new.weight.cpu(), None if new.bias is None else new.bias.cpu()) for path, new in found.items()}


def _narrow(base: PreTrainedModel, cut: Cut, fitted: Mapping[str, Fitted]) -> tuple[PreTrainedModel, str]:
    """A new model of the cut's widths, of a stock class where that can express them."""
    layers = layers_of(base)
    sizes, weights = sizes_of(cut, fitted, layers), sliced_weights(cut, fitted, layers)
    stock = _uniform_config(base, sizes, layers)
    if stock is not None:
        made, layout = _on_meta(type(base), stock), "stock"
    elif base.config.model_type in FAMILIES:
        made, layout = (
            _on_meta(model_class(base.config.model_type, type(base).__name__), _pruned(base, sizes)),
            "per layer",
        )
    else:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"widths that differ from layer to layer need a model type of ours ({known}), but this is {base.config.model_type!r}. "
            "Pass --logical, which keeps the shapes."
        )
    _fill(made, {**base.state_dict(), **weights}, base)
    return made, layout


def _pruned(base: PreTrainedModel, sizes: dict[int, LayerSizes]) -> PreTrainedConfig:
    return pruned_config(_plain_config(base), sizes)


def _plain_config(base: PreTrainedModel) -> PreTrainedConfig:
    """The config without what a GGUF origin left in it."""
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    return config


def _uniform_config(
    base: PreTrainedModel, sizes: dict[int, LayerSizes], layers: tuple[Layer, ...]
) -> PreTrainedConfig | None:
    """A stock config with the cut's widths, when they are the same in every layer and no bias is new."""
    if len(sizes) != len(layers) or len(set(sizes.values())) != 1:
        return None
    size, config = sizes[0], _plain_config(base)
    gains = (size.attention_bias, layers[0].attention), (size.feed_forward_bias, layers[0].feed_forward)
    if any(new and layout and layers[0].projection(layout.out).bias is None for new, layout in gains):
        return None
    if not (size.num_heads and size.num_channels):
        return None
    changes: dict[str, Any] = {"intermediate_size": size.num_channels}
    if size.num_heads != layers[0].num_heads:
        if not hasattr(config, "head_dim") or not hasattr(config, "num_key_value_heads"):
            return None
        changes |= {
            "num_attention_heads": size.num_heads,
            "num_key_value_heads": size.num_kv_heads,
            "head_dim": layers[0].head_dim,
        }
    content = {key: value for key, value in config.to_dict().items() if key != "model_type"} | changes
    try:
        return type(config)(**content)
    except Exception as error:  # a family's own check of widths (Llama: hidden_size % heads)
        if type(error).__name__ != "StrictDataclassClassValidationError" and not isinstance(error, ValueError):
            raise
        return None


def _zeroed(base: PreTrainedModel, cut: Cut, fitted: Mapping[str, Fitted]) -> PreTrainedModel:
    """The base's shapes with zeros: outgoing columns of what is removed, and the rows that fed them."""
    layers = layers_of(base)
    sizes_of(cut, fitted, layers)  # checks the cut
    made = _on_meta(type(base), _plain_config(base))
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for index, own in cut.layers.items():
        layer = layers[index]
        gone = {
            "attention": [head * layer.head_dim + i for head in own.removed_heads for i in range(layer.head_dim)],
            "feed_forward": list(own.removed_channels),
        }
        for kind, layout in layer.sublayers:
            for name in (*layout.into, layout.out):
                if (new := fitted.get(f"{layer.path}.{name}")) is not None:
                    state[f"{layer.path}.{name}.weight"] = new.weight.clone()
                    if new.bias is not None:
                        state[f"{layer.path}.{name}.bias"] = new.bias.clone()
            state[f"{layer.path}.{layout.out}.weight"][:, gone[kind]] = 0
            # a shared KV head still feeds the query heads that stay, so only what makes the removed inputs alone is zeroed
            for name in layout.into if kind == "feed_forward" else layout.into[:1]:
                for part in ("weight", "bias"):
                    if f"{layer.path}.{name}.{part}" in state:
                        state[f"{layer.path}.{name}.{part}"][gone[kind]] = 0
    _fill(made, state, base)
    return made


def _on_meta(kind: Any, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        made: PreTrainedModel = kind(config)
    return made


def _fill(made: PreTrainedModel, state: Mapping[str, Tensor], base: PreTrainedModel) -> None:
    """Put weights into a model on meta; buffers that are not saved are copied from the base."""
    names = set(made.state_dict())
    made.load_state_dict({name: tensor for name, tensor in state.items() if name in names}, assign=True)
    made.tie_weights()
    for name, buffer in base.named_buffers():
        parent, _, child = name.rpartition(".")
        if name not in names:
            made.get_submodule(parent).register_buffer(child, buffer.clone(), persistent=False)
    if base.can_generate():
        made.generation_config = copy.deepcopy(base.generation_config)
    made.train(False)


def _stored_dtype(place: Path | str) -> torch.dtype:
    """The dtype the base is stored in; float32 for a GGUF file, which was dequantised."""
    if isinstance(place, Path) and (place / "config.json").is_file():
        content = json.loads((place / "config.json").read_text(encoding="utf-8"))
        name = content.get("dtype") or content.get("torch_dtype") or "float32"
        return getattr(torch, name)  # type: ignore[no-any-return]
    return torch.float32


def _companions(place: Path | str, tokenizer: Any, staging: Path) -> None:
    if isinstance(place, Path) and place.is_dir():
        for pattern in COMPANIONS:
            for file in sorted(place.glob(pattern)):
                if file.is_file() and file.name != "generation_config.json":
                    shutil.copy(file, staging / file.name)
        for folder in sorted(place.glob("*_Pooling")):  # sentence-transformers
            shutil.copytree(folder, staging / folder.name)
        for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
            if (place / name).is_file():
                shutil.copy(place / name, staging / name)
    elif tokenizer is not None:
        tokenizer.save_pretrained(staging)


def _write_plan(
    staging: Path, plan: Plan, narrow: PreTrainedModel, mode: Mode, place: Path | str, command: str | None
) -> None:
    """The plan copy, the model card, and the attention part inside the config."""
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    name = plan.base_model.name_or_path
    rest = (
        attention_after_cut(plan, lambda: describe(narrow.float(), name))
        if mode == "physical"
        else None
        if all(rule.kind == "dense" for _, _, rule in plan.heads())
        else plan.model_copy(update={"pruning": None})
    )
    if rest is not None:
        attending: list[Any] = [site.module.config for site in attention_sites(narrow)]
        config["attn_implementation"] = json_implementation(sparse_implementation(narrow.config, attending))
        config[NAME] = embedded(rest)
        write_bytes(staging / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    plan.save(staging / PLAN_FILE)
    card = place / "README.md" if isinstance(place, Path) and place.is_dir() else staging / "README.md"
    write_bytes(staging / "README.md", model_card(plan, card, command, model_type=_type_of(config)).encode())


def _type_of(config: Mapping[str, Any]) -> str | None:
    kind = str(config.get("model_type"))
    return kind if kind.startswith(PREFIX) else None
