"""What one call of a denoiser is about: its tokens, and where it stands in the denoising loop."""

from dataclasses import dataclass
from typing import Protocol

from sparsesearch.layout import Layout


@dataclass(frozen=True)
class Call:
    """One forward pass.

    Attributes:
        layout: its tokens, padding included.
        key_lengths: real tokens of each batch row where the text is padded at the end; None where nothing is.
        step: index of the denoising step and number of steps, where known.
        chunk: index of the piece that is generated, where one after another is and the caller has said so.
        pass_name: which of the calls of one step, such as `cond` or `uncond`.
    """

    layout: Layout
    key_lengths: tuple[int, ...] | None
    step: tuple[int, int] | None
    pass_name: str
    chunk: int | None = None


class CallSource(Protocol):
    """Whoever knows the call in progress."""

    current: Call | None
