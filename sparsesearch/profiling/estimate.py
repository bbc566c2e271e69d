"""What a profile would take, from the model's configuration alone: no weights are read."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
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
_OF_PRODUCTS_CPU, _OF_PRODUCTS_GPU = 0.4, 0.2
"""What a whole profile reached of large matrix products' rate: on two CPU cores, and an 8B model on an H200."""
_LAUNCHES_S = 0.1
"""Of a layer and sequence on a GPU, however small the model: SmolLM2-135M on an H200."""


def estimate(
    source: str,
    space: SearchSpace,
    lengths: Sequence[int],
    *,
    num_samples: int,
    num_probes: int,
    stream: bool = False,
    device: str = "cpu",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Parameters, peak memory, disk and time of a profile; time by a short matrix product on this machine, none for a GPU that is not here.

    For a decoder whose layers are a plain chain, its graph in fp32: one layer's at a time, its inputs in memory, or on disk if `stream`.

    Args:
        source: a model with a config.json.
        space: the candidates.
        lengths: in tokens.
        num_samples: sequences per length.
        num_probes: probes per sequence.
        stream: layers are read one after the other.
        device: where the model is to run.
        dtype: of its weights; `auto` is float32 on a CPU, else the checkpoint's own.
        revision: of a hub model.
        trust_remote_code: run code that a hub repository ships.

    Raises:
        SpecError: the source has no configuration to read (a GGUF file, or no model at all), or a length exceeds its context.
        UnsupportedModelError: its attention has something no rule can express.
    """
    config = _config(source, revision, trust_remote_code)
    check_context(config, lengths)
    parameters = _parameters(config, space, trust_remote_code)
    text = config.get_text_config()
    layers, heads, hidden = text.num_hidden_layers, text.num_attention_heads, text.hidden_size
    longest, candidates = max(lengths), len(space.candidates)
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
    weight_bytes = _weight_bytes(config, device, dtype)
    found = {
        "model": source,
        "parameters": parameters,
        "layers": layers,
        "query_heads": layers * heads,
        "candidates": candidates,
        "lengths_tokens": list(lengths),
        "samples_per_length": num_samples,
        "peak_memory_mib": round(
            (weight_bytes * weights + (0 if stream else inputs) + graph + max(strip, logits)) / _MIB
        ),
        "disk_mib": round((per_sample * num_samples * len(lengths) + waiting) / _MIB, 1),
    }
    return found | _seconds(parameters, text, space, lengths, num_samples, num_probes, device)


def _parameters(config: PreTrainedConfig, space: SearchSpace, trust_remote_code: bool) -> int:
    """How many there are, of a model whose attention a rule can express if the space has any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    if len(space.candidates) > 1:
        with suppress(
            RuntimeError
        ):  # layers that need values, which meta tensors lack, are judged when the model is loaded
            attention_sites(model)
    return sum(parameter.numel() for parameter in model.parameters())


def _seconds(
    parameters: int,
    text: PreTrainedConfig,
    space: SearchSpace,
    lengths: Sequence[int],
    num_samples: int,
    num_probes: int,
    device: str,
) -> dict[str, int]:
    """By its floating-point operations and this machine's rate; nothing of a GPU that is not here."""
    layers, passes = text.num_hidden_layers, 3 + 2 * (num_probes + 2)
    tiles = 2 * passes + 4 + 2 * len(space.candidates) / space.block_tokens
    flops = sum(
        num_samples * length * (2 * parameters * passes + layers * text.hidden_size * length * tiles)
        for length in lengths
    )
    if torch.device(device).type == "cpu":
        return {"time_s_on_this_cpu": round(flops / _cpu_flops_per_s())}
    if not torch.cuda.is_available():
        return {}
    launches_s = _LAUNCHES_S * layers * num_samples * len(lengths)
    return {"time_s_on_this_gpu": round(flops / _gpu_flops_per_s(device) + launches_s)}


def _weight_bytes(config: PreTrainedConfig, device: str, dtype: str) -> int:
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    chosen = own if torch.device(device).type != "cpu" else torch.float32
    return (chosen if dtype == "auto" else getattr(torch, dtype)).itemsize


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
    return _OF_PRODUCTS_CPU * _products_flops_per_s(torch.randn(512, 512))


def _gpu_flops_per_s(device: str) -> float:
    return _OF_PRODUCTS_GPU * _products_flops_per_s(torch.randn(8192, 8192, device=device, dtype=torch.bfloat16))


def _products_flops_per_s(a: Tensor) -> float:
    """A tenth of a second of matrix products."""
    float((a @ a)[0, 0])
    count, start = 0, perf_counter()
    while perf_counter() - start < 0.1:
        float((a @ a)[0, 0])  # waits for the device
        count += 1
    return count * 2 * len(a) ** 3 / (perf_counter() - start)
