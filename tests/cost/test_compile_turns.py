"""Threads that need the same kernel: one compiles it, whether or not it succeeds, and the others wait."""

from threading import Thread
from types import SimpleNamespace

import pytest
from triton import knobs

from sparsesearch.cost.device.compile_ahead import Turns

KERNEL = SimpleNamespace(module="sparsesearch.kernels", name="kernel")


@pytest.mark.parametrize("succeeds", [True, False])
def test_one_compiles_and_the_others_wait(succeeds: bool) -> None:
    before = knobs.runtime.jit_cache_hook
    with Turns() as turns:
        assert not knobs.runtime.jit_cache_hook(key="a", fn=KERNEL)
        assert not knobs.runtime.jit_cache_hook(key="b", fn=KERNEL)  # another one: nothing to wait for
        other = Thread(target=lambda: knobs.runtime.jit_cache_hook(key="a", fn=KERNEL))
        other.start()
        other.join(0.05)
        assert other.is_alive()
        if succeeds:
            knobs.runtime.jit_post_compile_hook(key="a", fn=KERNEL)
        else:
            turns.give_up()
        other.join(10)
        assert not other.is_alive()
        assert not knobs.runtime.jit_cache_hook(key="a", fn=KERNEL)
    assert knobs.runtime.jit_cache_hook is before
