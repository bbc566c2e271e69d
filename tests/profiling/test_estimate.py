"""What --dry-run says of a large model stands beside what profiling it took."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from sparsesearch.profiling import estimate
from sparsesearch.search_space import SearchSpace

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def llama_8b(tmp_path: Path) -> str:
    """A folder with a configuration and no weights."""
    AutoConfig.for_model("llama", dtype="bfloat16", **LLAMA_8B).save_pretrained(tmp_path)
    return str(tmp_path)


def test_memory_and_time_are_those_of_the_record(llama_8b: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((GOLDEN / "profile_llama3_8b_h200.json").read_text())
    products = json.loads((GOLDEN / "video_h200.json").read_text())["ceilings"]["matmul_flop_per_s"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(estimate, "_gpu_flops_per_s", lambda _: estimate._OF_PRODUCTS_GPU * products)
    needs = estimate.estimate(
        llama_8b, SearchSpace.load("mixture"), [record["length_tokens"]],
        num_samples=record["samples"], num_probes=4, device="cuda",
    )  # fmt: skip
    assert needs["peak_memory_mib"] * 2**20 == pytest.approx(record["peak_bytes"], rel=0.2)
    assert needs["time_s_on_this_gpu"] == pytest.approx(record["profile_s"], rel=0.3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_weights_count_in_their_data_type_and_a_gpu_that_is_not_here_has_no_time(llama_8b: str) -> None:
    def needs(**options: str) -> dict[str, int]:
        return estimate.estimate(
            llama_8b, SearchSpace.load("duo_attention"), [1024], num_samples=1, num_probes=1, **options
        )

    cpu, gpu, cast = needs(), needs(device="cuda"), needs(dtype="float16")
    parameters = cpu["parameters"] / 2**20
    assert cpu["peak_memory_mib"] - gpu["peak_memory_mib"] == pytest.approx(2 * parameters, abs=2)
    assert cast["peak_memory_mib"] == gpu["peak_memory_mib"]
    assert "time_s_on_this_cpu" in cpu
    assert not [name for name in gpu if name.startswith("time")]
