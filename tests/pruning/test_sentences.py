"""Sentences for text encoders: different ones, none of them held out, in batches of about equal length."""

import json

import torch
from pruning_models import tiny_model
from test_encoders import WORDS, text_encoder

from sparsesearch.pruning.data import load_batches
from sparsesearch.pruning.models import load_prunable

LENGTH = 16


def rows(batches):
    """Every sentence as its real tokens."""
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def lines_of_unequal_length(folder, count):
    """Sentences of five to twelve words, the shortest of which stands in every document."""
    generator = torch.Generator().manual_seed(1)
    texts = []
    for _ in range(count):
        drawn = torch.randint(len(WORDS), (int(torch.randint(5, 13, (1,), generator=generator)),), generator=generator)
        texts.append("The " + " ".join(WORDS[index] for index in drawn) + ".\n\nThe same five words everywhere.")
    path = folder / "unequal.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_no_sentence_is_in_both_splits_and_little_is_padded(tmp_path):
    text_encoder(tmp_path)
    data = str(lines_of_unequal_length(tmp_path, 800))
    model, tokenizer = load_prunable(tmp_path / "model")
    asked = {"length_tokens": LENGTH, "seed": 0}
    calibration = load_batches(model, tokenizer, data, num_samples=500, **asked)
    held_out = load_batches(model, tokenizer, data, num_samples=150, split="heldout", **asked)
    assert len(rows(calibration)) == 500
    assert len(rows(held_out)) == 150
    everywhere = tuple(tokenizer("The same five words everywhere.")["input_ids"])
    assert everywhere not in rows(calibration)
    real, padded = (sum(int(tensor.sum()) for tensor in found) for found in (
        [batch["attention_mask"] for batch in calibration], [torch.ones_like(batch["input_ids"]) for batch in calibration]
    ))  # fmt: skip
    assert padded <= 1.1 * real
    sizes = [batch["input_ids"].shape[1] for batch in calibration]
    assert sizes != sorted(sizes), "batches come in no order of length"
    again = load_batches(model, tokenizer, data, num_samples=500, **asked)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(calibration, again, strict=True))


def test_a_layer_run_in_part_is_the_whole_layer_up_to_there():
    from pruning_models import batches_for

    from sparsesearch.pruning.compensate import _run, _start
    from sparsesearch.runtime.sublayers import layers_of

    for family in ("bert", "qwen3", "vit"):
        model = tiny_model(family)
        layers = layers_of(model)
        stream = _start(model, layers, batches_for(model)[0], 1)
        with torch.no_grad():
            whole = _run(layers[1], stream.dense, stream.kwargs[1])
            for kind, layout in layers[1].sublayers:
                for names in (layout.into, (layout.out,)):
                    part = _run(layers[1], stream.dense, stream.kwargs[1], until=names)
                    assert all(torch.equal(part.entering[name], whole.entering[name]) for name in names)
                    assert layout.out not in part.leaving
                    if kind in part.residual:
                        assert torch.equal(part.residual[kind], whole.residual[kind])
