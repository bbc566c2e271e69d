import pytest
import torch
from runtime_plans import group_plan

from sparsesearch.errors import SpecError
from sparsesearch.runtime.speed import prefill_times


def test_times_of_both_in_one_run(tiny):
    model = tiny("llama")
    lines: list[str] = []
    times = prefill_times(model, group_plan(model, ["stream"]), [64, 200], 2, progress=lines.append)
    assert times["lengths_tokens"] == [64, 200]
    assert all(second > 0 for second in times["dense_s"] + times["plan_s"])
    assert times["speedup"] == [dense / plan for dense, plan in zip(times["dense_s"], times["plan_s"], strict=True)]
    assert len(lines) == 2
    assert times["threads"] == torch.get_num_threads()
    assert not any("sparsesearch_binding" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(("lengths", "repeats"), [([], 3), ([0], 3), ([8], 0)])
def test_senseless_requests_are_refused(tiny, lengths, repeats):
    model = tiny("llama")
    with pytest.raises(SpecError, match="repeats >= 1"):
        prefill_times(model, group_plan(model, ["stream"]), lengths, repeats)
