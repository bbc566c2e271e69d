"""Where the seconds of a plan's attention go in one prefill: choosing tiles and building schedules, and the kernel itself."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sparsesearch.bench.meter import Stamps, elapsed_s, timed
from sparsesearch.runtime.attention import PROBE_KEYWORD, AttentionCall
from sparsesearch.runtime.backends import serving_kernel
from sparsesearch.runtime.binding import binding_of


def look_inside(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Density, and where the seconds of attention go: choosing tiles and building schedules, and the kernel itself."""
    from sparsesearch.kernels.dispatch import run_schedule
    from sparsesearch.runtime.device_attention import layer_call, places_of
    from sparsesearch.runtime.mask_code import spans_of

    index: Stamps = []
    kernels: Stamps = []
    densities: list[float | Tensor] = []

    def answer(call: AttentionCall) -> Tensor:
        binding = binding_of(call.module)
        assert binding is not None, "the plan is applied"
        q, k, v = call.query, call.key, call.value
        kernel = serving_kernel(binding.backend, q, k, v, binding.block_tokens)
        assert kernel is not None, "a GPU has a kernel"
        scale = q.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        spans = spans_of(None, None, 1, q.shape[2], k.shape[2], binding.block_tokens)
        places, rules = places_of(spans, 1), binding.rules
        assert places is not None, "an unpadded prompt has no gaps"
        layer = layer_call(binding, rules, None, spans, places, q, k, kernel)
        with timed(index, q.device):
            chosen = layer.choose(q, k, scale) if any(rule.dynamic for rule in rules) else []
            schedule = layer.schedule_of(chosen) if chosen else layer.schedule(q, k, scale)
        with timed(kernels, q.device):
            out, _ = run_schedule(q, k, v, schedule, scale=scale, kernel=kernel)
        reachable = len(rules) * int(places[0].grid.num_k_blocks * (places[0].grid.num_k_blocks + 1) / 2)
        densities.append(chosen[0].num_tiles() / reachable if chosen else schedule.density)
        return out.transpose(1, 2).contiguous()

    model(ids, use_cache=False, logits_to_keep=1, **{PROBE_KEYWORD: answer})
    index_s, kernel_s = elapsed_s(index), elapsed_s(kernels)
    mean = sum(float(one) for one in densities) / len(densities)
    return {"density": mean, "index_s": index_s, "kernel_s": kernel_s, "index_share": index_s / (index_s + kernel_s)}
