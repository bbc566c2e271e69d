"""Which tasks count in a comparison: those that dense answers."""

from sparsesearch.equal_latency.record import Entry
from sparsesearch.evaluate import TaskMetrics


def test_tasks_that_dense_hardly_answers_do_not_count() -> None:
    easy = TaskMetrics.of([1.0, 0.0], [1.0, 1.0], [0.0, 1.0])
    edge = TaskMetrics.of([0.0, 1.0], [0.0, 1.0], [0.0, 0.0])
    hard = TaskMetrics.of([1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    entry = Entry.model_construct(tasks={"easy": easy, "edge": edge, "hard": hard})
    assert list(entry.answered) == ["easy", "edge"]
