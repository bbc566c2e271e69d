"""A GGUF file is parsed once per load: transformers and gguf parse it for the config, for the weights and for the tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from threading import RLock
from typing import Any

import numpy as np

_LOADING = RLock()


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, equal calls of gguf's reader and of its map of tensor names give one object; afterwards nothing is kept.

    transformers takes both from `gguf` anew whenever it needs a file's metadata or a module's names, and `from_pretrained` has no argument by
    which they could be handed on, so the two names are exchanged while a model is loaded. What they give is only read.
    """
    if find_spec("gguf") is None:
        yield
        return
    gguf: Any = import_module("gguf")
    with _LOADING:
        plain = gguf.GGUFReader, gguf.get_tensor_name_map
        if not hasattr(plain[0], "cache_info"):  # a load inside another one shares its results
            gguf.GGUFReader, gguf.get_tensor_name_map = cache(_fast(plain[0])), cache(plain[1])
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = plain


def _fast(reader: Any) -> Any:
    """The reader over a plain view of its memory map: slicing `np.memmap` a million times is most of the time of parsing."""

    class Reader(reader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, value: Any) -> None:
            self._data = np.asarray(value)

    return Reader
