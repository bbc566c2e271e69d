"""Benchmarks of EleutherAI's lm-eval under a plan (extra `lm-eval`)."""

import importlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from sparsesearch.errors import SpecError
from sparsesearch.evaluate.reference import ApplyPlan
from sparsesearch.plan import Plan
from sparsesearch.runtime.live import apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def lm_eval_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    plans: Mapping[str, Plan],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    apply: ApplyPlan = apply,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Run lm-eval tasks dense and under every plan, in the same job.

    Args:
        model: a live causal LM.
        tokenizer: the model's.
        plans: variant -> plan; dense is always run.
        tasks: names as lm-eval knows them.
        limit: most documents per task; None runs all.
        batch_size: documents at once.
        seed: of few-shot examples.
        apply: how a plan is put on the model.

    Returns:
        variant -> task -> metric -> value, as lm-eval reports them.

    Raises:
        SpecError: lm-eval is not installed, or no task is named.
    """
    if not tasks:
        raise SpecError("at least one lm-eval task must be named, for example hellaswag.")
    try:
        lm_eval = importlib.import_module("lm_eval")
        wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise SpecError(
            "lm-eval tasks need lm-eval, which is not installed: pip install 'sparsesearch[lm-eval]'."
        ) from error
    wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    variants: dict[str, Plan | None] = {"dense": None, **plans}
    for name, plan in variants.items():
        with nullcontext() if plan is None else apply(model, plan):
            answer = lm_eval.simple_evaluate(
                model=wrapped, tasks=list(tasks), limit=limit, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
                fewshot_random_seed=seed,
            )  # fmt: skip
        found[name] = answer["results"]
    return found
