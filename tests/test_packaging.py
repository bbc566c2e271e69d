"""What is shipped: every package and data file, nothing else at the top level, a quick --help, and a README that tells the truth."""

import importlib
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = {"search_spaces", "cost_models", "profiles", "cli"}


@pytest.fixture(scope="module")
def setuptools_settings() -> dict[str, dict[str, str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings: dict[str, dict[str, str]] = project["tool"]["setuptools"]
    return settings


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from a clean copy of the tree: a stale `build/` would hide what is missing."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("sparsesearch", *MAPPED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(out)]
    subprocess.run(build, cwd=source, check=True)
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_the_package_list_is_the_tree(setuptools_settings: dict[str, dict[str, str]]) -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "sparsesearch").rglob("__init__.py")}
    library = {".".join(folder.parts) for folder in folders}
    assert not [path for path in (ROOT / "sparsesearch").rglob("*.py") if path.parent.relative_to(ROOT) not in folders]
    mapped = {name: folder for name, folder in setuptools_settings["package-dir"].items() if name != "sparsesearch"}
    assert set(mapped.values()) == MAPPED
    assert all((ROOT / folder / "__init__.py").is_file() for folder in mapped.values())
    assert set(setuptools_settings["packages"]) == library | set(mapped)


def test_the_wheel_has_two_packages_at_its_top(wheel: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sparsesearch", "sparsesearch_cli"}


def test_the_wheel_has_every_module_and_data_file(wheel: list[str]) -> None:
    expected = set()
    for folder, package in [
        ("sparsesearch", "sparsesearch"),
        ("cli", "sparsesearch_cli"),
        *((room, f"sparsesearch/presets/{room}") for room in sorted(MAPPED - {"cli"})),
    ]:
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            if path.suffix in (".py", ".yaml", ".json", ".jsonl", ".safetensors", ".typed") and path.is_file():
                expected.add(f"{package}/{inside.as_posix()}")
    assert "sparsesearch/presets/models/needle-7m/model.safetensors" in expected
    assert "sparsesearch/presets/search_spaces/mixture.yaml" in expected
    assert "sparsesearch/presets/cost_models/cpu.json" in expected
    assert sorted(expected - set(wheel)) == []
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert not [name for name in wheel if name.startswith("tests/") or "__pycache__" in name]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)


def test_help_imports_no_torch() -> None:
    code = """
import sys
from typer.testing import CliRunner
from importlib import import_module
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="sparsesearch")
app = import_module(script.module).app
for arguments in (["--help"], ["search", "--help"], ["no-such-command"]):
    CliRunner().invoke(app, arguments)
print(sorted({"torch", "transformers", "sparsesearch", "numpy", "pandas"} & set(sys.modules)))
"""
    assert _python(code).stdout.strip() == "[]"


def test_help_answers_in_under_a_second() -> None:
    (script,) = entry_points(group="console_scripts", name="sparsesearch")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        code = f"import sys; sys.argv = ['sparsesearch', '--help']; from {script.module} import {script.attr} as main; main()"
        shown = _python(code).stdout
        seconds.append(time.perf_counter() - start)
        assert "quickstart" in shown
    assert min(seconds) < 1.0


NO_MODEL = {
    "convert": ["convert", "profiles/needle-7m-plan.json", "-o"],
    "report": ["report", "profiles/needle-7m-plan.json", "profiles/needle-7m-metrics.json", "--profile", "profiles/needle-7m", "-o"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", NO_MODEL.values(), ids=NO_MODEL)
def test_commands_that_run_no_model_start_without_transformers(arguments: list[str], tmp_path: Path) -> None:
    """It takes seconds to import; the library registers with it at once, the command line when a model is loaded."""
    (script,) = entry_points(group="console_scripts", name="sparsesearch")
    out = tmp_path / "out"
    code = f"""
import os, sys
sys.argv = ["sparsesearch", *{arguments!r}, {str(out)!r}]
from {script.module} import {script.attr} as main
try:
    main()
except SystemExit as exit:
    assert not exit.code
assert not {{"transformers", "sparsesearch.runtime"}} & set(sys.modules), "the way of search, predict, diff, explain and lint, too"
"""
    assert "written" in _python(code).stdout
    assert out.exists()


def test_the_readmes_command_line_reference_is_what_help_says() -> None:
    (script,) = entry_points(group="console_scripts", name="sparsesearch")
    reference = importlib.import_module(script.module.replace(".main", ".reference"))
    written = reference.block((ROOT / "README.md").read_text(encoding="utf-8"))
    stated = written.partition("\n")[0]
    if written and stated != f"<!-- {reference.layout()} -->":
        pytest.skip(f"README shows the help of {stated.strip('<!- >')}; this is {reference.layout()}")
    assert written == reference.reference(), "run: python -m sparsesearch_cli.reference README.md"


@pytest.mark.skipif(os.name != "posix", reason="the script is for a POSIX shell")
def test_ci_runs_the_readmes_test_command() -> None:
    readme, script = (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        (ROOT / ".ci" / "run").read_text(encoding="utf-8"),
    )
    command = "OMP_WAIT_POLICY=passive python -m pytest -q -n 2"
    assert command in readme
    assert command in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
