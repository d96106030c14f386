"""``minilora devices``: what can compute here and, if no GPU can, one sentence with the cause and the remedy."""

import os
import platform
import sys
from pathlib import Path

import numpy as np

from ..backend import device_module
from ..errors import InputError

INSTALL = (
    "pip install 'minilora[gpu13]' for driver 580 or newer, 'minilora[gpu12]' for 525 or newer (nvidia-smi shows it)"
)


def devices() -> dict:
    """{"cpu": …, "cuda": …}, ready for JSON; ``cuda["reason"]`` says why no GPU computes, or is None."""
    return {"cpu": cpu(), "cuda": cuda()}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names = [line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu() -> dict:
    from threadpoolctl import threadpool_info

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    blas = [
        {"name": lib["internal_api"], "version": lib["version"], "threads": lib["num_threads"]}
        for lib in threadpool_info()
        if lib["user_api"] == "blas"
    ]
    return {"name": cpu_name(), "cores": cores, "numpy": np.__version__, "blas": blas}


def cuda() -> dict:
    """``devices``, one dict each; CuPy's version, its CUDA, and the newest CUDA that the driver serves; ``reason``."""
    found = {"devices": [], "cupy": None, "runtime": None, "driver_cuda": None, "reason": None}
    try:
        cupy, cause = device_module("cuda"), None
    except InputError as error:
        cupy, cause = sys.modules.get("cupy"), error.__cause__ or "no card"
    if isinstance(cause, ModuleNotFoundError) and cause.name == "cupy":
        return found | {"reason": f"CuPy is not installed; with an NVIDIA card, {INSTALL}"}
    if isinstance(cause, ImportError):
        return found | {"reason": f"CuPy is installed, but importing it fails: {first_line(cause.__cause__ or cause)}"}
    runtime, driver = cupy.cuda.runtime.runtimeGetVersion(), cupy.cuda.runtime.driverGetVersion()
    found |= {"cupy": cupy.__version__, "runtime": dotted(runtime), "driver_cuda": dotted(driver) if driver else None}
    if cause and not driver:  # CUDA would call this an old driver
        return found | {"reason": "CuPy is installed, but no NVIDIA driver; with a card, install its driver"}
    if cause:
        versions = f"this CuPy is for CUDA {dotted(runtime)}, and the driver serves CUDA up to {dotted(driver)}"
        return found | {"reason": f"CuPy finds no usable GPU ({first_line(cause)}); {versions}; {INSTALL}"}
    found["devices"] = [device(cupy, index) for index in range(cupy.cuda.runtime.getDeviceCount())]
    if all(d["error"] for d in found["devices"]):
        extra = f"gpu{runtime // 1000}"
        missing = f"if a library of CUDA is missing, pip install 'minilora[{extra}]' brings it"
        found["reason"] = f"the card does not compute ({found['devices'][0]['error']}); {missing}"
    return found


def dotted(version: int) -> str:
    """CUDA's own number, 12090, as people write it, 12.9."""
    return f"{version // 1000}.{version % 1000 // 10}"


def device(cupy, index) -> dict:
    """Name, memory in bytes and compute capability; ``error`` is None if a small product on the device is right."""
    properties, free, error = cupy.cuda.runtime.getDeviceProperties(index), None, None
    try:
        with cupy.cuda.Device(index):
            free = cupy.cuda.runtime.memGetInfo()[0]
            a = cupy.ones((2, 2), cupy.float32)
            total = float((a @ a + a).sum())  # cuBLAS, and a kernel that is compiled
        error = None if total == 12.0 else f"a sum that should be 12 is {total}"
    except Exception as exception:
        error = first_line(exception)
    capability = f"{properties['major']}.{properties['minor']}"
    memory = {"memory_bytes": properties["totalGlobalMem"], "free_bytes": free}
    name = properties["name"].decode()
    return {"index": index, "name": name, **memory, "compute_capability": capability, "error": error}


def first_line(error) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip(" =")), type(error).__name__)


def show(found: dict) -> str:
    """The result of devices() as text."""
    here, there = found["cpu"], found["cuda"]
    blas = ", ".join(f"{b['name']} {b['version']} ({plural(b['threads'], 'thread')})" for b in here["blas"])
    lines = [f"cpu   {here['name']}, {plural(here['cores'], 'core')}"]
    lines.append(f"      NumPy {here['numpy']}; BLAS: {blas or 'not known'}")
    for d in there["devices"]:
        free = "" if d["free_bytes"] is None else f" ({d['free_bytes'] / 2**30:.1f} free)"
        memory = f"{d['memory_bytes'] / 2**30:.1f} GiB{free}"
        lines.append(f"cuda  {d['index']}: {d['name']}, {memory}, compute capability {d['compute_capability']}")
    if there["devices"]:
        lines.append(
            f"      CuPy {there['cupy']} for CUDA {there['runtime']}; the driver serves {there['driver_cuda']}"
        )
    if there["reason"]:
        lines.append(f"cuda  none: {there['reason']}")
    return "\n".join(lines)


def plural(n, word) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
