"""How long a profile takes and how much memory it needs, on a named shape with random weights.

    python -m sparsesearch.bench.profiling llama3-8b --length 8192 --samples 8 --json OUT
    python -m sparsesearch.bench.profiling llama3-70b --stream --layers 4 --length 4096 --samples 2 --json OUT

Streamed, the shape's weights are first written to disk in bf16, at fewer layers where the disk is short of all; memory does not depend on their number.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparsesearch import calibration
from sparsesearch.bench.meter import emptied, peak_bytes, synchronize
from sparsesearch.bench.random_model import random_model
from sparsesearch.model_shapes import ModelShape, model_shape
from sparsesearch.presets import preset_path
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.profiling.streamed_model import open_streamed
from sparsesearch.profiling.streaming import profile_streamed
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.search_space import SearchSpace

_SCALE = 0.02  # of random weights, as released models start


def write_random_checkpoint(shape: ModelShape, folder: Path, *, device: str = "cpu") -> None:
    """A checkpoint of that shape with random bf16 weights, one file per layer; the device draws them."""
    config = AutoConfig.for_model(shape.model_type, **shape.config_settings(), dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"] if shape.model_type == "llama" else None
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


def run(
    shape: ModelShape, *, length: int, samples: int, device: str, space: str, stream: bool, folder: Path
) -> dict[str, Any]:
    """One profile; weights and profile go below `folder`.

    Returns:
        Times in seconds, memory in bytes: of weights, and the most that was allocated.
    """
    place = torch.device(device)
    tokenizer = AutoTokenizer.from_pretrained(preset_path("models", "needle-7m"))
    menu = SearchSpace.load(space)
    data = calibration.load("needle", tokenizer, length_tokens=length, num_samples=samples, seed=0)
    if stream:
        write_random_checkpoint(shape, folder / "model", device=device)
        emptied(place)
        start = perf_counter()
        streamed = open_streamed(folder / "model", device=device, dtype="bfloat16")
        opened_s = perf_counter() - start
        synchronize(place)
        resident = peak_bytes(place)
        profile_streamed(streamed, Request(streamed.info, menu, {length: data}), folder / "profile")
    else:
        model = random_model(shape, device=device)
        emptied(place)
        resident, opened_s = peak_bytes(place), 0.0
        start = perf_counter()
        profile_model(model, Request(describe(model, shape.name), menu, {length: data}), folder / "profile")
    synchronize(place)
    return {
        "shape": shape.name,
        "layers": shape.num_layers,
        "length_tokens": length,
        "samples": samples,
        "candidates": len(menu.candidates),
        "space": space,
        "streamed": stream,
        "profile_s": perf_counter() - start,
        "open_s": opened_s,
        "resident_bytes": resident,
        "peak_bytes": peak_bytes(place),
        "checkpoint_bytes": sum(file.stat().st_size for file in (folder / "model").rglob("*.safetensors")),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--space", default="mixture")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where weights and profile are written; removed afterwards")
    options = parser.parse_args()
    shape = model_shape(options.shape)
    shape = replace(shape, num_layers=options.layers or shape.num_layers)
    with TemporaryDirectory(dir=options.folder) as folder:
        found = run(
            shape,
            length=options.length,
            samples=options.samples,
            device=options.device,
            space=options.space,
            stream=options.stream,
            folder=Path(folder),
        )
    text = json.dumps(found, indent=1, sort_keys=True)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
