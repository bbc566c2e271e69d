"""The whole corridor through the command line on a vision model and a text encoder made here: profile, search, apply, verify, heal."""

import json

import pytest
import torch
from pruning_models import tiny_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from sparsesearch.pruning.data import load_batches
from sparsesearch.pruning.models import load_prunable
from sparsesearch.pruning.quality import dense_rows, mean_distance

WORDS = [
    "the",
    "a",
    "model",
    "layer",
    "head",
    "token",
    "mask",
    "plan",
    "value",
    "key",
    "query",
    "tile",
    "budget",
    "cost",
    "time",
    "of",
    "in",
    "and",
    "for",
    "with",
]


@pytest.fixture
def command():
    """Runs a command and returns what it printed as JSON."""
    from sparsesearch_cli.main import app

    def run(*arguments):
        found = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert found.exit_code == 0, found.output
        return json.loads(found.stdout)

    return run


def text_encoder(folder):
    """A BERT whose vocabulary is a few words, with its tokenizer, and a file of sentences in those words."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    whole.save_pretrained(folder / "model")
    tiny_model("bert").save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    sentences = [
        "The " + " ".join(WORDS[index] for index in torch.randint(len(WORDS), (9,), generator=generator)) + "."
        for _ in range(400)
    ]
    paragraphs = [" ".join(sentences[first : first + 8]) for first in range(0, 400, 8)]
    data = folder / "sentences.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    return data


def vision_model(folder):
    """A ViT and a file of images."""
    tiny_model("vit").save_pretrained(folder / "model")
    pixels = torch.randn(96, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_file({"pixel_values": pixels}, folder / "images.safetensors")
    return folder / "images.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(("make", "steps"), [(text_encoder, 30), (vision_model, 4)])  # the images are few
def test_profile_search_apply_verify_heal(make, steps, command, tmp_path):
    data, base, profile = make(tmp_path), tmp_path / "model", tmp_path / "profile"
    common = ("--space", "pruning", "--data", data, "--lengths", "32", "--num-samples", "64", "--num-probes", "2")
    assert command("profile", base, *common, "-o", profile)["layers"] == 4
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    found = command(
        "search", profile, "--budget", "flops=0.75x", "--lengths", "17", "--refit-samples", "64", "-o", plan
    )
    assert found["budgets"][0]["predicted"]["17"] <= 0.75
    assert command("apply", plan, base, "-o", out)["layout"] == "per layer"
    assert command("verify", out)["problems"] == []
    dense, tokenizer = load_prunable(base)
    held_out = load_batches(dense, tokenizer, str(data), length_tokens=32, num_samples=20, seed=0, split="heldout")
    rows = dense_rows(dense, held_out)
    bare = tmp_path / "bare"
    command(
        "search",
        profile,
        "--budget",
        "flops=0.75x",
        "--lengths",
        "17",
        "--refit-samples",
        "0",
        "-o",
        plan,
        "--overwrite",
    )
    command("apply", plan, base, "-o", bare)
    repaired, cut = (mean_distance(load_prunable(place)[0], held_out, rows) for place in (out, bare))
    assert 0 < repaired < cut
    settings = ("--steps", steps, "--data", data, "--length", "32", "--num-sequences", "16", "--batch", "32")
    settings += ("--optimiser", "adamw", "--learning-rate", "2e-4")
    healed = command("heal", out, "--teacher", base, "-o", tmp_path / "healed", *settings)
    assert healed["loss_dense"] is None
    assert healed["distance_after"] < healed["distance_before"]
    assert command("verify", tmp_path / "healed")["problems"] == []
