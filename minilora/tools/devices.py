"""``minilora devices``: what can compute here and, where no GPU can, the one sentence that says why and what helps.

Two numbers must fit. A driver serves CUDA up to some version, and a CuPy wheel is made for CUDA 12 or for CUDA 13.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from ..backend import device_module
from ..errors import InputError

# Extra of pyproject.toml: the oldest driver, and the least compute capability, that its CUDA serves. The newer first.
EXTRAS = {"gpu13": (580, (7, 5)), "gpu12": (525, (5, 0))}
CHOICE = "pip install 'minilora[gpu13]' for driver 580 or newer, 'minilora[gpu12]' for 525 or newer"


def devices() -> dict:
    """{"cpu": …, "cuda": …}, ready for JSON: what computes, with versions; ``cuda["reason"]`` where nothing does."""
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
    """``devices``, one dict each; CuPy's and CUDA's versions as far as they are known; ``reason`` where none computes.

    Each device computes a small product, so that a library that is missing is found here and not within a training.
    """
    found = {"devices": [], "cupy": None, "runtime": None, "driver_cuda": None, "driver": None, "reason": None}
    try:
        cupy = device_module("cuda")
    except InputError as error:
        if isinstance(error.__cause__, ImportError):
            return found | {"reason": without_cupy(error.__cause__)}
        cupy, cause = sys.modules["cupy"], error.__cause__
        return found | versions(cupy) | {"reason": without_device(cupy, cause)}
    found |= versions(cupy)
    cards = nvidia_smi()
    found["driver"] = cards[0][0] if isinstance(cards, list) else None
    for index in range(cupy.cuda.runtime.getDeviceCount()):
        found["devices"].append(device(cupy, index))
    failed = [d["error"] for d in found["devices"] if d["error"]]
    if len(failed) == len(found["devices"]):
        extra = f"gpu{cupy.cuda.runtime.runtimeGetVersion() // 1000}"
        found["reason"] = (
            f"the card is there, but it does not compute ({failed[0]}); if a library of CUDA is missing, "
            f"pip install 'minilora[{extra}]' brings them"
        )
    return found


def versions(cupy) -> dict:
    """CuPy's version, the CUDA that it is built for, and the newest that the driver serves, None without a driver."""
    runtime, driver = cupy.cuda.runtime.runtimeGetVersion(), cupy.cuda.runtime.driverGetVersion()
    return {"cupy": cupy.__version__, "runtime": dotted(runtime), "driver_cuda": dotted(driver) if driver else None}


def dotted(version: int) -> str:
    """CUDA's own number, 12090, as people write it, 12.9."""
    return f"{version // 1000}.{version % 1000 // 10}"


def device(cupy, index) -> dict:
    """Name, memory in bytes, compute capability; ``error`` is None where the device computes what it should."""
    properties, free, error = cupy.cuda.runtime.getDeviceProperties(index), None, None
    try:
        with cupy.cuda.Device(index):
            free = cupy.cuda.runtime.memGetInfo()[0]
            a = cupy.ones((2, 2), cupy.float32)
            total = float((a @ a + a).sum())  # cuBLAS, and a kernel that is compiled
        error = None if total == 12.0 else f"1 · 1 + 1 · 1 + 1, four times, is {total} on it"
    except Exception as exception:
        error = first_line(exception)
    name = properties["name"].decode() if isinstance(properties["name"], bytes) else properties["name"]
    capability = f"{properties['major']}.{properties['minor']}"
    memory = {"memory_bytes": properties["totalGlobalMem"], "free_bytes": free}
    return {"index": index, "name": name, **memory, "compute_capability": capability, "error": error}


def first_line(error) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip(" =")), type(error).__name__)


