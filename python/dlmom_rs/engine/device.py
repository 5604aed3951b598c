"""Names of devices and dtypes, threads, and memory in use."""

import os
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from .errors import ModelError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEVICES = ("cpu", "cuda", "hip", "mps", "auto")


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of bf16, fp16 or fp32; ModelError otherwise."""
    if name not in DTYPES:
        raise ModelError(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_device(name: str) -> tuple[torch.device, str]:
    """The torch device of a name and the name to report; ModelError where it is not there.

    ``hip`` is torch's ``cuda`` device on a ROCm build. ``auto`` prefers cuda, then mps, then cpu.
    ``cuda:1`` and ``hip:1`` name one of several; without a number it is torch's current one.
    """
    name, colon, number = name.partition(":")
    numbered = name in ("cuda", "hip") and number.isdecimal()
    if name not in DEVICES or (colon and not numbered):
        known = f"{', '.join(DEVICES)}, with a number as in cuda:1 for one of several GPUs"
        raise ModelError(f"unknown device {name + colon + number!r}: expected one of {known}")
    rocm = torch.version.hip is not None
    if name == "auto":
        if torch.cuda.is_available():
            name = "hip" if rocm else "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "hip" and not rocm:
        raise ModelError("device 'hip' needs a ROCm build of torch; this build has none")
    if name in ("cuda", "hip"):
        if not torch.cuda.is_available():
            raise ModelError(f"device {name!r} is not available: torch sees no GPU")
        index = int(number) if number else torch.cuda.current_device()
        if index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ModelError(f"device {name}:{index} is not available: torch sees {count} GPUs")
        return torch.device("cuda", index), ("hip" if rocm else "cuda") + colon + number
    if name == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device 'mps' is not available on this machine")
    return torch.device(name), name


def parse_devices(names: str, count: int) -> tuple[list[torch.device], str]:
    """The devices of ``count`` models and the name to report; see :func:`parse_device`.

    One name for all, or as many as there are models, in their order, between commas.
    """
    found = [parse_device(name.strip()) for name in names.split(",")]
    if len(found) not in (1, count):
        raise ModelError(
            f"device: {len(found)} devices for {count} models; name one, or one for each"
        )
    devices = [device for device, _ in found]
    if len(set(devices)) == 1:
        return devices[:1] * count, found[0][1]
    return devices, ", ".join(name for _, name in found)


def physical_cores() -> int:
    """Physical cores this process may run on: hyper-threads count once. At least 1."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    siblings = set()
    for cpu in allowed:
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(file.read_text().strip())
        except OSError:
            return max(1, len(allowed))
    return max(1, len(siblings) or (os.cpu_count() or 1))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. torch's CPU allocator has no class for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def device_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes allocated on an accelerator, now and at peak; (0, 0) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        now = torch.mps.current_allocated_memory()
        return now, now
    return 0, 0


def there(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. CUDA and HIP take a copy and the host goes on: otherwise it would wait
    for all that was launched before, such as the forward of another agent."""
    return tensor.to(device, non_blocking=device.type == "cuda")
