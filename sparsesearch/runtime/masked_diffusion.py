"""Masked diffusion language models: bidirectional transformers models that fill in masked tokens over several steps, under a step schedule.

The model goes through transformers' AttentionInterface (EuroBERT, BERT, ESM and others whose attention says `is_causal = False`); a prompt comes
first and the generation behind it. The caller says at which step a forward pass is: no pipeline of transformers does.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparsesearch.errors import PlanMismatchError, SparseSearchError, SpecError, UnsupportedModelError
from sparsesearch.kernels.dispatch import Backend
from sparsesearch.layout import Layout
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.runtime.configuration import implementation_of
from sparsesearch.runtime.denoising_call import Call
from sparsesearch.runtime.diffusion.attention import Probe, SparseLayer
from sparsesearch.runtime.fingerprint import weights_sha256
from sparsesearch.runtime.removable import Removable

NAME = "sparsesearch_masked_diffusion"
_LAYER = "sparsesearch_masked_layer"
_met: ContextVar[dict[int, tuple[int, int, int]] | None] = ContextVar("met", default=None)


@dataclass
class MaskedDenoiser:
    """A bidirectional language model with a prompt of fixed length.

    Attributes:
        model: in evaluation mode.
        prompt_tokens: tokens that are given; those behind them are generated. 0: all are.
        current: the call in progress.
    """

    model: PreTrainedModel
    prompt_tokens: int
    current: Call | None = field(default=None, repr=False)

    def logits(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        step: tuple[int, int] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
        pass_name: str = "",
        chunk: int | None = None,
    ) -> Float[Tensor, "B T V"]:
        """One forward pass.

        Args:
            input_ids: tokens, masked ones included.
            step: index of the denoising step and number of steps; plans with a schedule need it.
            attention_mask: 1 for real tokens; padding stands at the end.
            pass_name: which of the calls of one step, such as guidance without the prompt.
            chunk: the block that is generated, where one after another is; schedules with budgets per chunk need it.

        Raises:
            SpecError: nothing would be left to generate.
            UnsupportedModelError: padding stands elsewhere.
        """
        self.current = Call(self.layout(input_ids.shape[1]), _lengths(attention_mask), step, pass_name, chunk)
        try:
            found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        finally:
            self.current = None
        return found

    def layout(self, tokens: int) -> Layout:
        """Prompt, then generation.

        Raises:
            SpecError: the prompt leaves nothing to generate.
        """
        if tokens <= self.prompt_tokens:
            raise SpecError(
                f"a sequence must be longer than its prompt of {self.prompt_tokens} tokens, but has {tokens}. Append masked tokens."
            )
        segments = [{"kind": "generation", "shape": (tokens - self.prompt_tokens,)}]
        if self.prompt_tokens:
            segments.insert(0, {"kind": "prompt", "shape": (self.prompt_tokens,)})
        return Layout.model_validate({"segments": segments})


@dataclass(frozen=True)
class MaskedSite:
    """One attention module."""

    path: str
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int


def masked_sites(denoiser: MaskedDenoiser) -> tuple[MaskedSite, ...]:
    """The attention modules in module order, as a forward pass of two tokens meets them.

    Raises:
        UnsupportedModelError: none goes through transformers' AttentionInterface, or one is causal.
    """
    model, before = denoiser.model, implementation_of(denoiser.model.config)
    token = _met.set({})
    try:
        model.set_attn_implementation(NAME)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
        met = _met.get() or {}
    finally:
        _met.reset(token)
        model.set_attn_implementation(before)
    sites = tuple(
        MaskedSite(path, module, *met[id(module)]) for path, module in model.named_modules() if id(module) in met
    )
    if not sites or any(getattr(site.module, "is_causal", True) for site in sites):
        found = "its attention is causal" if sites else "no call arrived"
        raise UnsupportedModelError(
            f"{type(model).__name__} must be bidirectional and route its attention through transformers' AttentionInterface, but {found}."
        )
    return sites


def describe_masked(denoiser: MaskedDenoiser, name_or_path: str) -> BaseModelInfo:
    """Attention modules and a fingerprint of the weights."""
    sites = masked_sites(denoiser)
    return BaseModelInfo(
        name_or_path=name_or_path,
        model_type=denoiser.model.config.model_type,
        modules=tuple(site.path for site in sites),
        num_heads=tuple(site.num_heads for site in sites),
        num_kv_heads=tuple(site.num_kv_heads for site in sites),
        head_dim=tuple(site.head_dim for site in sites),
        weights_sha256=weights_sha256(denoiser.model),
    )


class AppliedMasked(Removable):
    """A plan on a masked diffusion model. Use it as a context manager, or keep it and call `remove`, which may be called twice.

    Attributes:
        denoiser: the model.
        plan: the plan.
        layers: path of an attention module -> what answers its calls.
    """

    def __init__(self, denoiser: MaskedDenoiser, plan: Plan, backend: Backend) -> None:
        self.denoiser, self.plan = denoiser, plan
        sites = masked_sites(denoiser)
        info = plan.base_model
        wanted = list(zip(info.modules, info.num_heads, info.num_kv_heads, info.head_dim, strict=True))
        found = [(site.path, site.num_heads, site.num_kv_heads, site.head_dim) for site in sites]
        if wanted != found:
            raise PlanMismatchError(
                f"the plan must be for these {len(found)} attention modules, but was made for {info.name_or_path!r} with {len(wanted)} or "
                "others. Give the model the plan was made for."
            )
        if any(_LAYER in site.module.__dict__ for site in sites):
            raise SpecError(
                "a masked diffusion model can run one plan at a time, but one is applied already. Remove it first."
            )
        self._sites, self._implementation, self._active = sites, implementation_of(denoiser.model.config), True
        self.layers = {site.path: SparseLayer(site.path, plan, denoiser, backend) for site in sites}
        for site in sites:
            site.module.__dict__[_LAYER] = self.layers[site.path]
        denoiser.model.set_attn_implementation(NAME)

    def probe(self, probe: Probe | None) -> None:
        """Show every attention call to `probe`, keys repeated to the query heads; what it returns, if anything, replaces the output."""
        for layer in self.layers.values():
            layer.probe = probe

    def remove(self) -> None:
        """Restore the model exactly as it was before."""
        if not self._active:
            return
        self._active = False
        for site in self._sites:
            site.module.__dict__.pop(_LAYER, None)
        self.denoiser.model.set_attn_implementation(self._implementation)


def masked_attention_call(
    module: nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B G T D"],
    value: Float[Tensor, "B G T D"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """Answer transformers' attention call.

    Raises:
        SparseSearchError: no plan is on the module.
    """
    met = _met.get()
    layer: SparseLayer | None = module.__dict__.get(_LAYER)
    if met is not None:
        met[id(module)] = query.shape[1], key.shape[1], query.shape[3]
    elif layer is None:
        raise SparseSearchError(
            f"{type(module).__name__} must have a plan on it while attn_implementation={NAME!r}, but has none. Use `apply_masked`."
        )
    else:
        group = query.shape[1] // key.shape[1]
        if layer.probe is not None and group > 1:
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        output = layer(query, key, value, attention_mask, scaling)
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
        if layer.probe is not None and group > 1:
            key, value = key[:, ::group], value[:, ::group]
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)


def _lengths(attention_mask: Tensor | None) -> tuple[int, ...] | None:
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if not bool((attention_mask.long().diff(dim=1) <= 0).all()):
        raise UnsupportedModelError(
            "attention_mask must mark the first tokens of each sequence as real and the padding behind them, but has holes. Pad on the right."
        )
    return tuple(attention_mask.sum(1).tolist())


AttentionInterface.register(NAME, masked_attention_call)
AttentionMaskInterface.register(NAME, sdpa_mask)
