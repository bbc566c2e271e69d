"""What is put on a model and taken off again."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Removable(ABC):
    """A handle that undoes itself: by `remove`, or at the end of a `with` block."""

    @abstractmethod
    def remove(self) -> None:
        """Leave the model as it was; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
