import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsesearch.errors import SpecError
from sparsesearch.model_shapes import MODEL_SHAPES, model_shape

RELEASED_PARAMETERS = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "qwen3-4b": 4_022_468_096,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", sorted(MODEL_SHAPES))
def test_parameters_are_those_of_the_model_that_transformers_builds(name):
    shape = model_shape(name)
    config = AutoConfig.for_model(shape.model_type, **shape.config_settings())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters == RELEASED_PARAMETERS[name]
    )
    geometry = shape.geometry
    assert len(geometry.modules) == shape.num_layers
    for path in geometry.modules:
        attention = model.get_submodule(path)
        assert attention.q_proj.weight.shape == (shape.num_heads * shape.head_dim, shape.hidden_size)
        assert attention.k_proj.weight.shape == (shape.num_kv_heads * shape.head_dim, shape.hidden_size)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(SpecError, match="llama3-8b"):
        model_shape("lama3-8b")