def without_cupy(error: ImportError) -> str:
    """Why CuPy cannot be imported and, where it is not installed, which extra goes with the driver."""
    if not (isinstance(error, ModuleNotFoundError) and error.name == "cupy"):
        return f"CuPy is installed, but importing it fails: {first_line(error.__cause__ or error)}"
    if sys.platform == "darwin":
        return "there is no CUDA on macOS"
    cards = nvidia_smi()
    if cards is None:
        return f"there is no CuPy and no NVIDIA driver (no nvidia-smi); with a card, install its driver, then {CHOICE}"
    if isinstance(cards, str):
        return f"there is no CuPy, and nvidia-smi finds no card that it can use ({cards})"
    driver, capability = cards[0]
    extra = extra_for(driver, capability)
    if extra is None and int(driver.partition(".")[0]) < 525:
        return f"there is no CuPy, and driver {driver} is too old for CUDA 12; install 525 or newer, then {CHOICE}"
    if extra is None:
        return f"the card's compute capability is {capability}; CUDA 12 needs 5.0 or more"
    return f"CuPy is not installed; pip install 'minilora[{extra}]' goes with driver {driver} and this card"


def extra_for(driver: str, capability: str | None) -> str | None:
    """The newest extra that serves a driver such as "550.54.14" and a card of capability "8.9"; None: there is none."""
    major, card = int(driver.partition(".")[0]), tuple(map(int, capability.split("."))) if capability else None
    for extra, (oldest, least) in EXTRAS.items():
        if major >= oldest and (card or (0, 0)) >= (least if card else (0, 0)):
            return extra
    return None


def without_device(cupy, error) -> str:
    """Why CuPy, which is installed, finds no device that it can use."""
    runtime, driver = cupy.cuda.runtime.runtimeGetVersion(), cupy.cuda.runtime.driverGetVersion()
    made = f"CuPy {cupy.__version__} is installed"
    if driver == 0:  # CUDA calls this an old driver too
        return f"{made}, but no NVIDIA driver: with a card, install its driver; without one, use the CPU"
    if driver // 1000 < runtime // 1000:
        text = f"the driver serves CUDA up to {dotted(driver)}, and this CuPy is for CUDA {runtime // 1000}"
        oldest = EXTRAS.get(f"gpu{runtime // 1000}", (580,))[0]
        text += f": install driver {oldest} or newer"
        if driver // 1000 == 12:
            text += f", or pip uninstall cupy-cuda{runtime // 1000}x and pip install 'minilora[gpu12]'"
        return text
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f'{made}, and CUDA_VISIBLE_DEVICES is "{visible}": unset it, or name a card that is there'
    if error is None or getattr(error, "status", None) == 100:  # cudaErrorNoDevice
        return f"{made} and the driver serves CUDA {dotted(driver)}, but there is no card"
    return f"{made}, but it finds no usable card: {first_line(error)}"


def nvidia_smi():
    """[(driver, compute capability or None)], one for each card. None: no such program; a string: what it complains of.

    It comes with the driver, and so tells of the card before CuPy is there.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    for query in ("driver_version,compute_cap", "driver_version"):  # old drivers do not know compute_cap
        command = [program, f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return first_line(error)
        rows = [[*map(str.strip, line.split(",")), None][:2] for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0 and rows and all(row[0][:1].isdigit() for row in rows):
            return [tuple(row) for row in rows]
    return first_line(done.stdout + done.stderr)


def show(found: dict) -> str:
    """What devices() found, as text."""
    here, there = found["cpu"], found["cuda"]
    blas = (
        ", ".join(f"{b['name']} {b['version']} ({plural(b['threads'], 'thread')})" for b in here["blas"]) or "not known"
    )
    lines = [f"cpu   {here['name']}, {plural(here['cores'], 'core')}", f"      NumPy {here['numpy']}; BLAS: {blas}"]
    for d in there["devices"]:
        memory = f"{d['memory_bytes'] / 2**30:.1f} GiB"
        memory += "" if d["free_bytes"] is None else f" ({d['free_bytes'] / 2**30:.1f} free)"
        lines.append(f"cuda  {d['index']}: {d['name']}, {memory}, compute capability {d['compute_capability']}")
    if there["devices"]:
        number = f"driver {there['driver']}" if there["driver"] else "the driver"
        lines.append(f"      CuPy {there['cupy']} for CUDA {there['runtime']}; {number} serves {there['driver_cuda']}")
    if there["reason"]:
        lines.append(f"{'      ' if there['devices'] else 'cuda  '}none: {there['reason']}")
    return "\n".join(lines)


def plural(n, word) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
