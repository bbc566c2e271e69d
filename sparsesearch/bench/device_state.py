"""Clock and power of a CUDA device, asked of the driver's management library itself: torch asks through a package that it does not install.

https://docs.nvidia.com/deploy/nvml-api
"""

import ctypes
from functools import cache

import torch

from sparsesearch.errors import UnsupportedKernelError

LIBRARY = "libnvidia-ml.so.1"
SM_CLOCK = 1  # nvmlClockType_t


@cache
def _library(name: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise UnsupportedKernelError(f"clock and power need NVIDIA's driver: {name} did not load ({error}).") from None
    _check(library.nvmlInit_v2(), "nvmlInit_v2")
    return library


def _check(status: int, call: str) -> None:
    if status:
        raise UnsupportedKernelError(f"{call} must succeed to read clock and power, but returned {status}.")


def clock_and_power(device: int = 0) -> tuple[float, float]:
    """Clock of the multiprocessors in Hz and power in W, now.

    Raises:
        UnsupportedKernelError: the driver has no such library, or refuses.
    """
    library = _library(LIBRARY)
    handle, mhz, milliwatts = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    _check(library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)), "nvmlDeviceGetHandleByUUID")
    _check(library.nvmlDeviceGetClockInfo(handle, SM_CLOCK, ctypes.byref(mhz)), "nvmlDeviceGetClockInfo")
    _check(library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts)), "nvmlDeviceGetPowerUsage")
    return mhz.value * 1e6, milliwatts.value * 1e-3
