"""Judging: dense and sparse on the same held-out sequences in the same job. Quality, density and time, with standard errors."""

from sparsesearch.evaluate.metrics import Estimate, Metrics, VariantMetrics
from sparsesearch.evaluate.reference import ApplyPlan, Comparison, DenseReference
from sparsesearch.evaluate.run import evaluate
from sparsesearch.evaluate.tasks import lm_eval_tasks

__all__ = [
    "ApplyPlan",
    "Comparison",
    "DenseReference",
    "Estimate",
    "Metrics",
    "VariantMetrics",
    "evaluate",
    "lm_eval_tasks",
]
