"""Prefill time of several variants, measured so that drift of the machine hits all of them alike."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsesearch.cost.cpu_cases import clock
from sparsesearch.errors import UnsupportedModelError
from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.reference import ApplyPlan
from sparsesearch.plan import Plan
from sparsesearch.runtime.live import AppliedPlan

Part = Literal["prefill", "attention"]
"""prefill: wall time of the whole call, or on a CPU with one thread its own time, without other processes'; attention: the device's time in attention, choosing tiles included, gaps between launches not."""

FASTEST_DENSE = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""On Hopper cuDNN is about twice as fast as the kernel that torch prefers."""

_LEAD = 1.3  # times the host's own time: how long the device is kept busy before a call that is timed
_LONGEST_LEAD_S = 0.05  # a first run builds schedules and compiles, which later runs do not repeat
_CYCLES_PER_S = 2e9  # of a GPU's clock at most, so that it is never busy for a shorter time than asked for

_Call = partial[Any]
"""One call of a model's attention function."""

_Clock = TypeVar("_Clock", "_HostClock", "_EventClock")


def prefill_seconds(
    head: Head,
    input_ids: Int64[Tensor, "B S"],
    plans: Mapping[str, Plan | None],
    *,
    rounds: int,
    apply: ApplyPlan,
    part: Part = "prefill",
) -> dict[str, tuple[float, ...]]:
    """Time of a prefill (KV cache filled, logits of the last position) per variant and round; see `Stopwatch`, which this uses once."""
    return Stopwatch(head, input_ids, apply)(plans, rounds=rounds, part=part)


class Stopwatch:
    """Times plans on one batch of prompts. Each is put together once: its schedules are there again when it is timed again.

    Args:
        head: the model.
        input_ids: a batch of prompts.
        apply: how a plan is put on the model; its handles are entered once per run.
    """

    def __init__(self, head: Head, input_ids: Int64[Tensor, "B S"], apply: ApplyPlan) -> None:
        self._head, self._input_ids, self._apply = head, input_ids, apply
        self._variants: dict[int, _Variant] = {}
        self._calls: list[_Call] = []

    def __call__(
        self, plans: Mapping[str, Plan | None], *, rounds: int, part: Part = "prefill", dense_runs: int = 1
    ) -> dict[str, tuple[float, ...]]:
        """One time in seconds per variant and round.

        Every round runs every variant once, or dense several times, in an order that turns from round to round. Unmeasured runs under the same
        plan come first, so that schedules are built and memory is warm, as they are from the second prompt on in service; before a wall time
        there is one in every round. On a GPU dense (None) is the fastest that torch has there.

        Args:
            plans: variant -> plan; None is dense. Of plans that earlier calls timed, only those that are here again are kept.
            rounds: measurements per variant.
            part: what is timed. Small models on a GPU wait for the host's launches most of the time: their attention is timed by itself.
            dense_runs: of dense in a round, spread over it; their median is its time. Every share of dense's time has the error of dense's.
        """
        known = {id(plan): self._variants.get(id(plan)) or self._variant(plan) for plan in plans.values()}
        self._variants = known  # holds the plans, so that no other one gets their id
        times: dict[str, list[float]] = {name: [] for name in plans}
        names = _in_turn(plans, dense_runs)
        if part == "attention" and self._head.model.device.type != "cuda" and not self._calls:
            with _around_attention(self._head.model, self._recorded):
                self._head.hidden(self._input_ids)
        for turn in range(rounds):
            runs: dict[str, list[float]] = {name: [] for name in plans}
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                runs[name].append(known[id(plans[name])].seconds(part))
            for name, seconds in runs.items():
                times[name].append(median(seconds))
        return {name: tuple(seconds) for name, seconds in times.items()}

    def _recorded(self, call: _Call) -> Any:
        self._calls.append(call)
        return call()

    def _variant(self, plan: Plan | None) -> "_Variant":
        return _Variant(self._head, self._input_ids, plan, self._apply, self._calls)


