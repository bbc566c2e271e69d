"""Calibration batches for whatever the model reads: token windows, padded sentences, or images."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from sparsesearch import calibration
from sparsesearch.calibration.samples import Split
from sparsesearch.calibration.sources import documents
from sparsesearch.cut import Compensation
from sparsesearch.errors import ArtifactError, SpecError
from sparsesearch.pruning.quality import Batch

T = TypeVar("T")
SENTENCES_PER_BATCH = 32
"""What a text encoder reads at once."""
_SORTED_TOGETHER = 64
"""Batches among which texts are sorted by length."""
IMAGES_PER_BATCH = 8
_WINDOWS_PER_PASS = 4


def load_batches(
    model: PreTrainedModel,
    tokenizer: Any,
    spec: str,
    *,
    length_tokens: int,
    num_samples: int,
    seed: int,
    split: Split = "calibration",
) -> list[Batch]:
    """Batches for a model.

    Causal language models read windows of text (`calibration.load`), text encoders read sentences of at most `length_tokens`
    (and, where a calibration split has fewer than asked for, passages of it), vision models
    read the tensor `pixel_values` of a safetensors file (its last quarter is held out).

    Args:
        model: decides which of the three.
        tokenizer: the model's; None for vision models.
        spec: calibration spec, or a `.safetensors` file of images.
        length_tokens: of a window, or at most of a sentence.
        num_samples: windows, sentences or images.
        seed: of what is drawn.
        split: which part of the data.

    Raises:
        SpecError: too little data, or a spec of the wrong kind.
        ArtifactError: a file is missing or damaged.
    """
    if model.main_input_name == "pixel_values":
        return _images(spec, num_samples, seed, split)
    if tokenizer is None:
        raise SpecError(f"{type(model).__name__} reads tokens, so its folder must hold a tokenizer, but has none.")
    if model.can_generate():
        found = calibration.load(
            spec, tokenizer, length_tokens=length_tokens, num_samples=num_samples, seed=seed, split=split
        )
        return [{"input_ids": sample.input_ids[None]} for sample in found.samples]
    return _sentences(tokenizer, spec, length_tokens, num_samples, seed, split)


def compensation_batches(model: PreTrainedModel, tokenizer: Any, spec: Compensation) -> list[Batch]:
    """The data that a plan's refit asks for; windows in fours, which a pass serves together."""
    found = load_batches(
        model, tokenizer, spec.data, length_tokens=spec.length_tokens, num_samples=spec.num_samples, seed=spec.seed
    )
    return stacked(found, _WINDOWS_PER_PASS) if model.can_generate() else found


def stacked(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Batches whose items have equal shapes, `size` at a time as one."""
    return [
        {name: torch.cat([batch[name] for batch in part]) for name in part[0]}
        for part in (batches[first : first + size] for first in range(0, len(batches), size))
    ]


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer in a model's folder or on the hub; None where there is none (vision models)."""
    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, KeyError):
        return None


def _sentences(tokenizer: Any, spec: str, length: int, count: int, seed: int, split: Split) -> list[Batch]:
    """Different sentences, none of them in both splits; for calibration, passages make up for what a small corpus lacks."""
    texts = list(documents(spec, split))
    different = {text for document in texts for text in split_sentences(document)}
    if split == "calibration":
        different -= {text for document in documents(spec, "heldout") for text in split_sentences(document)}
    found = sorted(different)
    if (len(found) < count and split == "heldout") or not found:
        raise SpecError(
            f"{spec} must hold at least {count} different sentences, but its {split} split has {len(found)}. Ask for fewer."
        )
    rng = np.random.default_rng([seed, split == "heldout"])
    chosen = [found[index] for index in rng.permutation(len(found))[:count]]
    chosen += _passages(texts, count - len(chosen), rng)
    order = rng.permutation(count) if count > len(found) else range(count)
    whole = tokenizer([chosen[index] for index in order], truncation=True, max_length=length)["input_ids"]
    parts = _of_equal_length([chosen[index] for index in order], [len(ids) for ids in whole])
    batches: list[Batch] = []
    for part in (parts[index] for index in rng.permutation(len(parts))):
        encoded = tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt")
        batches.append(
            {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded}
        )
    return batches


def _of_equal_length(texts: list[str], tokens: list[int]) -> list[list[str]]:
    """Batches of texts of about the same length, so that little is padded."""
    places = range(len(texts))
    return [
        [texts[index] for index in part]
        for some in _chunks(places, _SORTED_TOGETHER * SENTENCES_PER_BATCH)
        for part in _chunks(sorted(some, key=tokens.__getitem__), SENTENCES_PER_BATCH)
    ]


def _passages(texts: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Runs of five to sixty words from random places."""
    words = [word for text in texts for word in text.split()]
    sizes = rng.integers(5, 61, count)
    starts = (rng.random(count) * np.maximum(1, len(words) - sizes)).astype(np.int64)
    return [" ".join(words[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def split_sentences(document: str) -> Iterator[str]:
    """Sentences of at least five words, on one line, of a plain text."""
    for paragraph in re.split(r"\n\s*\n", document):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            if 5 <= len(sentence.split()) <= 60:
                yield sentence


def _images(spec: str, count: int, seed: int, split: Split) -> list[Batch]:
    path = Path(spec)
    if path.suffix != ".safetensors":
        raise SpecError(
            f"a vision model's data must be a .safetensors file with `pixel_values`, but got {spec!r}. Pass --data FILE."
        )
    try:
        pixels = load_file(path)["pixel_values"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{path} must hold a tensor `pixel_values`, but cannot be read so: {error}.") from error
    border = len(pixels) * 3 // 4
    own = pixels[:border] if split == "calibration" else pixels[border:]
    if len(own) < count:
        raise SpecError(
            f"{path} must hold at least {count} images in its {split} part, but holds {len(own)}. Ask for fewer."
        )
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))[:count]
    return [{"pixel_values": own[part]} for part in order.split(IMAGES_PER_BATCH)]


def _chunks(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[first : first + size] for first in range(0, len(values), size)]
