"""Judging: dense and sparse on the same held-out sequences in the same job. Quality, density and time, with standard errors."""

from sparsesearch.evaluate.estimate import Estimate
from sparsesearch.evaluate.metrics import Metrics, VariantMetrics
from sparsesearch.evaluate.reference import ApplyPlan, Comparison, DenseReference
from sparsesearch.evaluate.run import evaluate
from sparsesearch.evaluate.task_metrics import SuiteSpec, TaskMetrics
from sparsesearch.evaluate.tasks import lm_eval_tasks

__all__ = [
    "ApplyPlan",
    "Comparison",
    "DenseReference",
    "Estimate",
    "Metrics",
    "SuiteSpec",
    "TaskMetrics",
    "VariantMetrics",
    "evaluate",
    "lm_eval_tasks",
]
