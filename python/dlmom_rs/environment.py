"""What a reader of a run wants to know about the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

# What each library is for; those of the first group no model runs without.
_NEEDED = {
    "torch": "running models",
    "transformers": "loading models",
    "tokenizers": "tokenizers",
    "safetensors": "weights",
    "jinja2": "chat templates",
    "numpy": "tensors in Python",
}
_USEFUL = {
    "polars": "read_run and data frames",
    "matplotlib": "plot",
    "rich": "the live panel",
    "pyyaml": "figures of a recorded sample",
    "huggingface_hub": "models named by a hub id",
}


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


def _first_line(error: BaseException) -> str:
    """An exception on one line, as short as it can be."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _memory() -> dict[str, int | None]:
    """Bytes of memory that this process can have, and those not in use."""
    total = available = None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {k: int(v.split()[0]) * 1024 for k, v in (line.split(":", 1) for line in lines)}
        total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
    except (OSError, ValueError, IndexError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        # A container may have less than the machine.
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        if total is None or limit < total:
            free = max(0, limit - used)
            total, available = limit, free if available is None else min(available, free)
    except (OSError, ValueError):
        pass
    return {"total_bytes": total, "available_bytes": available}


def _dtypes(device: Any) -> dict[str, str | None]:
    """By dtype: ``None`` where a small product comes out right on ``device``, else why not."""
    import torch

    from dlmom_rs.engine.device import DTYPES

    found: dict[str, str | None] = {}
    for name, dtype in DTYPES.items():
        try:
            left = torch.arange(64, dtype=torch.float32).reshape(8, 8).remainder(7)
            right = torch.eye(8).roll(1, 1) * 2
            product = (left.to(device, dtype) @ right.to(device, dtype)).float().cpu()
            same = torch.equal(product, left.roll(1, 1) * 2)
            found[name] = None if same else "a product of small integers came out wrong"
        except (RuntimeError, TypeError, NotImplementedError) as error:
            found[name] = _first_line(error)
    return found


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = [
        {"device": "cpu", "name": _cpu_name(), "dtypes": _dtypes("cpu")}
    ]
    if torch.cuda.is_available():
        kind = "hip" if torch.version.hip else "cuda"
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(device)
            devices.append(
                {
                    "device": kind if index == 0 else f"{kind}:{index}",
                    "name": properties.name,
                    "total_bytes": total,
                    "free_bytes": free,
                    "dtypes": _dtypes(device),
                }
            )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU", "dtypes": _dtypes("mps")})
    return devices


def _unused_gpu() -> dict[str, str] | None:
    """What to install for a GPU that the machine seems to have and torch cannot use."""
    import torch

    if torch.cuda.is_available():
        return None
    kinds = (
        ("NVIDIA", "CUDA", shutil.which("nvidia-smi"), torch.version.cuda),
        ("AMD", "ROCm", Path("/dev/kfd").exists() or shutil.which("rocminfo"), torch.version.hip),
    )
    for maker, platform_name, there, built in kinds:
        if there and built:
            how = (
                f"this torch is built for {platform_name} {built} but sees no GPU: check the driver"
            )
        elif there:
            how = f"install a {platform_name} build of torch (https://pytorch.org/get-started)"
        else:
            continue
        return {"what": f"{maker} GPU", "for": "running on it", "how": how}
    return None


def _unmet() -> list[str]:
    """Installed libraries outside the versions this package asks for, a line each."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in metadata.requires("dlmom-rs") or []]
    except (ImportError, metadata.PackageNotFoundError):
        return []
    return [
        f"{want.name} {version} is installed, {want.specifier} is needed"
        for want in wanted
        if want.marker is None
        and (version := _version(want.name)) is not None
        and not want.specifier.contains(version, prereleases=True)
    ]


def _data() -> dict[str, list[dict[str, Any]]]:
    """Benchmarks and experts that come with the package, with their sizes."""
    from dlmom_rs import zoo

    folder = Path(__file__).resolve().parent / "data"
    benches = []
    for file in sorted(folder.glob("*.jsonl")):
        with file.open("rb") as lines:
            benches.append({"name": file.stem, "rows": sum(1 for line in lines if line.strip())})
    experts = []
    for name in zoo.names():
        files = [file for file in zoo.path(name).glob("*") if file.is_file()]
        whole = any(file.suffix == ".safetensors" for file in files)
        size = sum(file.stat().st_size for file in files) if whole else None
        experts.append({"name": f"zoo:{name}", "bytes": size})
    return {"benches": benches, "experts": experts}


def doctor() -> dict[str, Any]:
    """What ``dlmom-rs doctor`` reports: a JSON-serialisable dictionary.

    ``versions`` (null where a library is not there), ``cpu``, ``memory``, ``devices`` (each with
    what became of a small product by dtype), ``data``, ``missing`` (what is not there and not
    needed for all: ``what``, ``for``, ``how``) and ``problems`` (what is needed and broken).
    Never raises for what is missing or broken.
    """
    versions: dict[str, str | None] = {"python": sys.version.split()[0]}
    versions |= {name: _version(name) for name in (*_NEEDED, *_USEFUL)}
    problems = [
        f"{name} is not installed, which is for {purpose}: pip install {name}"
        for name, purpose in _NEEDED.items()
        if versions[name] is None
    ]
    problems += _unmet()
    missing = [
        {"what": name, "for": purpose, "how": f"pip install {name}"}
        for name, purpose in _USEFUL.items()
        if versions[name] is None
    ]
    cpu: dict[str, Any] = {"name": _cpu_name(), "logical_cores": os.cpu_count()}
    devices: list[dict[str, Any]] = []
    torch_works = True
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name in ("torch", "transformers"):
            try:
                import_module(name)
            except Exception as error:  # whatever a broken installation raises
                torch_works = torch_works and name != "torch"
                if versions[name] is not None:
                    problems.append(f"{name} cannot be imported: {_first_line(error)}")
        if torch_works:
            import torch

            from dlmom_rs.engine.device import physical_cores

            versions["torch"] = str(torch.__version__)
            cpu["physical_cores"] = cpu["run_threads"] = physical_cores()
            cpu["torch_threads"] = torch.get_num_threads()
            try:
                devices = _devices()
                unused = _unused_gpu()
            except RuntimeError as error:  # drivers that do not fit
                problems.append(f"torch cannot use the devices: {_first_line(error)}")
            else:
                if unused is not None:
                    missing.append(unused)
    problems += [
        f"device {device['device']} cannot compute in fp32: {device['dtypes']['fp32']}"
        for device in devices
        if device["dtypes"]["fp32"] is not None
    ]
    # A driver that is too old is a warning, once, of the first call that asks for devices.
    for warning in said:
        if issubclass(warning.category, UserWarning) and "cuda" in str(warning.message).lower():
            how = " ".join(str(warning.message).split())[:300]
            missing.append({"what": "GPU", "for": "running on it", "how": f"torch says: {how}"})
    data = _data()
    if not data["benches"]:
        problems.append("the benchmarks of the package are not there: install it again")
    missing += [
        {"what": expert["name"], "for": "running it", "how": "install the package again"}
        for expert in data["experts"]
        if expert["bytes"] is None
    ]
    return {
        "versions": versions,
        "cpu": cpu,
        "memory": _memory(),
        "devices": devices,
        "data": data,
        "missing": missing,
        "problems": problems,
    }


def doctor_json() -> str:
    """:func:`doctor` as JSON text."""
    return json.dumps(doctor())
