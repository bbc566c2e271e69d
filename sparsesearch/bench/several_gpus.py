"""A profile by several processes, and of a model spread over several GPUs, beside one process on one GPU: the same losses, and how long each takes.

    python -m sparsesearch.bench.several_gpus llama3-8b --layers 16 --length 8192 --samples 4 --json OUT

The shape's random weights are written to disk once; every way is the command that users type, started anew. Two processes on one GPU each run
the first way at the same time: what these differ by is the rounding of kernels that add in no fixed order. Needs two GPUs, or none.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file

from sparsesearch.artifacts import write_bytes
from sparsesearch.bench.meter import emptied
from sparsesearch.bench.profiling import write_random_checkpoint
from sparsesearch.model_shapes import model_shape
from sparsesearch.profiling.record import device_name
from sparsesearch.runtime.loading import load_tokenizer

FORMAT = "sparsesearch.bench.several_gpus"
ONE, AGAIN, SHARED, SPREAD = "one process", "one process again", "processes share sequences", "device map"
PROGRAM = ("-m", "sparsesearch_cli.main", "profile")
LOOK_S = 0.2
"""How often memory in use is read."""


def commands(options: Sequence[str], processes: int) -> dict[str, list[str]]:
    """What is run for each way, without where its result goes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    alone = [sys.executable, *PROGRAM, *options]
    return {
        ONE: alone,
        AGAIN: alone,
        SHARED: [*launcher, *PROGRAM, *options],
        SPREAD: [*alone, "--device-map", "auto"],
    }


def started(command: Sequence[str], out: Path, *, gpu: int | None = None) -> "subprocess.Popen[str]":
    """A profile on its way to `out`; on one GPU of the machine, or with all of them in sight."""
    seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    return subprocess.Popen(
        [*command, "-o", str(out)], env=os.environ | seen, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finished(process: "subprocess.Popen[str]", begin: float) -> float:
    """Seconds until it is over.

    Raises:
        RuntimeError: it failed.
    """
    with process:
        _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(
            f"profiling must succeed to be compared, but ended with {process.returncode}: {errors[-2000:]}"
        )
    return perf_counter() - begin


@contextmanager
def most_used() -> Iterator[list[int]]:
    """Bytes in use on each GPU beyond those before, at most, by whatever process; filled at the end."""

    def now() -> list[int]:
        sizes = (torch.cuda.mem_get_info(gpu) for gpu in range(torch.cuda.device_count()))
        return [total - free for free, total in sizes]

    found: list[int] = []
    before, over = now(), Event()
    most = before

    def look() -> None:
        nonlocal most
        while not over.wait(LOOK_S):
            most = [max(pair) for pair in zip(most, now(), strict=True)]

    watcher = Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        found.extend(peak - base for peak, base in zip(most, before, strict=True))


def profile_s(folder: Path) -> float:
    """Seconds from the first file of a profile to its last: without starting, and loading the model."""
    return (folder / "profile.json").stat().st_mtime - (folder / "state.json").stat().st_mtime


def differences(folder: Path, truth: Path) -> dict[str, float]:
    """What two profiles' scores differ by, per kind of score: the root mean square over that of the second's."""
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for file in sorted(truth.glob("scores-*.safetensors")):
        found, expected = load_file(folder / file.name), load_file(file)
        for name, tensor in expected.items():
            sums = squares[name.split(".", 1)[1]]
            sums[0] += float((found[name].double() - tensor.double()).square().sum())
            sums[1] += float(tensor.double().square().sum())
    return {kind: (off / max(size, 1e-300)) ** 0.5 for kind, (off, size) in sorted(squares.items())}


def compared(options: Sequence[str], folder: Path, processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each way and its figures, as they come."""
    ways = commands(options, processes)
    places = {name: folder / name.replace(" ", "-") for name in ways}
    gpus = torch.cuda.device_count()
    for turn in ((ONE, AGAIN), (SHARED,), (SPREAD,)):
        with most_used() as used:
            begin = perf_counter()
            alone = len(turn) > 1 and gpus > 1
            running = {
                name: started(ways[name], places[name], gpu=number if alone else None)
                for number, name in enumerate(turn)
            }
            try:
                wall_s = {name: finished(process, begin) for name, process in running.items()}
            finally:
                for process in running.values():
                    process.kill()  # where another one failed
        for number, name in enumerate(turn):
            figures: Mapping[str, Any] = {
                "wall_s": wall_s[name],
                "profile_s": profile_s(places[name]),
                "used_bytes": used[number : number + 1] if alone else used,
                "command": " ".join(["python" if word == sys.executable else word for word in ways[name]]),
            }
            off = {} if name == ONE else {"differences": differences(places[name], places[ONE])}
            yield name, {**figures, **off}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a named shape")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--space", default="mixture")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where weights and profiles are written; removed afterwards")
    given = parser.parse_args()
    shape = model_shape(given.model)
    shape = replace(shape, num_layers=given.layers or shape.num_layers)
    with TemporaryDirectory(dir=given.folder) as name:
        model = Path(name, shape.name)
        write_random_checkpoint(shape, model, device=given.device)
        load_tokenizer("needle-7m").save_pretrained(model)
        emptied(torch.device(given.device))
        options = [
            str(model),
            "--device",
            given.device,
            "--lengths",
            str(given.length),
            "--num-samples",
            str(given.samples),
        ]
        options += ["--space", given.space]
        record: dict[str, Any] = {
            "format": FORMAT, "model": shape.name, "layers": shape.num_layers, "length_tokens": given.length, "samples": given.samples,
            "space": given.space, "processes": given.processes, "gpus": torch.cuda.device_count(), "device": device_name(given.device),
            "torch": torch.__version__, "command": " ".join(["python -m sparsesearch.bench.several_gpus", *sys.argv[1:]]), "runs": {},
        }  # fmt: skip
        for way, figures in compared(options, Path(name), given.processes):
            figures["command"] = figures["command"].replace(str(model), "MODEL")
            record["runs"][way] = figures
            write_bytes(given.json, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
            sys.stdout.write(json.dumps({way: figures}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
