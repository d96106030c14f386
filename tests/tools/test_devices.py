"""``minilora devices`` says in one sentence what helps, whatever is missing; and docs/gpu.md names what there is.
CuPy and nvidia-smi are played by stand-ins here, in each state that a machine can be in.
"""

import contextlib
import json
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest

from minilora import GPT, GPTConfig
from minilora.cli import main
from minilora.files.base import save_model
from minilora.tools import devices

pytestmark = [pytest.mark.quick, pytest.mark.host("it puts CuPys of its own in place")]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS = {"compare": [], "train": ["lora"], "generate": [], "pretrain": ["--steps", "1"]}  # that take --device


class CudaError(RuntimeError):
    """CuPy's CUDARuntimeError, which carries CUDA's number of the error."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


OLD_DRIVER = CudaError(35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")
NO_DEVICE = CudaError(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
OTHER = CudaError(999, "cudaErrorUnknown: unknown error\nand a second line")


def cupy_of(count=1, runtime=12090, driver=13000, failing=None):
    """A CuPy that finds ``count`` cards, or raises the exception ``count``; ``failing``: what its arithmetic raises."""

    def number():
        if isinstance(count, Exception):
            raise count
        return count

    def ones(shape, dtype):
        if failing:
            raise failing
        return np.ones(shape, dtype)

    card = {"name": b"NVIDIA L4", "totalGlobalMem": 24 * 2**30, "major": 8, "minor": 9}
    cupy = types.ModuleType("cupy")
    cupy.__version__, cupy.ones, cupy.float32 = "14.2.0", ones, np.float32
    calls = types.SimpleNamespace(
        getDeviceCount=number,
        runtimeGetVersion=lambda: runtime,
        driverGetVersion=lambda: driver,
        getDeviceProperties=lambda index: card | {"name": card["name"] + b" " + str(index).encode()},
        memGetInfo=lambda: (20 * 2**30, 24 * 2**30),
    )
    cupy.cuda = types.SimpleNamespace(runtime=calls, Device=lambda index: contextlib.nullcontext())
    return cupy


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """A machine without CuPy and without a driver, whatever this one has."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def smi(monkeypatch, *answers):
    """An nvidia-smi that gives ``answers``, (exit code, text), one after another, or raises them."""
    answers = iter(answers)

    def run(command, **options):
        assert command[0] == "/usr/bin/nvidia-smi" and options["timeout"]
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, answer[0], answer[1], "")

    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(devices.subprocess, "run", run)


def printed(capsys, *argv):
    """What a command prints; it must end with exit code 0 and complain of nothing."""
    assert main(["devices", *argv]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


def reason(capsys):
    """The one sentence, which text and JSON must give alike."""
    *_, line = printed(capsys).splitlines()
    assert ".\n" not in line and line.count("none: ") == 1
    return line.partition("none: ")[2]


# -------------------------------------------------------------------------------- the CPU


def test_the_cpu_is_always_there(capsys):
    here = json.loads(printed(capsys, "--json"))["cpu"]
    assert here["numpy"] == np.__version__ and here["cores"] >= 1
    assert all(lib["threads"] >= 1 and lib["version"] for lib in here["blas"])
    text = printed(capsys)
    assert text.startswith("cpu   ") and f"NumPy {np.__version__}; BLAS: " in text


def test_one_is_no_plural():
    found = {"cpu": {"name": "X", "cores": 1, "numpy": "2", "blas": [{"name": "b", "version": "1", "threads": 1}]}}
    found["cuda"] = {"devices": [], "reason": "none of it"}
    assert devices.show(found) == "cpu   X, 1 core\n      NumPy 2; BLAS: b 1 (1 thread)\ncuda  none: none of it"
    found["cpu"]["blas"] = []
    assert "BLAS: not known" in devices.show(found)


# -------------------------------------------------------------------------------- without CuPy


def test_without_cupy_and_driver(capsys):
    text = reason(capsys)
    assert "no CuPy and no NVIDIA driver" in text and "gpu12" in text and "gpu13" in text
    found = json.loads(printed(capsys, "--json"))["cuda"]
    assert found["reason"] == text and found["devices"] == []


@pytest.mark.parametrize(
    ("answer", "extra"),
    [
        ("580.65.06, 9.0", "gpu13"),
        ("595.10, 12.0", "gpu13"),
        ("580.65.06, 7.5", "gpu13"),
        ("580.65.06, 7.0", "gpu12"),  # CUDA 13 serves no card before Turing
        ("575.64.03, 9.0", "gpu12"),
        ("525.60.13, 5.0", "gpu12"),
        ("550.54.14, 8.9\n550.54.14, 8.9", "gpu12"),
    ],
)
def test_without_cupy_the_extra_is_the_drivers(answer, extra, monkeypatch, capsys):
    smi(monkeypatch, (0, answer + "\n"))
    text = reason(capsys)
    assert f"'minilora[{extra}]'" in text and text.count("gpu1") == 1 and answer.partition(",")[0] in text


def test_without_cupy_and_an_nvidia_smi_that_knows_no_capability(monkeypatch, capsys):
    smi(monkeypatch, (2, 'Field "compute_cap" is not a valid field to query.'), (0, "525.60.13\n"))
    assert "'minilora[gpu12]' goes with driver 525.60.13" in reason(capsys)


def test_without_cupy_and_a_driver_that_is_too_old(monkeypatch, capsys):
    smi(monkeypatch, (0, "470.82.01, 8.6\n"))
    assert "driver 470.82.01 is too old" in (text := reason(capsys)) and "525" in text


def test_without_cupy_and_a_card_that_is_too_old(monkeypatch, capsys):
    smi(monkeypatch, (0, "580.65.06, 3.5\n"))
    assert "compute capability is 3.5; CUDA 12 needs 5.0" in reason(capsys)


FAILURE = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([(9, FAILURE)] * 2, "couldn't communicate"),
        ([(0, "No devices were found\n")] * 2, "No devices were found"),
        ([(0, "")] * 2, "finds no card"),
        ([subprocess.TimeoutExpired("nvidia-smi", 20)], "timed out"),
        ([OSError("Exec format error")], "Exec format error"),
    ],
)
def test_without_cupy_and_an_nvidia_smi_that_fails(answers, words, monkeypatch, capsys):
    smi(monkeypatch, *answers)
    assert words in reason(capsys)


