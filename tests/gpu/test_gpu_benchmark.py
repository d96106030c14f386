"""benchmarks/gpu.py as far as it goes without a GPU: options, report, figure, and its sides on stand-ins."""

import copy
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host("it starts processes of its own")
ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu.py"
CUPY = """
import sys, time, types
sys.path.insert(0, {tests!r})
import standin_cupy
cupy = standin_cupy.module()
cupy.__version__ = "0 (stand-in)"

class Event:
    def record(self):
        self.at = time.perf_counter()
    def synchronize(self):
        pass

class Device:
    def __init__(self, index):
        pass
    def __enter__(self):
        pass
    def __exit__(self, *_):
        pass

properties = {{"name": b"no card", "totalGlobalMem": 2**30, "major": 9, "minor": 0}}
cupy.cuda = types.SimpleNamespace(
    Event=Event, Device=Device, get_elapsed_time=lambda a, b: 1e3 * (b.at - a.at),
    runtime=types.SimpleNamespace(
        getDeviceCount=lambda: 1, runtimeGetVersion=lambda: 12090, driverGetVersion=lambda: 13000,
        getDeviceProperties=lambda index: properties, memGetInfo=lambda: (2**30, 2**30),
    ),
)
cupy.get_default_memory_pool = lambda: types.SimpleNamespace(total_bytes=lambda: 12345678)
sys.modules["cupy"] = cupy
"""


