"""What a reader of a run wants to know about the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _tool(command: list[str]) -> str | None:
    """Output of a vendor tool, at most 4,000 characters; ``None`` where it is not installed."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout[:4000]


def collect() -> dict[str, Any]:
    """Machine, versions and devices as a JSON-serialisable dictionary."""
    import torch

    uname = platform.uname()
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append({"name": properties.name, "total_bytes": properties.total_memory})
    return {
        # The node name is left out: it identifies a person's machine and decides nothing.
        "uname": {
            "system": uname.system,
            "release": uname.release,
            "version": uname.version,
            "machine": uname.machine,
        },
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "transformers": _version("transformers"),
        "tokenizers": _version("tokenizers"),
        "numpy": _version("numpy"),
        "polars": _version("polars"),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": devices,
        "rocminfo": _tool(["rocminfo"]),
        "rocm_smi": _tool(["rocm-smi", "--showproductname", "--showdriverversion"]),
        "nvidia_smi": _tool(["nvidia-smi", "-L"]),
    }


def as_json() -> str:
    """:func:`collect` as JSON text."""
    return json.dumps(collect())