def test_on_macos(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert reason(capsys) == "there is no CUDA on macOS"


def test_a_cupy_that_cannot_be_imported(monkeypatch, capsys):
    """CuPy words it in many lines, and has the reason behind them."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "cupy":
                raise ImportError("=====\nFailed to import CuPy.\n=====") from ImportError(
                    "libcudart.so.12: no such file"
                )

    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert reason(capsys) == "CuPy is installed, but importing it fails: libcudart.so.12: no such file"


# -------------------------------------------------------------------------------- with CuPy, without a GPU

WITHOUT = {
    "no driver": (cupy_of(OLD_DRIVER, driver=0), "CuPy 14.2.0 is installed, but no NVIDIA driver"),
    "a driver for CUDA 11": (cupy_of(OLD_DRIVER, driver=11040), "serves CUDA up to 11.4, and this CuPy is for CUDA 12"),
    "a driver for CUDA 12": (
        cupy_of(OLD_DRIVER, 13000, 12080),
        "pip uninstall cupy-cuda13x and pip install 'minilora[g",
    ),
    "no card": (cupy_of(NO_DEVICE), "the driver serves CUDA 13.0, but there is no card"),
    "no card, counted": (cupy_of(0), "there is no card"),
    "another error": (cupy_of(OTHER), "finds no usable card: cudaErrorUnknown: unknown error"),
}


@pytest.mark.parametrize(("cupy", "words"), WITHOUT.values(), ids=WITHOUT)
def test_with_cupy_and_no_gpu(cupy, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert words in (text := reason(capsys))
    found = json.loads(printed(capsys, "--json"))["cuda"]
    assert (found["reason"], found["devices"], found["cupy"]) == (text, [], "14.2.0")
    assert "second line" not in text


def test_an_old_driver_has_one_way_out_or_two(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", cupy_of(OLD_DRIVER, driver=11040))
    assert reason(capsys).endswith("install driver 525 or newer")
    monkeypatch.setitem(sys.modules, "cupy", cupy_of(OLD_DRIVER, 13000, 12080))
    assert "install driver 580 or newer, or pip uninstall" in reason(capsys)


def test_cards_that_are_hidden(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(sys.modules, "cupy", cupy_of(NO_DEVICE))
    assert 'CUDA_VISIBLE_DEVICES is ""' in reason(capsys)


# -------------------------------------------------------------------------------- with a GPU


def test_two_cards(monkeypatch, capsys):
    smi(monkeypatch, *[(0, "580.65.06, 8.9\n580.65.06, 8.9\n")] * 2)
    monkeypatch.setitem(sys.modules, "cupy", cupy_of(2))
    text = printed(capsys)
    assert "cuda  0: NVIDIA L4 0, 24.0 GiB (20.0 free), compute capability 8.9\n" in text and "cuda  1: " in text
    assert text.endswith("      CuPy 14.2.0 for CUDA 12.9; driver 580.65.06 serves 13.0\n") and "none" not in text
    found = json.loads(printed(capsys, "--json"))["cuda"]
    assert [d["index"] for d in found["devices"]] == [0, 1] and found["reason"] is None
    assert (found["cupy"], found["runtime"], found["driver_cuda"], found["driver"]) == (
        "14.2.0", "12.9", "13.0", "580.65.06",
    )  # fmt: skip


def test_a_card_without_nvidia_smi(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", cupy_of())
    assert printed(capsys).endswith("CuPy 14.2.0 for CUDA 12.9; the driver serves 13.0\n")


@pytest.mark.parametrize(
    "error", [ImportError("libcublas.so.12: cannot open shared object file"), RuntimeError("=\nnvrtc: no such file")]
)
def test_a_card_on_which_a_library_is_missing(error, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", cupy_of(failing=error))
    text = reason(capsys)
    assert "does not compute" in text and "no such file" in text.replace("cannot open shared object", "no such")
    assert "'minilora[gpu12]' brings them" in text
    found = json.loads(printed(capsys, "--json"))["cuda"]
    assert found["devices"][0]["error"] and found["devices"][0]["free_bytes"] == 20 * 2**30


def test_a_card_that_computes_wrongly(monkeypatch, capsys):
    cupy = cupy_of()
    cupy.ones = lambda shape, dtype: np.full(shape, 2.0, dtype)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert "does not compute" in reason(capsys)


# -------------------------------------------------------------------------------- --device cuda


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "cupy", [None, cupy_of(OLD_DRIVER, driver=0), cupy_of(0)], ids=["no CuPy", "no driver", "no card"]
)
def test_device_cuda_without_a_gpu_is_one_sentence(command, cupy, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    base, out = tmp_path / "tiny.safetensors", tmp_path / "out"
    save_model(base, GPT(GPTConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2)))
    more = [] if command == "pretrain" else ["--base", base]
    more += [] if command == "generate" else ["--out", out / "x.safetensors" if command == "pretrain" else out]
    assert main([command, *COMMANDS[command], "--device", "cuda", *map(str, more)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('minilora: error: device "cuda"') and captured.err.count("\n") == 1
    assert 'use the device "cpu"' in captured.err or 'or use the device "cpu"' in captured.err
    assert not [file for file in out.rglob("*") if file.is_file()]


def test_every_command_that_takes_a_device_is_tried_here(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    for command in re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert ("--device" in capsys.readouterr().out) == (command in COMMANDS), command


# -------------------------------------------------------------------------------- the page and the extras


def test_the_extras_are_those_that_are_named():
    extras = {name: packages for name, packages in PROJECT["project"]["optional-dependencies"].items() if "gpu" in name}
    assert set(extras) == set(devices.EXTRAS)
    for name, packages in extras.items():
        assert packages == [f"cupy-cuda{name.removeprefix('gpu')}x[ctk]>=13.6"]
        oldest, least = devices.EXTRAS[name]
        row = re.search(rf"^\| `{name}` \| (.*) \| (\d+) or newer \| ([\d.]+) or more", PAGE, re.MULTILINE)
        assert row[1] == f"`{packages[0].partition('>')[0]}`"
        assert (int(row[2]), row[3]) == (oldest, ".".join(map(str, least)))
        assert str(oldest) in devices.CHOICE and name in devices.CHOICE
    for name in re.findall(r"minilora\[(\w+)\]|\.\[(\w+)[,\]]", PAGE):
        assert "".join(name) in PROJECT["project"]["optional-dependencies"], name


def test_the_page_s_commands_exist(capsys):
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert any("pytest -q -m gpu" in line for line in commands)
    assert any(marker.startswith("gpu:") for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"])
    for line in commands:
        words = line.partition("#")[0].split()
        program = next((i for i, word in enumerate(words) if Path(word).name == "minilora"), None)
        if program is not None:
            with pytest.raises(SystemExit) as stop:
                main([words[program + 1], "--help"])
            assert stop.value.code == 0
            printed = capsys.readouterr().out
            assert all(word in printed for word in words[program + 2 :] if word.startswith("--"))
        for word in words:
            assert not word.startswith("benchmarks/") or (ROOT / word).exists(), word
    assert {"devices", "compare"} <= {w for line in commands for w in line.split()}


def test_the_page_s_links_and_names():
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert link.startswith("https://") or (ROOT / "docs" / link.partition("#")[0]).exists(), link
    for name in re.findall(r"`(minilora/\w+\.py|tests/\w+/?|benchmarks/\w+\.py)`", PAGE):
        assert (ROOT / name).exists(), name
    assert "(docs/gpu.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
