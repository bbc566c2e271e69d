import pytest

from sparsesearch.errors import SpecError
from sparsesearch.workload import Workload, parse_workload, parse_workloads


def test_all_fields() -> None:
    expected = Workload(32768, generate_tokens=512, batch=8, weight=0.5)
    assert parse_workload("prompt=32k, generate=512,batch=8,weight=0.5") == expected
    assert parse_workload(str(expected)) == expected
    assert expected.last_context_tokens == 33280


def test_defaults() -> None:
    assert parse_workloads(["prompt=4096"]) == (Workload(4096, 0, 1, 1.0),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must look like"),
        ("batch=2", "prompt length"),
        ("prompt=0", "prompt >= 1"),
        ("prompt=10.5", "whole numbers"),
        ("prompt=1.2.3", "must be a number"),
        ("prompt=8,prompt=9", "once"),
        ("promt=8", "Did you mean 'prompt'"),
        ("prompt=8,weight=0", "weight > 0"),
    ],
)
def test_bad(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        parse_workload(text)


def test_none() -> None:
    with pytest.raises(SpecError, match="at least one"):
        parse_workloads([])
