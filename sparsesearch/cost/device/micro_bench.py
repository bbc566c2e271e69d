"""A device, what runs on it, and the time that a case may take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor

from sparsesearch.cost.device.timing import Timed, sustained
from sparsesearch.kernels.dispatch import Backend
from sparsesearch.kernels.schedule import Workers

Row = dict[str, Any]
HOST_BYTES = float(1 << 33)
SETTLE_S = 1.0
REST_S = 2.0


class Bench:
    """A device, what runs on it, and the time that a case may take."""

    def __init__(
        self, device: str, kernel: Backend, dtype: torch.dtype, *, time_share: float = 1.0, seed: int = 0
    ) -> None:
        self.device, self.kernel, self.dtype, self.time_share = device, kernel, dtype, time_share
        self.workers = Workers.of(device)
        on_gpu = torch.device(device).type == "cuda"
        self.memory_bytes = float(torch.cuda.mem_get_info(device)[1]) if on_gpu else HOST_BYTES
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Random data: zeros draw less power and run faster."""
        return torch.randn(shape, device=self.device, generator=self.generator, dtype=self.dtype)

    def copies(self, nbytes: float, most: int = 128) -> int:
        """How many inputs of this size take turns, so that the cache holds none of them: a model's layers do not find theirs there either."""
        return max(1, min(most, int(2.5 * self.workers.l2_bytes // max(nbytes, 1.0)) + 1))

    def time(self, run: Callable[[int], object], *, copies: int = 1, warm_s: float = 0.12, graph: bool = True) -> Timed:
        """Sustained time of `run(copy)`."""
        warm_s, measure_s = warm_s * self.time_share, 0.08 * self.time_share
        return sustained(run, device=self.device, copies=copies, warm_s=warm_s, measure_s=measure_s, graph=graph)

    def settle(self, seconds: float = SETTLE_S) -> None:
        """Keep a GPU busy with large products, so that what follows finds it as warm and as close to its power limit as in service."""
        begin = perf_counter()
        self._multiply(lambda: perf_counter() - begin < seconds)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Likewise while something else is done: a warmer chip leaks more, and so reaches its power limit at a lower clock."""
        done = Event()
        thread = Thread(target=self._multiply, args=(lambda: not done.is_set(),), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _multiply(self, wanted: Callable[[], bool]) -> None:
        if torch.device(self.device).type != "cuda":
            return
        with torch.cuda.stream(torch.cuda.Stream()):
            a = torch.randn(8192, 8192, device=self.device, dtype=self.dtype)
            while wanted():
                for _ in range(10):
                    torch.matmul(a, a)
                torch.cuda.current_stream().synchronize()

    def rest(self, seconds: float = REST_S) -> None:
        """Let a GPU at its power limit find its clock again: for about a second afterwards, small kernels take up to a tenth longer."""
        if torch.device(self.device).type == "cuda":
            sleep(seconds)

    def row(self, group: str, timed: Timed, **values: Any) -> Row:
        """One result."""
        row = {"group": group, **values, "seconds": timed.seconds, "spread": timed.spread}
        return row if timed.hz is None else row | {"hz": round(timed.hz)}


class CompilingBench(Bench):
    """Runs every case once, so that what it needs is compiled, and measures nothing."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.device, bench.kernel, bench.dtype)

    def copies(self, nbytes: float, most: int = 128) -> int:
        """One."""
        return 1

    def time(self, run: Callable[[int], object], *, copies: int = 1, warm_s: float = 0.12, graph: bool = True) -> Timed:
        """Run it."""
        run(0)
        return Timed(float("nan"), float("nan"))
