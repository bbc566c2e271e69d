"""Judging: dense and sparse on the same held-out sequences in the same job. Quality, density and time, with standard errors.

Exported here is what is recorded, which a report reads without transformers; `evaluate.run` judges.
"""

from sparsesearch.evaluate.estimate import Estimate
from sparsesearch.evaluate.metrics import Metrics, VariantMetrics
from sparsesearch.evaluate.task_metrics import SuiteSpec, TaskMetrics

__all__ = ["Estimate", "Metrics", "SuiteSpec", "TaskMetrics", "VariantMetrics"]
