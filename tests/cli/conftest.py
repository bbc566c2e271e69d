"""The installed command line, and one small corridor on the embedded model that the tests here share."""

import importlib
import json
import signal
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

SPACE = """
name: small
source: tests
description: one rule of every kind
block_tokens: 32
unit: query_head
candidates:
  - {kind: zero}
  - {kind: mean_value}
  - {kind: sink_window, sink: 32, window: [32, {b: 0.5}]}
  - {kind: vertical_slash, vertical: 32, slash: 32}
  - {kind: pooled_topk, keep: {b: 0.3}}
  - {kind: fixed_blocks, keep: 0.3}
"""
PROFILE = ("--lengths", "160,256", "--num-samples", "2", "--num-probes", "1")

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def run() -> Run:
    """Call the console script's app; an exception that is no exit is a defect and is raised."""
    (script,) = entry_points(group="console_scripts", name="sparsesearch")
    app = importlib.import_module(script.module).app

    def invoke(*arguments: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(part) for part in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, f"{arguments}: {result.stdout}\n{result.stderr}"
        return result

    return invoke


@pytest.fixture(scope="session")
def run_json(run: Run) -> Run:
    """The same with --json: stdout must be one JSON value and nothing else."""

    def invoke(*arguments: object, code: int = 0) -> Any:
        return json.loads(run(*arguments, "--json", code=code).stdout)

    return invoke


@pytest.fixture(scope="session")
def corridor(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `space.yaml`, `profile/` and `plan.json` (density 0.35 at 160 and 256 tokens)."""
    folder = tmp_path_factory.mktemp("corridor")
    (folder / "space.yaml").write_text(SPACE)
    run("profile", "needle-7m", "--space", folder / "space.yaml", *PROFILE, "-o", folder / "profile")
    run("search", folder / "profile", "--budget", "density=0.35", "-o", folder / "plan.json")
    return folder


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C is heard, also where whoever started the tests had it ignored, as shells do for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }

    return read
