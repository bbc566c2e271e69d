"""A GGUF file gives the same weights however often it is parsed, is parsed once, and gguf is as before afterwards."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsesearch.errors import ArtifactError
from sparsesearch.runtime.gguf_reading import parsed_once
from sparsesearch.runtime.loading import load_model, load_weights

gguf = pytest.importorskip("gguf")
WIDTH, HEADS, CHANNELS, VOCABULARY = 32, 4, 48, 64
SHAPES = {
    "token_embd": (VOCABULARY, WIDTH),
    "output_norm": (WIDTH,),
    **{f"blk.{layer}.{name}_norm": (WIDTH,) for layer in (0, 1) for name in ("attn", "ffn")},
    **{f"blk.{layer}.attn_{name}": (WIDTH, WIDTH) for layer in (0, 1) for name in ("q", "k", "v", "output")},
    **{f"blk.{layer}.ffn_{name}": (CHANNELS, WIDTH) for layer in (0, 1) for name in ("gate", "up")},
    **{f"blk.{layer}.ffn_down": (WIDTH, CHANNELS) for layer in (0, 1)},
}


@pytest.fixture
def file(tmp_path):
    """A Llama of two layers with packed matrices."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(CHANNELS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_layer_norm_rms_eps(1e-5)
    generator = torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        values = torch.randn(shape, generator=generator).numpy()
        if len(shape) == 1 or shape[-1] % 32:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_weights_are_equal_and_the_file_is_parsed_once(file, monkeypatch):
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    read = gguf.GGUFReader._build_fields
    parsed = []
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", lambda self, *args: parsed.append(self) or read(self, *args))
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    found = load_weights(file)
    assert len(parsed) == 1, "config and weights share it"
    with parsed_once():
        again, more = load_weights(file), load_weights(file)
    assert len(parsed) == 2, "so do loads inside another one"
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    wanted = reference.state_dict()
    assert len(wanted) == len(SHAPES) + 1, "the head is tied"
    for model in (found, again, more):
        state = model.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


def test_gguf_is_as_before_after_a_failure(file):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ArtifactError, match=r"tiny\.gguf"):
        load_model(file)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
