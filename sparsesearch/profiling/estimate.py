"""What a profile would take, from the model's configuration alone: no weights are read."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from sparsesearch.calibration import check_context
from sparsesearch.errors import SpecError
from sparsesearch.presets import preset_names, preset_path
from sparsesearch.profiling.losses import CHUNK_LOGITS, LEAST_ROWS
from sparsesearch.runtime.fingerprint import attention_sites
from sparsesearch.search_space import SearchSpace

_MIB = 1 << 20
# Tensors of [S, hidden] that autograd keeps of one layer of a decoder (norms, projections, gated MLP at 2.75 x hidden three times), counted on
# Llama: 6 of the attention's size and 3 of the MLP's.
_ACTIVATIONS_PER_LAYER = 6 + 3 * 2.75


def estimate(
    source: str,
    space: SearchSpace,
    lengths: Sequence[int],
    *,
    num_samples: int,
    num_probes: int,
    stream: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Parameters, peak memory, disk and time of a profile; time by a short matrix product on this machine's CPU.

    For a decoder whose layers are a plain chain, in fp32: one layer's graph at a time, its inputs in memory, or on disk if `stream`.

    Raises:
        SpecError: the source has no configuration to read (a GGUF file, or no model at all), or a length exceeds its context.
        UnsupportedModelError: its attention has something no rule can express.
    """
    config = _config(source, revision, trust_remote_code)
    check_context(config, lengths)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    if len(space.candidates) > 1:
        with suppress(
            RuntimeError
        ):  # layers that need values, which meta tensors lack, are judged when the model is loaded
            attention_sites(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = config.get_text_config()
    layers, heads, hidden = text.num_hidden_layers, text.num_attention_heads, text.hidden_size
    longest, candidates, passes = max(lengths), len(space.candidates), 3 + 2 * (num_probes + 2)
    state = 4 * longest * hidden  # [S, hidden]
    losses = num_probes + 2
    graph = state * (_ACTIVATIONS_PER_LAYER + 4 + 3 * losses)  # q, k, v, o; gradients before, after and at attention
    strip = 4 * heads * space.block_tokens * (longest + candidates * hidden // heads) * 2
    logits = 4 * text.vocab_size * min(longest, max(LEAST_ROWS, CHUNK_LOGITS // text.vocab_size)) * 4
    inputs = state * (layers + 1)
    outside = text.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    weights = outside + (parameters - outside) // layers if stream else parameters
    waiting = inputs * num_samples * len(lengths) if stream else 0
    per_sample = 4 * layers * heads * (candidates * (num_probes + 5) + 2 * (longest // space.block_tokens) ** 2)
    flops = sum(
        num_samples
        * length
        * (2 * parameters * passes + layers * hidden * length * (2 * passes + 4 + 2 * candidates / space.block_tokens))
        for length in lengths
    )
    return {
        "model": source,
        "parameters": parameters,
        "layers": layers,
        "query_heads": layers * heads,
        "candidates": candidates,
        "lengths_tokens": list(lengths),
        "samples_per_length": num_samples,
        "peak_memory_mib": round((4 * weights + (0 if stream else inputs) + graph + max(strip, logits)) / _MIB),
        "disk_mib": round((per_sample * num_samples * len(lengths) + waiting) / _MIB, 1),
        "time_s_on_this_cpu": round(flops / _cpu_flops_per_s()),
    }


def _config(source: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    if source.endswith(".gguf"):
        raise SpecError(
            f"--dry-run must have a config.json to read, but {source} is a GGUF file. Run without --dry-run."
        )
    where: str | Path = preset_path("models", source) if source in preset_names("models") else source
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            where, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise SpecError(f"{source} must be a model with a config.json, but: {str(error).splitlines()[0]}") from error
    return config


def _cpu_flops_per_s() -> float:
    """A tenth of a second of fp32 matrix products, derated to what whole models reach."""
    a = torch.randn(512, 512)
    (a @ a).sum()
    count, start = 0, perf_counter()
    while perf_counter() - start < 0.1:
        a @ a  # timed, its value unused
        count += 1
    return 0.4 * count * 2 * 512**3 / (perf_counter() - start)
