"""Which exceptions are told in a sentence, and which keep their traceback because they are our defects."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from sparsesearch.errors import BudgetInfeasibleError


@pytest.fixture(scope="module")
def told() -> Any:
    return importlib.import_module("sparsesearch_cli.errors")._told


def test_our_errors_carry_their_code(told: Any) -> None:
    assert told(BudgetInfeasibleError("no plan fits.")) == ("no plan fits.", 3)


def test_a_damaged_weight_file(told: Any, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(SafetensorError) as caught:
        safe_open(tmp_path / "w.safetensors", "pt")
    message, code = told(caught.value)
    assert (code, message.startswith("a safetensors file must be whole")) == (1, True)


def test_too_little_memory(told: Any) -> None:
    message, code = told(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."))
    assert (code, "20 GiB. Take shorter lengths" in message) == (1, True)


def test_a_file_of_the_system(told: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "none").open()
    message, code = told(caught.value)
    assert (code, message.startswith(f"{tmp_path / 'none'} must be usable, but No such file")) == (1, True)


def test_a_missing_extra(told: Any) -> None:
    message, code = told(ModuleNotFoundError("no", name="diffusers.models"))
    assert (code, message) == (1, "this needs diffusers.models: pip install 'sparsesearch[diffusers]'.")


@pytest.mark.parametrize(
    "defect",
    [
        KeyError("rows"),
        ValueError("x"),
        RuntimeError("x"),
        OSError("x"),
        ModuleNotFoundError("no", name="sparsesearch.x"),
    ],
)
def test_defects_are_not_hidden(told: Any, defect: Exception) -> None:
    assert told(defect) is None
