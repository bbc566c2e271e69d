"""Seeded generators, tiny models built from config, and the embedded model. No download."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning OpenMP threads starve a small machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, which transformers may do

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

torch.set_num_threads(1)
# no test fails by chance or because the machine is slow
hypothesis.settings.register_profile("same everywhere", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same everywhere")
transformers.utils.logging.disable_progress_bar()
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from quick_interpreter import patch_once_per_launch

    patch_once_per_launch()

NEEDLE_7M = str(files("sparsesearch") / "presets" / "models" / "needle-7m")

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 512,
}
_GQA = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
_NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "qwen3": {**_GQA, "head_dim": 16},
    "mistral": {**_GQA, "sliding_window": 24},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 512},
    "phi": {**_GQA, "partial_rotary_factor": 0.5},
    "gpt_neox": {**_SIZES, "intermediate_size": 48},
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}


def build_tiny(architecture: str, **changes: Any) -> PreTrainedModel:
    """A random two-layer model; weights large enough that attention matters, and no token ends a generation."""
    settings = {**TINY_CONFIGS[architecture], **_NO_SPECIAL, "initializer_range": 0.2, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(architecture, **settings)).eval()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    return build_tiny


@pytest.fixture(params=sorted(TINY_CONFIGS))
def any_tiny(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Every architecture in turn."""
    return build_tiny(request.param)


@pytest.fixture
def needle_7m() -> PreTrainedModel:
    """A fresh copy of the embedded model in float32."""
    return AutoModelForCausalLM.from_pretrained(NEEDLE_7M, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def needle_7m_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(NEEDLE_7M)
