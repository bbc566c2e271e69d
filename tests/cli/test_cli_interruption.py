"""Ctrl-C in `profile`: exit 130, finished layers are kept, and --resume ends in the same bytes."""

import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from sparsesearch.profiling.shards import ShardStore


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("written_before", [1, 11])
def test_interrupted_profile_resumes_to_the_same_bytes(
    corridor: Path, run: Any, content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_before: int
) -> None:
    out = tmp_path / "profile"
    command = ("profile", "needle-7m", "--space", corridor / "space.yaml", "--lengths", "160,256", "--num-samples", "2")
    command = (*command, "--num-probes", "1", "-o", out)
    write, calls = ShardStore.write, 0

    def interrupted(self: ShardStore, *arguments: Any) -> None:
        nonlocal calls
        if calls == written_before:
            signal.raise_signal(signal.SIGINT)  # what the terminal sends
        calls += 1
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardStore, "write", interrupted)
        result = run(*command, code=130)
    assert result.stdout == ""
    assert "interrupted" in result.stderr
    assert "--resume" in result.stderr
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").rglob("*.safetensors")}
    assert len(kept) == written_before, "only the layer in work is lost"

    refused = run("search", out, "--budget", "density=0.5", "-o", tmp_path / "plan.json", code=1)
    assert "unfinished" in refused.stderr
    assert "--resume" in run(*command, code=1).stderr, "the same command alone does not overwrite"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    run(*command, "--resume")
    assert content(out) == content(corridor / "profile")
    run(*command, "--resume")
    assert content(out) == content(corridor / "profile"), "resuming what is finished changes nothing"


@pytest.mark.usefixtures("heeded")
def test_what_writes_last_says_to_run_it_again(
    corridor: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsesearch.runtime.export.export", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    told = run("apply", corridor / "plan.json", "needle-7m", "-o", tmp_path / "patched", code=130).stderr
    assert "run the command again." in told
    assert "--resume" not in told
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("heeded")
def test_an_interrupt_that_falls_into_a_destructor_is_not_lost() -> None:
    """Garbage collection runs everywhere, and Python drops what is raised in `__del__`."""
    script = """
import signal, sys, time
from {module} import main
from {errors} import interrupt_again

class Dropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

sys.unraisablehook = interrupt_again
try:
    Dropped()
    time.sleep(20)
except KeyboardInterrupt:
    print("heard")
"""
    (entry,) = entry_points(group="console_scripts", name="sparsesearch")
    code = script.format(module=entry.module, errors=entry.module.replace(".main", ".errors"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=15, check=False)
    assert done.stdout == "heard\n", done.stderr
