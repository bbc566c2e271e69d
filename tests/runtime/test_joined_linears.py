"""Joined linears compute what they did, alone and in compiled layers, in one product per group."""

import pytest
import torch
from runtime_plans import group_plan, left_padded

import sparsesearch
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.decode_step import DecodeStep
from sparsesearch.runtime.joined_linears import JoinedLinear, join_linears


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_joined_model_decodes_what_it_did(tiny, architecture):
    model = tiny(architecture, num_hidden_layers=3)
    ids, _ = left_padded([40], 64)
    outputs, state = [], {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with sparsesearch.apply(model, group_plan(model, ["stream", "dense"])), torch.no_grad():
            cache = sparsesearch.sparse_cache(model, max_tokens=60)
            first = model(ids, logits_to_keep=1, **{CACHE_KEYWORD: cache}).logits[:, -1]
            products: list[int] = []
            step = DecodeStep(model, cache, first_position=40, compiled=True, backend=counting(products))
            outputs.append([first] + [step(torch.tensor([token])).clone() for token in (3, 5, 7)])
        assert products == [4 if join_linears(model) == 0 else 7]  # q k v, o, gate up, down
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for before, after in zip(*outputs, strict=True):
        torch.testing.assert_close(after, before)
    assert sum(isinstance(module, JoinedLinear) for module in model.modules()) == 15
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def counting(products):
    """A backend that notes how many matrix products a graph has."""

    def backend(graph, _):
        products.append(sum("linear" in str(node.target) for node in graph.graph.nodes))
        return graph

    return backend


def test_what_cannot_be_joined_is_left_alone(tiny):
    assert join_linears(tiny("gpt2")) == 0  # one product already
    assert join_linears(tiny("opt")) == 0  # biases
