"""A multimodal model: its text part runs the plan, its vision part stays as it was."""

import pytest
import torch
from runtime_plans import group_plan, left_padded
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import sparsesearch
from sparsesearch.runtime.binding import binding_of
from sparsesearch.runtime.cache import PlanCacheLayer
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD


@pytest.fixture
def llava():
    text = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=64,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=63, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def logits(model):
    ids, mask = left_padded((100, 60), 63)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids[:, -20:-16] = 63
    with torch.no_grad():
        return model(ids, attention_mask=mask, pixel_values=pixels).logits


def test_only_the_text_part_is_sparse_and_all_is_restored(llava):
    before, config = logits(llava), llava.config.to_json_string()
    with sparsesearch.apply(llava, group_plan(llava, ["stream", "zero", "elastic"])):
        assert llava.config.vision_config._attn_implementation == "sdpa"
        assert llava.config.text_config._attn_implementation == "sparsesearch"
        assert not torch.equal(logits(llava), before)
        ids, mask = left_padded((40, 20), 63)
        cache = llava.generate(ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True)[CACHE_KEYWORD]
        assert any(isinstance(layer, PlanCacheLayer) for layer in cache.layers)
    assert torch.equal(logits(llava), before)
    assert llava.config.to_json_string() == config


def test_saving_and_loading_keeps_the_plan_on_the_text_part(llava, tmp_path):
    with sparsesearch.apply(llava, group_plan(llava, ["stream", "zero", "elastic"])):
        expected = logits(llava)
        llava.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(loaded), expected)
    assert sum(binding_of(module) is not None for module in loaded.modules()) == 2
    assert loaded.config.vision_config._attn_implementation == "sdpa"
