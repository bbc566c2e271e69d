"""Tiny models of every family that can be pruned, and cuts of them."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from sparsesearch.cut import Cut
from sparsesearch.runtime.shrink import layer_cut
from sparsesearch.runtime.sublayers import layers_of

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
TEXT = {"vocab_size": 64, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
GQA = {**SIZES, **TEXT, "num_key_value_heads": 2, "head_dim": 8}
CLASSES = {
    "llama": ("LlamaForCausalLM", GQA),
    "qwen2": ("Qwen2ForCausalLM", GQA),
    "qwen3": ("Qwen3ForCausalLM", GQA),
    "mistral": ("MistralForCausalLM", GQA),
    "bert": ("BertModel", {**SIZES, **TEXT}),
    "vit": ("ViTForImageClassification", {**SIZES, "image_size": 32, "patch_size": 8, "num_labels": 5}),
}
DECODERS = ("llama", "qwen2", "qwen3", "mistral")


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random four-layer model in evaluation mode."""
    name, settings = CLASSES[family]
    config = transformers.AutoConfig.for_model(family, **{**settings, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, name)(config)
    return model.eval()


def batches_for(
    model: PreTrainedModel, *, count: int = 3, items: int = 2, tokens: int = 33, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Random inputs; encoders get padding."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return [{"pixel_values": torch.randn(items, 3, 32, 32, generator=generator)} for _ in range(count)]
    found = []
    for _ in range(count):
        batch = {"input_ids": torch.randint(1, 64, (items, tokens), generator=generator)}
        if not model.can_generate():
            mask = torch.ones(items, tokens, dtype=torch.long)
            mask[0, tokens // 2 :] = 0
            batch["attention_mask"] = mask
        found.append(batch)
    return found


def ragged_cut(model: PreTrainedModel) -> Cut:
    """No attention in layer 0, other widths in layer 1, no FFN and thinner groups in layer 2, layer 3 whole."""
    layers = layers_of(model)
    size = layers[0].num_heads // layers[0].num_kv_heads
    return Cut(
        layers={
            0: layer_cut(layers[0], heads=(0, 1, 2, 3)),
            1: layer_cut(layers[1], heads=tuple(range(size)), channels=tuple(range(0, 14, 2))),
            2: layer_cut(layers[2], heads=(1, 2) if size > 1 else (2,), channels=tuple(range(48))),
        }
    )


def zeroed(model: PreTrainedModel, cut: Cut) -> None:
    """The same cut by hand: outgoing columns become zero."""
    for index, own in cut.layers.items():
        layer = layers_of(model)[index]
        out = layer.projection(layer.attention.out).weight.data.unflatten(1, (layer.num_heads, -1))
        out[:, list(own.removed_heads)] = 0
        layer.projection(layer.feed_forward.out).weight.data[:, list(own.removed_channels)] = 0