def _in_turn(plans: Mapping[str, Plan | None], dense_runs: int) -> list[str]:
    """The variants of a round, dense as often as is wanted, at equal distances."""
    dense = [name for name, plan in plans.items() if plan is None]
    others = [name for name, plan in plans.items() if plan is not None]
    step = max(1, -(-len(others) // dense_runs))
    parts = [others[run * step : (run + 1) * step] for run in range(dense_runs)]
    return [name for part in parts for name in (*dense, *part)]


class _Variant:
    """Dense or a plan, and what its runs have shown so far."""

    def __init__(
        self, head: Head, input_ids: Int64[Tensor, "B S"], plan: Plan | None, apply: ApplyPlan, calls: list[_Call]
    ) -> None:
        self._head, self._input_ids, self._plan, self._apply = head, input_ids, plan, apply
        self._calls = calls
        self._handle: AppliedPlan | None = None
        self._host_s: list[float] | None = None
        self._is_warm = False

    def seconds(self, part: Part) -> float:
        """One run."""
        with self._running():
            return self._attention_s() if part == "attention" else self._prefill_s()

    @contextmanager
    def _running(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._plan is not None:
                entered = stack.enter_context(self._handle or self._apply(self._head.model, self._plan))
                self._handle = entered if isinstance(entered, AppliedPlan) else None
            elif self._head.model.device.type == "cuda":
                stack.enter_context(sdpa_kernel(FASTEST_DENSE, set_priority=True))
            yield

    def _prefill_s(self) -> float:
        self._head.hidden(self._input_ids, use_cache=True)
        _synchronize(self._head.model.device)
        now = time.perf_counter if self._head.model.device.type == "cuda" else clock().now
        start = now()
        self._head.hidden(self._input_ids, use_cache=True)
        _synchronize(self._head.model.device)
        return now() - start

    def _attention_s(self) -> float:
        """Sum over the layers' attention calls; keys and values go to no cache.

        On a GPU each call waits behind a device that is busy for longer than the host took to queue that layer's call in an unmeasured run, so
        what passes between the two events is work: launches wait in the queue, as in a CUDA graph. Elsewhere the calls of one dense prefill are
        made again, without the layers between them, which take most of a prefill's time and none of what is measured.
        """
        if self._head.model.device.type != "cuda":
            return self._repeated_s()
        if self._host_s is None:
            self._around(_HostClock())  # builds schedules and compiles
            self._host_s = self._around(_HostClock()).calls
        return self._around(_EventClock(self._host_s)).seconds

    @torch.no_grad()
    def _repeated_s(self) -> float:
        """The calls of the dense prefill once more, under this plan; an unmeasured time first. Of one thread its own time, without other processes'."""
        now = clock().now
        attend = ALL_ATTENTION_FUNCTIONS[self._head.model.config.get_text_config()._attn_implementation]
        for _ in range(1 if self._is_warm else 2):
            start = now()
            for call in self._calls:
                if self._plan is None:
                    call()
                else:  # no padding: the plan's own mask says nothing
                    options = {name: value for name, value in call.keywords.items() if name != "attention_mask"}
                    attend(*call.args[:4], None, **options)
            seconds = now() - start
        self._is_warm = True
        return seconds

    def _around(self, clock: _Clock) -> _Clock:
        with _around_attention(self._head.model, clock):
            self._head.hidden(self._input_ids)
        _synchronize(self._head.model.device)
        return clock


class _HostClock:
    """The host's time in each call."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    @property
    def seconds(self) -> float:
        return sum(self.calls)

    def __call__(self, attend: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        out = attend()
        self.calls.append(time.perf_counter() - start)
        return out


class _EventClock:
    """The device's time in each call, behind a wait that covers the host's."""

    def __init__(self, host_s: list[float]) -> None:
        self._waits = iter(host_s)
        self._events: list[tuple[Any, Any]] = []

    @property
    def seconds(self) -> float:
        return float(sum(first.elapsed_time(last) for first, last in self._events)) / 1e3

    def __call__(self, attend: Callable[[], Any]) -> Any:
        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        sleep: Any = torch.cuda._sleep
        sleep(int(min(_LEAD * next(self._waits), _LONGEST_LEAD_S) * _CYCLES_PER_S))
        first.record()
        out = attend()
        last.record()
        self._events.append((first, last))
        return out


@contextmanager
def _around_attention(model: Any, clock: Callable[[_Call], Any]) -> Iterator[None]:
    """Let every attention call of the model's text part pass through `clock`."""
    name = model.config.get_text_config()._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"attention must be called through transformers' AttentionInterface to be timed by itself, but this model runs {name!r}. "
            "Load it with attn_implementation='sdpa', or time the whole prefill."
        )
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def clocked(*args: Any, **kwargs: Any) -> Any:
        return clock(partial(attend, *args, **kwargs))

    ALL_ATTENTION_FUNCTIONS[name] = clocked
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]  # the override alone; what was registered stays


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
