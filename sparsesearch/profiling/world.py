"""Several processes that profile one model, each its share of the sequences; started by torchrun."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""A process with one sequence fewer waits for the others as long as one of a large model takes; by default half an hour is the most."""


@dataclass(frozen=True)
class World:
    """One of `size` processes; alone by default.

    Attributes:
        rank: 0 … size - 1; the process of rank 0 opens and merges the profile.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls) -> "World":
        """The world that torchrun's environment describes, joined through gloo; a world of one without it."""
        if launched() == 1:
            return cls()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def leave(self) -> None:
        """Part from the others."""
        if self.size > 1:
            torch.distributed.destroy_process_group()

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This process's part: every `size`-th piece."""
        return work[self.rank :: self.size]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def first(self, act: Callable[[bool], T]) -> T:
        """Let rank 0 act before the others; `act` is told whether it is that one."""
        if self.rank == 0:
            found = act(True)
        self.wait()
        return found if self.rank == 0 else act(False)

    def gathered(
        self, own: dict[int, list[Tensor]], count: int, shapes: Sequence[tuple[int, ...]]
    ) -> Iterator[list[Tensor]]:
        """Every sequence's fp32 tensors in order, whichever process has them.

        Args:
            own: number of a sequence -> its tensors; those of `share(range(count))`.
            count: sequences of all processes together.
            shapes: of each tensor of a sequence.
        """
        for index in range(count):
            tensors = own.get(index) or [torch.empty(shape) for shape in shapes]
            if self.size > 1:
                for tensor in tensors:
                    torch.distributed.broadcast(tensor, src=index % self.size)
            yield tensors


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str, world: World) -> str:
    """Which of a host's GPUs a process computes on: its local rank's, where `cuda` leaves it open; from now on the current one."""
    if device != "cuda" or world.size == 1:
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local < torch.cuda.device_count():  # else whoever is told that device says so
        torch.cuda.set_device(local)
    return f"cuda:{local}"
