"""`sparsesearch verify DIR`: does a patched checkpoint hold what it says, and does it compute what its plan means?"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsesearch.artifacts import read_text
from sparsesearch.embedded_plan import is_stamped, read_embedded
from sparsesearch.errors import ArtifactError
from sparsesearch.plan import Plan
from sparsesearch.runtime.attention import NAME
from sparsesearch.runtime.binding import binding_of
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.export import PLAN_FILE
from sparsesearch.runtime.fingerprint import weights_sha256
from sparsesearch.runtime.loading import load_weights, locate
from sparsesearch.runtime.oracle import oracle_logits

_DECODED_TOKENS = 8


@dataclass(frozen=True)
class VerifyReport:
    """What was found.

    Attributes:
        directory: the checkpoint.
        plan_sha256: digest of its plan.
        layers_patched: attention modules with at least one head that is not dense.
        heads_patched: query heads that are not dense.
        heads_total: query heads.
        prefill_error: largest difference of prefill logits from the oracle's, over the oracle's largest logit; NaN when nothing ran.
        decode_error: the same for decoded tokens, through the cache.
        tolerance: bound on both.
        problems: what is wrong, one sentence each; empty when the checkpoint is good.
    """

    directory: Path
    plan_sha256: str
    layers_patched: int
    heads_patched: int
    heads_total: int
    prefill_error: float
    decode_error: float
    tolerance: float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    directory: str | Path,
    *,
    prompt_tokens: int | None = None,
    trust_remote_code: bool = False,
    intended: Plan | None = None,
) -> VerifyReport:
    """Check plan copies, weights and results of a patched checkpoint, in float32 on the CPU.

    Args:
        directory: the checkpoint.
        prompt_tokens: length of the random prompt; 4 tiles and 5 tokens by default.
        trust_remote_code: run code that comes with the checkpoint.
        intended: the plan that config.json should carry; by default the one in the file beside it.

    Raises:
        ArtifactError: it is no patched checkpoint, or a file is missing, damaged or edited.
        PlanMismatchError: the plan does not fit the model at all.
    """
    place = locate(directory)
    if not isinstance(place, Path) or not place.is_dir():
        raise ArtifactError(f"{directory} must be a local checkpoint directory, but is not. Check the path.")
    plan, problems = _plans(place, intended)
    model = load_weights(place, dtype="float32", trust_remote_code=trust_remote_code)
    bindings = [binding for module in model.modules() if (binding := binding_of(module)) is not None]
    heads = [rule for binding in bindings for rule in binding.rules]
    patched = sum(rule.kind != "dense" for rule in heads)
    if patched == 0:
        problems.append("no head is patched: the checkpoint runs dense")
    found, stated = weights_sha256(model), plan.base_model.weights_sha256
    if stated is not None and found != stated:
        problems.append(
            f"the weights ({str(found)[:12]}) are not those the plan was made for ({stated[:12]}): of a fine-tuned copy, take the plan anew by "
            f"`sparsesearch apply {place} {place} -o NEW --allow-other-weights`"
        )
    prefill_error = decode_error = math.nan
    # float32 rounding grows with every layer's sums; the oracle itself moves by about this much when summation order changes
    tolerance = 2**12 * torch.finfo(torch.float32).eps
    if bindings:
        prefill_error, decode_error = _errors(model, prompt_tokens or 4 * plan.block_tokens + 5)
        for what, error in (("prefill", prefill_error), ("decoding", decode_error)):
            if not error <= tolerance:
                problems.append(
                    f"{what} differs from the oracle by {error:.1e} of the largest logit (allowed: {tolerance:.1e})"
                )
    return VerifyReport(
        directory=place,
        plan_sha256=plan.sha256,
        layers_patched=sum(not binding.all_dense for binding in bindings),
        heads_patched=patched,
        heads_total=plan.base_model.geometry.total_heads,
        prefill_error=prefill_error,
        decode_error=decode_error,
        tolerance=tolerance,
        problems=tuple(problems),
    )


def _plans(directory: Path, intended: Plan | None) -> tuple[Plan, list[str]]:
    """The plan in the config, and how its copy differs."""
    try:
        config: dict[str, Any] = json.loads(read_text(directory / "config.json"))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{directory}/config.json must be JSON, but is damaged at line {error.lineno}.") from error
    if not isinstance(config.get(NAME), dict):
        raise ArtifactError(
            f"{directory}/config.json must carry a plan under {NAME!r}, but does not. Make it with `sparsesearch apply`."
        )
    plan = read_embedded(config[NAME], source=f"{directory}/config.json")
    problems = []
    if NAME not in json.dumps(config.get("attn_implementation")):
        problems.append(
            f"config.json has attn_implementation={config.get('attn_implementation')!r}: the plan would not run"
        )
    copy = directory / PLAN_FILE
    if not copy.is_file():
        if not is_stamped(config[NAME]):
            problems.append(
                f"{PLAN_FILE} is missing, so that an edited config.json would go unseen: it was written before plans in it had a checksum"
            )
    elif (other := (intended or Plan.load(copy)).sha256) != plan.sha256:
        problems.append(f"{PLAN_FILE} ({other[:12]}) is not the plan in config.json ({plan.sha256[:12]})")
    return plan, problems


def _errors(model: PreTrainedModel, prompt_tokens: int) -> tuple[float, float]:
    """Relative errors of one prefill and of a few decoded tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (prompt_tokens + _DECODED_TOKENS,), generator=generator)
    exact = oracle_logits(model, ids, prompt_tokens)
    with torch.no_grad():
        output = model(ids[None, :prompt_tokens], use_cache=True)
        prefill, decoded = output.logits[0], []
        for token in range(prompt_tokens, len(ids)):
            kept = {CACHE_KEYWORD: output[CACHE_KEYWORD]}
            output = model(ids[None, token : token + 1], use_cache=True, **kept)
            decoded.append(output.logits[0])
    return relative_error(prefill, exact[:prompt_tokens]), relative_error(torch.cat(decoded), exact[prompt_tokens:])


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Largest difference, over the largest magnitude of what is exact."""
    return float((ours - exact).abs().max() / exact.abs().max())
