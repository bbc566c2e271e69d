"""How long a profile takes and how much memory it needs: of a model, or of a named shape with random weights.

    python -m sparsesearch.bench.profiling SmolLM2-135M-Instruct.Q4_1.gguf --length 4096 --samples 6 --json OUT
    python -m sparsesearch.bench.profiling llama3-8b --length 8192 --samples 8 --json OUT
    python -m sparsesearch.bench.profiling llama3-70b --stream --layers 4 --length 4096 --samples 2 --json OUT

Streamed, the shape's weights are first written to disk in bf16, at fewer layers where the disk is short of all; memory does not depend on their number.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparsesearch import calibration
from sparsesearch.bench.meter import emptied, peak_bytes, synchronize
from sparsesearch.bench.random_model import random_model
from sparsesearch.model_shapes import MODEL_SHAPES, ModelShape
from sparsesearch.profiling.record import device_name
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.profiling.streamed_model import open_streamed
from sparsesearch.profiling.streaming import profile_streamed
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.loading import load_model, load_tokenizer
from sparsesearch.search_space import SearchSpace

_SCALE = 0.02  # of random weights, as released models start


def write_random_checkpoint(shape: ModelShape, folder: Path, *, device: str = "cpu") -> None:
    """A checkpoint of that shape with random bf16 weights, one file per layer; the device draws them."""
    config = AutoConfig.for_model(shape.model_type, **shape.config_settings(), dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator(device=device).manual_seed(0)
    files: dict[str, list[str]] = {}
    for name in names:
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"part-{part}.safetensors", []).append(name)
    for file, inside in files.items():
        drawn = {}
        for name in inside:
            weight = torch.empty(names[name], dtype=torch.bfloat16, device=device)
            norm = weight.dim() == 1
            drawn[name] = (weight.fill_(1) if norm else weight.normal_(0, _SCALE, generator=generator)).cpu()
        save_file(drawn, folder / file)
    table = {name: file for file, inside in files.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def profile_resident(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    menu: SearchSpace,
    *,
    length: int,
    samples: int,
    folder: Path,
) -> dict[str, Any]:
    """Profile a live model.

    Returns:
        Seconds, and bytes: resident before, and the most that was allocated.
    """
    data = calibration.load("needle", tokenizer, length_tokens=length, num_samples=samples, seed=0)
    emptied(model.device)
    resident, start = peak_bytes(model.device), perf_counter()
    profile_model(model, Request(describe(model, "bench"), menu, {length: data}), folder)
    return _figures(model.device, start, resident)


def profile_from_disk(
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerBase,
    menu: SearchSpace,
    *,
    length: int,
    samples: int,
    device: str,
    folder: Path,
) -> dict[str, Any]:
    """Profile a checkpoint layer by layer; resident is what is there besides one layer. Returns as `profile_resident`."""
    data = calibration.load("needle", tokenizer, length_tokens=length, num_samples=samples, seed=0)
    place = torch.device(device)
    emptied(place)
    opening = perf_counter()
    streamed = open_streamed(checkpoint, device=device, dtype="bfloat16")
    start, resident = perf_counter(), peak_bytes(place)
    profile_streamed(streamed, Request(streamed.info, menu, {length: data}), folder)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return _figures(place, start, resident) | {"open_s": start - opening, "checkpoint_bytes": size}


def _figures(device: torch.device, start: float, resident: int) -> dict[str, Any]:
    synchronize(device)
    return {"profile_s": perf_counter() - start, "resident_bytes": resident, "peak_bytes": peak_bytes(device)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a named shape, or a model to load")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--space", default="mixture")
    parser.add_argument("--stream", action="store_true", help="of a shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where weights and profile are written; removed afterwards")
    return parser.parse_args()


def main() -> None:
    """Command line."""
    options = _options()
    menu = SearchSpace.load(options.space)
    sizes = {"length": options.length, "samples": options.samples}
    shape = MODEL_SHAPES.get(options.model)
    if shape is not None:
        shape = replace(shape, num_layers=options.layers or shape.num_layers)
    with TemporaryDirectory(dir=options.folder) as name:
        folder, start = Path(name), perf_counter()
        tokenizer = load_tokenizer("needle-7m" if shape is not None else options.model)
        if shape is None:
            model, _ = load_model(options.model, device=options.device, dtype="bfloat16")
            ready_s = perf_counter() - start
            found = profile_resident(model, tokenizer, menu, folder=folder / "profile", **sizes)
        elif options.stream:
            write_random_checkpoint(shape, folder / "model", device=options.device)
            ready_s = perf_counter() - start
            found = profile_from_disk(
                folder / "model", tokenizer, menu, device=options.device, folder=folder / "profile", **sizes
            )
        else:
            model = random_model(shape, device=options.device)
            ready_s = perf_counter() - start
            found = profile_resident(model, tokenizer, menu, folder=folder / "profile", **sizes)
    found |= {
        "model": Path(options.model).name,
        "layers": None if shape is None else shape.num_layers,
        "length_tokens": options.length,
        "samples": options.samples,
        "candidates": len(menu.candidates),
        "space": menu.name,
        "streamed": options.stream,
        "ready_s": ready_s,
        "device": device_name(options.device),
        "torch": torch.__version__,
    }
    text = json.dumps(found, indent=1, sort_keys=True)
    sys.stdout.write(f"{text}\n")
    if options.json is not None:
        options.json.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
