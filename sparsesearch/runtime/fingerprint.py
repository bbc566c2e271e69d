"""Which model this is: its attention modules and head counts as they really run, and a digest of its weights."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsesearch.errors import PlanMismatchError, UnsupportedModelError
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.runtime.attention import NAME, PROBE_KEYWORD, AttentionCall, unsupported_feature
from sparsesearch.runtime.configuration import implementation_of

_SAMPLES_PER_TENSOR = 64


@dataclass(frozen=True)
class AttentionSite:
    """One attention module as a probing forward met it."""

    path: str
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int


def describe(model: PreTrainedModel, name_or_path: str) -> BaseModelInfo:
    """Discover the attention modules by running two tokens, and fingerprint the weights.

    Args:
        model: a decoder language model that goes through transformers' AttentionInterface.
        name_or_path: how plans and reports are to call it.

    Raises:
        UnsupportedModelError: it does not, or its attention has something no rule can express (named in the message).
    """
    sites = attention_sites(model)
    return BaseModelInfo(
        name_or_path=name_or_path,
        model_type=model.config.model_type,
        modules=tuple(site.path for site in sites),
        num_heads=tuple(site.num_heads for site in sites),
        num_kv_heads=tuple(site.num_kv_heads for site in sites),
        head_dim=tuple(site.head_dim for site in sites),
        weights_sha256=weights_sha256(model),
    )


def attention_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    """The attention modules in module order, with head counts from the tensors they really hand over.

    Paths are those of the model with its head: `AutoModel` and `AutoModelForCausalLM` agree.

    Raises:
        UnsupportedModelError: see `describe`.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"the model must be a transformers PreTrainedModel, but is a {type(model).__name__}."
        )
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only decoder language models can run a plan.")
    calls: dict[int, tuple[int, int, int]] = {}
    refusals: list[str] = []

    def probe(call: AttentionCall) -> None:
        calls[id(call.module)] = (call.query.shape[1], call.key.shape[1], call.query.shape[3])
        refusal = unsupported_feature(call)
        if refusal:
            refusals.append(refusal)

    with _routed_to_us(model), torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        try:
            # with a mask nobody looks for packed sequences, which needs values that meta tensors do not have
            mask = torch.ones_like(ids) if ids.is_meta else None
            model(input_ids=ids, attention_mask=mask, use_cache=False, **{PROBE_KEYWORD: probe})
        except TypeError as error:
            if PROBE_KEYWORD not in str(error):  # else: its forward takes no extra keywords
                raise
    if refusals:
        raise UnsupportedModelError(f"{name} cannot run a sparse plan: {refusals[0]}.")
    if not calls:
        raise UnsupportedModelError(
            f"{name} must route its attention, with extra keyword arguments, through transformers' AttentionInterface, but no call "
            "arrived. Use an architecture that does (Llama, Qwen, Mistral, Phi, GPT-2, GPT-NeoX, OPT, ...)."
        )
    prefix = f"{model.base_model_prefix}." if model.base_model is model and model.base_model_prefix else ""
    return tuple(
        AttentionSite(prefix + path, module, *calls[id(module)])
        for path, module in model.named_modules()
        if id(module) in calls
    )


@contextmanager
def _routed_to_us(model: PreTrainedModel) -> Iterator[None]:
    """Route attention to our function and out of training mode, and back."""
    before, training = implementation_of(model.config), [module for module in model.modules() if module.training]
    try:
        if before != NAME:
            model.set_attn_implementation(NAME)
        model.train(False)
        yield
    finally:
        model.set_attn_implementation(before)
        for module in training:
            module.training = True


def weights_sha256(model: PreTrainedModel) -> str | None:
    """`parameters_sha256` of the base model, without the language-model head: so loads with and without one agree."""
    return parameters_sha256(model.base_model)


def parameters_sha256(module: nn.Module) -> str | None:
    """Digest of sorted parameter names, shapes, and up to 64 evenly spaced values per tensor, rounded to bfloat16.

    So a bfloat16 and a float32 load of the same bfloat16 weights agree. None when weights are not at hand (meta tensors, offloading).
    """
    parameters = sorted(module.named_parameters())
    if any(parameter.is_meta for _, parameter in parameters):
        return None
    return tensors_sha256((name, parameter.detach()) for name, parameter in parameters)


def require_weights(info: BaseModelInfo, found: str | None) -> None:
    """That weights of this digest are those a plan was made for; passes when either side's are not known.

    Raises:
        PlanMismatchError: they differ.
    """
    stated = info.weights_sha256
    if found is not None and stated is not None and found != stated:
        raise PlanMismatchError(
            f"the plan was made for the weights of {info.name_or_path!r} ({stated[:12]}), but these are others ({found[:12]}). "
            "Give the right model; for a fine-tuned copy, `sparsesearch apply --allow-other-weights` (allow_other_weights=True) writes the plan anew."
        )


def plan_of_weights(plan: Plan, found: str | None, *, allow_other_weights: bool) -> Plan:
    """The plan as a checkpoint with weights of this digest carries it, so that it can be verified and judged there.

    Of other weights than it was made for, if these are allowed, it names them and says which it was searched for.

    Raises:
        PlanMismatchError: they differ, and must not.
    """
    stated = plan.base_model.weights_sha256
    if not allow_other_weights:
        require_weights(plan.base_model, found)
    if found is None or stated in (None, found):
        return plan
    info = plan.base_model.model_copy(update={"weights_sha256": found})
    return plan.model_copy(
        update={"base_model": info, "provenance": plan.provenance | {"searched_for_weights": stated}}
    )


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`parameters_sha256` of tensors that come one at a time, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.reshape(-1)
        samples = values[:: max(1, -(-values.numel() // _SAMPLES_PER_TENSOR))].to("cpu").to(torch.bfloat16)
        digest.update(samples.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