@pytest.fixture(scope="module")
def gpu():
    """benchmarks/gpu.py, which is no part of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("gpu")


def run(*words, paths=()):
    """benchmarks/gpu.py as a command; ``paths`` come before what is installed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), str(ROOT)])}
    command = [sys.executable, str(GPU), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def made_up(gpu):
    """A run that never was: 2 sizes, 2 batches, all sides."""
    rows = []
    for size in ("tiny", "XL"):
        for batch in (1, 64):
            side = {"losses": [5.0, 4.9, 4.8, 4.7, 4.6], "first_step_s": 0.5, "trained": 10, "apart": 1e-6}
            sides = {"numpy": side | {"ms": [9.0, 10.0, 20.0], "pool_bytes": None}}
            for i, label in enumerate(gpu.ON_THE_GPU + [name + gpu.TF32 for name in gpu.ON_THE_GPU]):
                sides[label] = side | {"ms": [2.0 + i], "pool_bytes": 2**20 * (i + 1)}
            rows.append({"size": size, "batch": batch, "tokens": 128 * batch, "numbers": 10**6, "sides": sides})
            rows[-1]["notes"] = []
    del rows[-1]["sides"]["numpy"]
    rows[-1]["notes"] = ["minilora, NumPy is left out: a step would take some 50 s"]
    return {"machine": {"GPU": "made up"}, "command": "gpu.py --all", "rows": rows}


BAD = {
    "unknown size": (["--sizes", "huge"], "huge"),
    "unknown side": (["--sides", "jax"], "jax"),
    "batch 0": (["--batches", "0"], "--batches must be at least 1"),
    "all and sizes": (["--all", "--sizes", "S"], "leave them out"),
    "no time": (["--seconds", "0"], "--seconds"),
    "endless": (["--seconds", "inf"], "--seconds"),
    "no thread": (["--threads", "0"], "--threads"),
    "no folder": (["--out", "no/such/folder/x"], "there is no folder"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_one_line(gpu, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.options(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("gpu: ") and message in error and error.count("\n") == 1


def test_the_plan(gpu):
    assert gpu.plan(gpu.options([])) == [("tiny", 8)]
    assert gpu.plan(gpu.options(["--sizes", "S", "--batches", "2", "3"])) == [("S", 2), ("S", 3)]
    args = gpu.options(["--all"])
    assert args.tf32 and {size for size, _ in gpu.plan(args)} == set(gpu.SIZES)
    assert [batch for size, batch in gpu.plan(args) if size == "tiny"] == [1, 4, 8, 16, 64]
    assert gpu.labels(gpu.options(["--sides", "numpy", "cupy", "--tf32"])) == ["numpy", "cupy", "cupy_tf32"]
    assert gpu.labels(gpu.options(["--sides", "numpy", "cupy"])) == ["numpy", "cupy"]


def test_every_option_is_described(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.options(["--help"])
    section = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").partition("## On a GPU")[2]
    for option in set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE)) - {"--threads"}:
        assert f"`{option}`" in section, option
    assert all(re.search(rf"`[a-z ]*\b{name}\b[a-z ]*`", section) for name in gpu.SIDES)


def test_out_takes_a_folder_or_a_path(gpu, tmp_path):
    assert gpu.options(["--out", str(tmp_path)]).out == tmp_path / "gpu"
    assert gpu.options(["--out", str(tmp_path / "x.json")]).out == tmp_path / "x"


def test_without_a_gpu_it_is_one_sentence():
    (done, numpy) = (run("--sizes", "S", "--seconds", "0.01", *more) for more in ([], ["--sides", "numpy"]))
    if "no GPU" not in done.stderr:
        pytest.skip("there is a GPU")
    assert done.returncode == 1 and "--sides numpy" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("gpu: no GPU: ") and "Traceback" not in done.stderr
    assert numpy.returncode == 0 and "| S | 16 | 1,024 |" in numpy.stdout, numpy.stderr


def test_the_report(gpu):
    seen = made_up(gpu)
    page = gpu.page(seen)
    assert "| tiny | 1 | 128 | 10.00 | 2.00 | 3.00 | 4.00 | 5.00 | 0.67 |" in page  # 2 ms by PyTorch's 3 ms
    assert "| XL | 64 | 8,192 | – | 2.00 | 3.00 |" in page and "- XL, batch 64: minilora, NumPy is left out" in page
    assert "With TF32 on:" in page and "| tiny | 1 | 128 | 6.00 | 7.00 | 8.00 | 9.00 | 0.86 |" in page
    assert "| tiny | 1 | 1 | 2 | 3 | 4 |" in page  # MiB of the pools
    assert "9.50 … 15.00" in page  # quartiles of 9, 10, 20
    assert "GPU made up." in page and "python benchmarks/gpu.py --all" in page
    for row in seen["rows"]:
        row["sides"] = {"numpy": row["sides"].get("numpy", row["sides"]["cupy"] | {"pool_bytes": None})}
    alone = gpu.page(seen)
    assert "TF32 on" not in alone and "memory" not in alone and "÷" not in alone


def test_the_figure(gpu, tmp_path):
    gpu.draw(made_up(gpu), tmp_path / "x.png")
    png = (tmp_path / "x.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20]) > 1000


def test_sides_that_do_other_work_stop_the_run(gpu):
    row = made_up(gpu)["rows"][0]
    gpu.check(row)
    assert row["sides"]["cupy"]["apart"] == 0.0
    for change, words in (
        ({"losses": [5.0, 4.9, 4.8, 4.7, 4.6002]}, "differ by more"),
        ({"losses": [5.0, 4.9, 4.8, 4.7, float("nan")]}, "differ by more"),
        ({"trained": 11}, "trains 11"),
    ):
        wrong = copy.deepcopy(row)
        wrong["sides"]["cupy"] |= change
        with pytest.raises(gpu.Failure, match=words):
            gpu.check(wrong)
    rounded = copy.deepcopy(row)
    rounded["sides"]["cupy" + gpu.TF32]["losses"] = [5.0, 4.9, 4.8, 4.7, 4.605]
    gpu.check(rounded)  # TF32 may be further off
    for side in row["sides"].values():
        side["losses"] = [5.0] * 5
    with pytest.raises(gpu.Failure, match="fell too little"):
        gpu.check(row)


def test_a_batch_that_would_take_too_long_on_the_cpu_is_left_out(gpu, monkeypatch):
    side = made_up(gpu)["rows"][0]["sides"]["numpy"] | {"numbers": 3}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu, "measure", lambda label, *_: copy.deepcopy(side))
    args, slow = gpu.options(["--sides", "numpy", "cupy"]), {"S": 1.0}
    row = gpu.row_of("S", 1, args, slow)  # 64 tokens of a second each
    assert set(row["sides"]) == {"cupy"} and "a step would take some 64 s" in row["notes"][0] and row["numbers"] == 3
    slow.clear()
    assert set(gpu.row_of("S", 1, args, slow)["sides"]) == {"numpy", "cupy"}
    assert slow["S"] == pytest.approx(0.010 / 64)


def test_the_side_on_cupy_runs_on_a_stand_in(tmp_path):
    """Through the whole command: facts, build, steps, events, pool, files. Its times mean nothing."""
    (tmp_path / "cupy.py").write_text(CUPY.format(tests=str(ROOT / "tests")))
    words = ["--sizes", "S", "--batches", "2", "--seconds", "0.01", "--sides", "numpy", "cupy", "--tf32"]
    done = run(*words, "--out", tmp_path / "seen", paths=[tmp_path])
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["machine"]["GPU"] == "no card" and seen["machine"]["CuPy"] == "0 (stand-in)"
    (row,) = seen["rows"]
    assert set(row["sides"]) == {"numpy", "cupy", "cupy_tf32"}
    assert row["sides"]["cupy"]["pool_bytes"] == 12345678 and row["sides"]["numpy"]["pool_bytes"] is None
    assert row["sides"]["cupy"]["apart"] < 1e-5
    assert re.search(r"^\| S \| 2 \| 128 \|", (tmp_path / "seen.md").read_text(), re.MULTILINE)
    assert (tmp_path / "seen.png").stat().st_size > 5000
