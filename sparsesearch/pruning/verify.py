"""`sparsesearch verify DIR` for pruned checkpoints: are the widths those of the plan, and is it the wide model with zeros?

The oracle is the stock architecture in the base's sizes, filled with the checkpoint's weights at their old places and zeros everywhere
else. A narrow model must answer as it does, whatever route it was loaded by.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparsesearch.artifacts import read_text
from sparsesearch.cut import Cut, LayerCut
from sparsesearch.errors import ArtifactError
from sparsesearch.plan import Plan
from sparsesearch.pruning.apply import attention_after_cut
from sparsesearch.pruning.models import load_prunable
from sparsesearch.runtime.attention import NAME
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.export import PLAN_FILE
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.pruned_models import ATTRIBUTE, PREFIX
from sparsesearch.runtime.shrink import Constant
from sparsesearch.runtime.sublayers import Layer, layers_of
from sparsesearch.runtime.verify import relative_error, verify

_TOKENS, _ITEMS, _DECODED_TOKENS = 37, 2, 4


@dataclass(frozen=True)
class PrunedVerifyReport:
    """What was found.

    Attributes:
        directory: the checkpoint.
        plan_sha256: digest of its plan.
        layout: `per layer`, `stock` or `logical`.
        parameters: of the checkpoint.
        heads_removed: query heads the plan removes.
        channels_removed: FFN channels the plan removes.
        wide_error: largest difference from the wide model with zeros, over its largest output; NaN when it was not compared.
        decode_error: of tokens decoded through the cache from one run over all of them, likewise; NaN for models without a cache.
        tolerance: bound on both.
        problems: what is wrong, one sentence each; empty when the checkpoint is good.
    """

    directory: Path
    plan_sha256: str
    layout: str
    parameters: int
    heads_removed: int
    channels_removed: int
    wide_error: float
    decode_error: float
    tolerance: float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def is_pruned(directory: Path) -> bool:
    """Whether a checkpoint directory carries a plan that removes."""
    path = directory / PLAN_FILE
    return path.is_file() and Plan.load(path).pruning is not None


def layout_of(model: PreTrainedModel, cut: Cut) -> str:
    """How a pruned checkpoint holds its cut: `per layer`, `stock` (same widths everywhere) or `logical` (zeros in the base's shapes)."""
    return "per layer" if hasattr(model.config, ATTRIBUTE) else "stock" if _is_narrow(model, cut) else "logical"


def verify_pruned(directory: Path) -> PrunedVerifyReport:
    """Check plan, widths and results of a pruned checkpoint, in float32 on the CPU; its attention rules too, where it has any.

    Raises:
        ArtifactError: a file is missing, damaged or edited, or the plan removes nothing.
    """
    plan, config = Plan.load(directory / PLAN_FILE), _config(directory)
    if plan.pruning is None:
        raise ArtifactError(f"{directory}/{PLAN_FILE} must remove heads or channels, but removes none.")
    model, _ = load_prunable(directory, dtype="float32")
    layout = layout_of(model, plan.pruning)
    problems = [*_wrong_sizes(model, plan.pruning, layout), *_not_finite(model)]
    wide_error = decode_error = math.nan
    tolerance = 2**12 * torch.finfo(torch.float32).eps  # as in runtime/verify.py
    if not problems:
        problems += _attention_problems(directory, plan, model, config)
        wide_error, decode_error = _errors(model, plan.pruning, layout)
        found = {"the wide model with zeros": wide_error, "one run over all tokens when decoding": decode_error}
        problems += [
            f"it differs from {what} by {error:.1e} of the largest output (allowed: {tolerance:.1e})"
            for what, error in found.items()
            if error > tolerance
        ]
    cuts = plan.pruning.layers.values()
    return PrunedVerifyReport(
        directory=directory,
        plan_sha256=plan.sha256,
        layout=layout,
        parameters=model.num_parameters(),
        heads_removed=sum(len(cut.removed_heads) for cut in cuts),
        channels_removed=sum(len(cut.removed_channels) for cut in cuts),
        wide_error=wide_error,
        decode_error=decode_error,
        tolerance=tolerance,
        problems=tuple(problems),
    )


def _config(directory: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(read_text(directory / "config.json"))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{directory}/config.json must be JSON, but is damaged at line {error.lineno}.") from error
    return content


def _sizes(layer: Layer) -> tuple[int, int, int]:
    return layer.num_heads, layer.num_kv_heads, layer.num_channels


def _left(own: LayerCut) -> tuple[int, int, int]:
    return len(own.kept_heads), len(own.kept_groups), len(own.kept_channels)


def _is_narrow(model: PreTrainedModel, cut: Cut) -> bool:
    layers = layers_of(model)
    return any(_sizes(layers[index]) != (own.num_heads, own.num_kv_heads, own.num_channels)
               for index, own in cut.layers.items())  # fmt: skip


def _wrong_sizes(model: PreTrainedModel, cut: Cut, layout: str) -> list[str]:
    """Layers whose widths are not the plan's; in a logical checkpoint, removed inputs whose columns are not zero."""
    layers, problems = layers_of(model), []
    for index, own in cut.layers.items():
        layer = layers[index]
        if layout != "logical":
            if _sizes(layer) != _left(own):
                problems.append(
                    f"layer {index} has {_sizes(layer)} heads, KV heads and channels, the plan {_left(own)}"
                )
            continue
        for kind, names in layer.sublayers:
            kept = _kept(own, layer, kind, names.out)
            gone = torch.ones(layer.projection(names.out).in_features, dtype=torch.bool)
            gone[kept] = False
            if layer.projection(names.out).weight[:, gone].any():
                problems.append(f"layer {index} still reads {kind} inputs that the plan removes")
    return problems


def _not_finite(model: nn.Module) -> list[str]:
    return [f"{name} is not finite" for name, tensor in model.named_parameters() if not tensor.isfinite().all()]


def _attention_problems(directory: Path, plan: Plan, model: PreTrainedModel, config: dict[str, Any]) -> list[str]:
    """What is wrong with the rules on the heads that are left."""
    if NAME not in config:
        dense = all(rule.kind == "dense" for _, _, rule in plan.heads())
        return [] if dense else ["config.json carries no attention rules, but the plan has some"]
    left = plan.model_copy(update={"pruning": None})
    if ATTRIBUTE in config or _is_narrow(model, plan.pruning or Cut(layers={})):
        after = attention_after_cut(plan, lambda: describe(model, plan.base_model.name_or_path))
        left = after if after is not None else left
    return list(verify(directory, intended=left).problems)


@torch.no_grad()
def _errors(model: PreTrainedModel, cut: Cut, layout: str) -> tuple[float, float]:
    model.set_attn_implementation("sdpa")  # rules, if any, have their own oracle
    wide = model if layout == "logical" else _widened(model, cut)
    inputs = _inputs(model)
    ours, exact = _output(model, inputs), _output(wide, inputs)
    decode = math.nan
    if model.can_generate():
        cache: dict[str, Any] = {CACHE_KEYWORD: DynamicCache(), "use_cache": True}
        prompt, *rest = inputs["input_ids"].split([_TOKENS - _DECODED_TOKENS, *[1] * _DECODED_TOKENS], 1)
        model(prompt, **cache)
        decoded = torch.cat([model(token, **cache).logits for token in rest], 1)
        decode = relative_error(decoded, exact[:, -_DECODED_TOKENS:])
    return relative_error(ours, exact), decode


def _output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    found: Tensor = output.last_hidden_state if getattr(output, "logits", None) is None else output.logits
    return found


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        return {"pixel_values": torch.randn(_ITEMS, config.num_channels, size, size, generator=generator)}
    return {"input_ids": torch.randint(config.vocab_size, (_ITEMS, _TOKENS), generator=generator)}


def _widened(model: PreTrainedModel, cut: Cut) -> PreTrainedModel:
    """The stock model of the base's sizes, zeros where the plan removed something."""
    name = type(model).__name__.removeprefix("Sparse")
    wide: PreTrainedModel = getattr(transformers, name)(_wide_config(model, cut))
    wide.train(False)
    narrow_state = model.state_dict()
    state = {name: narrow_state.get(name, torch.zeros_like(tensor)) for name, tensor in wide.state_dict().items()}
    for index, own in cut.layers.items():
        layer, narrow = layers_of(wide)[index], layers_of(model)[index].module
        for kind, names in layer.sublayers:
            for into in (*names.into, names.out):
                kept, target = _kept(own, layer, kind, into), layer.projection(into)
                source, path = _projection(narrow, into), f"{layer.path}.{into}"
                weight = torch.zeros_like(target.weight)
                if isinstance(source, nn.Linear):
                    weight[(slice(None), kept) if into == names.out else (kept,)] = source.weight
                state[f"{path}.weight"] = weight
                if source is not None and source.bias is not None:
                    bias = source.bias.detach()
                    if into != names.out:
                        bias = torch.zeros(target.out_features).index_copy(0, kept, bias)
                    target.register_parameter("bias", nn.Parameter(bias))
                    state[f"{path}.bias"] = bias
    wide.load_state_dict(state)
    return wide


def _projection(narrow: nn.Module, name: str) -> nn.Linear | Constant | None:
    """A projection of a narrow layer; None where nothing is left of it."""
    found = dict(narrow.named_modules()).get(name)
    return found if isinstance(found, nn.Linear | Constant) else None


def _kept(own: LayerCut, layer: Layer, kind: str, name: str) -> Tensor:
    """Rows (of a projection into a sublayer) or columns (of the one out of it) that are left, in the base's numbering."""
    if kind == "feed_forward":
        return torch.tensor(own.kept_channels, dtype=torch.long)
    assert layer.attention is not None
    heads = own.kept_groups if name in layer.attention.into[1:] else own.kept_heads
    return (torch.tensor(heads, dtype=torch.long)[:, None] * layer.head_dim + torch.arange(layer.head_dim)).flatten()


def _wide_config(model: PreTrainedModel, cut: Cut) -> Any:
    config = copy.deepcopy(model.config)
    own = next(iter(cut.layers.values()))
    content = {key: value for key, value in config.to_dict().items() if key not in ("model_type", ATTRIBUTE, NAME)}
    content |= {"num_attention_heads": own.num_heads, "intermediate_size": own.num_channels}
    if "num_key_value_heads" in content:
        content["num_key_value_heads"] = own.num_kv_heads
    content.pop("attn_implementation", None)
    stock = transformers.AutoConfig.for_model(config.model_type.removeprefix(PREFIX), **content)
    stock._attn_implementation = "sdpa"
    return stock
