"""The sweep: its grid, its file that outlives a kill, its executors, a real Dask cluster, and what it reports."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from multiprocessing import active_children
from pathlib import Path
from statistics import fmean

import pytest

import minilora
from minilora import GPT, GPTConfig, methods
from minilora.cli import build_parser
from minilora.errors import InputError, TrainingStopped
from minilora.files.base import fingerprint, load_model, save_model
from minilora.lab import figures
from minilora.lab import sweep as module
from minilora.lab.executors import BLAS_THREADS, local
from minilora.lab.results import MARK, Run, read
from minilora.lab.settings import Grid
from minilora.lab.sweep import execute, runs_of, sweep
from minilora.lab.task import Task, tune

ROOT = str(Path(minilora.__file__).parents[1])
DIVERGES = 1e30
# The command in a process of its own: one that a test may kill. A shell's background jobs ignore Ctrl-C.
COMMAND = """
import signal
from minilora.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
raise SystemExit(main())
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "tiny.safetensors"
    save_model(path, GPT(GPTConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2)))
    return str(path.resolve())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "sweep.jsonl"


def command(*argv):
    args = build_parser().parse_args(["sweep", *map(str, argv)])
    return args.run(args)


def environment():
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}


@contextmanager
def process(*argv, **options):
    """The command as a process, which does not outlive a test that fails."""
    line = [sys.executable, "-c", COMMAND, "sweep", *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=environment(), **pipes, **options) as started:
        try:
            yield started
        finally:
            started.kill()


def wait_for(condition, seconds=60):
    """Poll; the limit only turns a hang into a failure."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent has no command line any more."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


def written(path):
    """The file's whole lines, decoded without the code under test."""
    return [json.loads(text) for text in path.read_bytes().split(b"\n")[:-1]]


def keys(path):
    return Counter(Run(**{f.name: line[f.name] for f in fields(Run)}).key() for line in written(path))


def small(base, names=("lora",), rates=(0.01,), seeds=(0, 1), steps=4, r=(2,)):
    return runs_of(Grid(methods=names, r=r, lr=rates, seeds=seeds, steps=steps, batch=2, base=base))


@pytest.fixture
def pretended(base, monkeypatch):
    """Runs that take no time; the list of those that were done. Real ones are trained where it matters."""
    done, mark = [], fingerprint(Task(base).model)

    def pretend(run):
        done.append(run)
        return asdict(run) | {"loss_b": 2.0 + run.lr + 0.01 * run.seed, "loss_b_before": 3.0, "base_sha256": mark}

    monkeypatch.setattr(module, "execute", pretend)
    return done


# --------------------------------------------------------------------------------------------------------- the grid


def test_the_grid_multiplies_a_method_only_by_what_it_has(base):
    grid = Grid(methods=["full,vera", "lora"], r=[2, 4], alpha=[8, 16], lr=[1e-3, 1e-2, 1], seeds=[0, 1], base=base)
    runs = runs_of(grid)
    assert Counter(run.method for run in runs) == {"full": 3 * 2, "vera": 2 * 3 * 2, "lora": 2 * 2 * 3 * 2}
    assert {(run.r, run.alpha) for run in runs if run.method == "vera"} == {(2, None), (4, None)}
    assert {(run.r, run.alpha) for run in runs if run.method == "full"} == {(None, None)}
    assert len({run.key() for run in runs}) == len(runs)
    (run,) = runs_of(Grid(methods=["lora"], lr=[1e-2], seeds=[0], base=base))
    assert (run.r, run.alpha) == (None, None) and run.adapter() == methods.create("lora")


def test_a_key_does_not_depend_on_how_a_number_was_typed_or_where_the_command_stood(base, monkeypatch):
    (whole,) = runs_of(Grid(methods=["lora"], r=[2], alpha=[16], lr=[1], seeds=[0], base=base))
    monkeypatch.chdir(Path(base).parent)
    (decimal,) = runs_of(Grid(methods=["lora"], r=[2], alpha=[16.0], lr=[1.0], seeds=[0], base=Path(base).name))
    assert whole.key() == decimal.key() == Run(**json.loads(json.dumps(asdict(decimal)))).key()
    assert '"alpha": 16.0' in whole.key() and '"lr": 1.0' in whole.key()


BAD = {
    "unknown method": (["--methods", "lora", "lorra"], 'did you mean "lora"'),
    "no method": (["--methods", ","], "at least one"),
    "rank above the layer": (["--methods", "lora", "--r", 4096], "at most 16"),
    "lr twice": (["--lr", 0.1, 0.10], "each value once"),
    "workers 0": (["--methods", "full", "--workers", 0], "workers is 0"),
    "no such base": (["--base", "no-such-model.safetensors"], "no-such-model.safetensors"),
    "report of nothing": (["--report"], "holds no runs"),
    "a picture over the runs": (["--out", "x/picture.png"], "written over"),
    "a record over the runs": (["--out", "a.jsonl", "--record", "a.jsonl"], "written over"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_refused_before_any_work(argv, message, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "sweep", lambda *args, **options: pytest.fail("work began"))
    with pytest.raises(InputError) as caught:
        command("--base", base, "--out", "sweep.jsonl", *argv)
    assert message in str(caught.value) and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- the runs


def test_a_line_holds_the_run_and_its_results(base, out, capsys, monkeypatch):
    """On a process of its own, which has one BLAS thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before, (run,) = dict(os.environ), small(base, ["lora"], steps=20, rates=[0.02], seeds=[5])
    with local(1) as executor:
        (returned,) = sweep([run], executor, out)
        assert [executor.submit(os.getenv, name).result() for name in BLAS_THREADS] == ["1", "1", "1"]
    assert dict(os.environ) == before
    (line,) = written(out)
    assert line == {"minilora_sweep": 1, **returned}
    printed = capsys.readouterr()
    assert "1 runs, 0 of them done already" in printed.out and printed.err == ""  # no bar of a worker's own
    assert {**line, **asdict(run)} == line
    task = Task(base, selection=True)
    model, history, _ = tune(task, run.adapter(), 20, 0.02, 2, 5, progress=False)

    def close(value):  # a BLAS with another number of threads adds in another order
        return pytest.approx(value, rel=1e-5)

    assert (line["loss_a"], line["loss_b"]) == tuple(map(close, task.losses(model)))
    assert line["loss_b"] < line["loss_b_before"] == close(task.losses(task.model)[1])
    assert line["train_loss"] == close(fmean(history.loss[-2:])) != close(fmean(history.loss[-3:]))
    assert line["kept_bytes"] == history.kept_bytes and line["seconds_per_step"] > 0
    assert line["trainable"] == 2 * (4 * 32 + 2 * 80)  # r (d_in + d_out) for q, k, v, o, up and down
    assert line["base_sha256"] == fingerprint(task.model) and line["started"].startswith("20")
    assert line["worker"].split(":")[1] != str(os.getpid())


def test_rates_are_chosen_on_text_that_is_neither_trained_on_nor_reported_on(base):
    selection, report = Task(base, selection=True), Task(base)
    assert selection.tokenizer.decode(report.train_ids).startswith(selection.tokenizer.decode(selection.train_ids))
    assert len(selection.train_ids) < 0.95 * len(report.train_ids)
    before = execute(small(base, steps=1)[0])["loss_b_before"]
    assert before == selection.losses(selection.model)[1] != report.losses(report.model)[1]


def test_failed_runs_are_left_alone_unless_asked_for(base, out, pretended, monkeypatch):
    runs, pretend = small(base, seeds=(0, 1, 2)), module.execute

    def broken(run):
        if pretend(run)["seed"] == 1 and len(pretended) < 4:
            raise MemoryError("no room")
        return pretend(run)

    monkeypatch.setattr(module, "execute", broken)
    with ThreadPoolExecutor(1) as executor:
        sweep(runs, executor, out)
        (failed,) = [line for line in written(out) if "error" in line]
        assert failed["error"] == {"type": "MemoryError", "message": "no room"}
        assert failed.items() >= asdict(runs[1]).items()
        sweep(runs, executor, out)
        assert len(written(out)) == 3
        lines = sweep(runs, executor, out, retry_failed=True)
    assert sorted(line["seed"] for line in written(out)) == [0, 1, 1, 2]
    assert len(lines) == 3 and not [line for line in lines if "error" in line]  # the later line counts
    assert read(out)[0].keys() == {run.key() for run in runs}


# --------------------------------------------------------------------------------------------- stopped and resumed


def test_a_sweep_that_was_killed_goes_on_where_it_stopped(base, out, capsys):
    argv = ["--base", base, "--methods", "lora", "--r", 2, "--lr", 0.01, "--seeds", 0, 1, 2, 3, "--steps", 100,
            "--batch", 2, "--workers", 2, "--out", out]  # fmt: skip
    with process(*argv) as killed:
        wait_for(lambda: out.exists() and written(out))
        killed.kill()
    first = out.read_bytes()
    workers = {int(line["worker"].split(":")[1]) for line in written(out)}
    assert 1 <= len(written(out)) < 4
    wait_for(lambda: not any(map(alive, workers)))  # orphans end themselves
    command(*argv, "--workers", 1)
    assert f"4 runs, {first.count(MARK)} of them done already" in capsys.readouterr().out
    assert set(keys(out).values()) == {1} and len(keys(out)) == 4
    assert out.read_bytes().startswith(first[: first.rfind(b"\n") + 1])


@pytest.mark.parametrize("cut", [1, -1], ids=["one byte", "all but the newline"])
def test_half_a_line_is_cut_off_and_its_run_done_again(cut, base, out, pretended):
    runs = small(base, seeds=(0, 1, 2))
    with ThreadPoolExecutor(1) as executor:
        sweep(runs, executor, out)
        whole = out.read_bytes().split(b"\n")[:-1]
        kept, half = whole[0] + b"\n" + whole[1] + b"\n", (whole[2] + b"\n")[:cut]
        out.write_bytes(kept + half)
        assert len(read(out)[0]) == 2
        lines = sweep(runs, executor, out)
    assert len(lines) == 3 and keys(out) == Counter(run.key() for run in runs)
    assert out.read_bytes().startswith(kept + MARK)


def test_each_line_is_on_the_disk_before_the_next_is_written_and_an_interruption_cancels(
    base, out, pretended, monkeypatch
):
    synced, pretend = [], module.execute

    def fsync(number):
        if out.exists():  # its folder, which is made new, is synced before there is a file in it
            synced.append(len(written(out)))
        if len(synced) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(module, "execute", lambda run: time.sleep(0.02) or pretend(run))
    with ThreadPoolExecutor(1) as executor, pytest.raises(KeyboardInterrupt):
        sweep(small(base, seeds=range(30)), executor, out)
    assert synced == [1, 2, 3] and len(pretended) < 30


def ignores_ctrl_c(pid):
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status.get("SigIgn", "0"), 16) >> (signal.SIGINT - 1) & 1


def test_ctrl_c_waits_for_no_run_and_leaves_no_process(base, out):
    argv = ["--base", base, "--methods", "lora", "--lr", 0.01, 0.02, "--steps", 10**7, "--workers", 1, "--out", out]
    with process(*argv, start_new_session=True) as stopped:
        children = Path(f"/proc/{stopped.pid}/task/{stopped.pid}/children")
        if not children.exists():
            pytest.skip("this system does not list the children of a process")
        wait_for(lambda: sum(map(ignores_ctrl_c, children.read_text().split())) == 2)  # and a tracker of Python's own
        pids = children.read_text().split()
        os.killpg(stopped.pid, signal.SIGINT)  # to the workers as well, as a terminal does
        _, errors = stopped.communicate(timeout=60)  # one run would take hours
    assert stopped.returncode == 130 and errors == "\nminilora: stopped\n"
    wait_for(lambda: not any(map(alive, pids)))
    assert written(out) == []


def kill_first_child():
    """Kill this process's next child as soon as it is there."""

    def kill():
        wait_for(active_children)
        active_children()[0].kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_a_worker_that_dies_ends_the_sweep_which_resumes(base, out):
    runs = small(base, seeds=range(2))
    killer = kill_first_child()
    with pytest.raises(TrainingStopped, match="the same command again resumes"), local(1) as executor:
        sweep(runs, executor, out)
    killer.join()
    assert written(out) == []
    with ThreadPoolExecutor(1) as executor:
        lines = sweep(runs, executor, out)
    assert keys(out) == Counter(run.key() for run in runs) and not [line for line in lines if "error" in line]


FOREIGN = {
    "text": b"my notes\n",
    "another version": b'{"minilora_sweep": 2, ' + json.dumps(asdict(Run("lora", 0.1, 0, 1, 1))).encode()[1:] + b"\n",
    "binary": b"\x93NUMPY\x00\xff",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_something_else_is_left_as_it_is(content, base, tmp_path):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    for argv in ([], ["--report"], ["--record", tmp_path / "rates.json"], ["--out", tmp_path]):
        with pytest.raises(InputError, match="not a file of a sweep"):
            command("--base", base, "--methods", "full", "--workers", 1, "--out", path, *argv)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_runs_that_cannot_be_compared_do_not_share_a_file(base, out, tmp_path, pretended):
    changed = tmp_path / "tiny.safetensors"
    save_model(changed, load_model(base))
    with ThreadPoolExecutor(1) as executor:
        sweep(small(changed), executor, out)
        before = out.read_bytes()
        for runs in (small(changed, steps=5), small(base)):
            with pytest.raises(InputError, match="other steps, batch or base model"):
                sweep(runs, executor, out)
        save_model(changed, GPT(GPTConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2), rng=1))
        with pytest.raises(InputError, match="base model"):
            sweep(small(changed), executor, out)
        assert out.read_bytes() == before
        save_model(changed, load_model(base))
        assert len(sweep(small(changed, ["full"]), executor, out)) == 4  # another method may join


# ------------------------------------------------------------------------------------------------------ a real cluster


@pytest.fixture(scope="module")
def scheduler():
    """The address of a Dask scheduler with two workers, each a process of its own, on a free port of this machine."""
    distributed = pytest.importorskip("distributed", reason="the extra dask is not installed")
    dask = pytest.importorskip("dask")
    options = {"threads_per_worker": 1, "dashboard_address": None, "memory_limit": 0, "silence_logs": 50}
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})  # it imports once for all workers
    with distributed.LocalCluster(n_workers=2, **options) as cluster:
        yield cluster.scheduler_address


def test_a_sweep_on_a_dask_cluster_uses_both_workers(scheduler, base, out, capsys):
    argv = ["--base", base, "--methods", "lora", "full", "--r", 2, "--lr", 0.01, DIVERGES, "--seeds", 0, 1, 2]
    argv += ["--steps", 20, "--batch", 2, "--dask", scheduler, "--out", out]
    command(*argv)
    printed = capsys.readouterr().out
    assert "failed at 1e+30" in printed and "failed otherwise" not in printed
    lines = written(out)
    assert len(lines) == 12 and set(keys(out).values()) == {1}
    assert {line["lr"] for line in lines if "error" in line} == {DIVERGES}  # they do not end the others
    errors = [line["error"] for line in lines if "error" in line and line["method"] == "lora"]
    assert {error["type"] for error in errors} == {"TrainingStopped"} and "the loss is nan" in errors[0]["message"]
    workers = {line["worker"] for line in lines if "error" not in line}
    assert len(workers) == 2 and not [w for w in workers if w.endswith(f":{os.getpid()}")]
    command(*argv)
    assert "12 runs, 12 of them done already" in capsys.readouterr().out and len(written(out)) == 12


def test_a_cluster_that_cannot_be_reached_is_one_clear_sentence(base, out, monkeypatch):
    argv = ["--base", base, "--methods", "full", "--out", out, "--dask"]
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r'pip install "minilora\[dask\]"'):
        patch.setitem(sys.modules, "distributed", None)  # importing it raises ImportError
        command(*argv, "tcp://127.0.0.1:1")
    pytest.importorskip("distributed", reason="the extra dask is not installed")
    with process(*argv, "tcp://127.0.0.1:1") as refused:
        _, errors = refused.communicate(timeout=120)
    assert refused.returncode == 2 and errors.count("\n") == 1  # nothing more from threads that end
    assert errors.startswith('minilora: error: no Dask scheduler answers at "tcp://127.0.0.1:1": ')
    assert not out.exists()


# ------------------------------------------------------------------------------------------- the report and the record


def fill(path, *curves, before=2.0):
    """A sweep's file: (method, {rate: losses or errors of seeds 0, 1 …}) or (method, r, alpha, {…})."""
    text = b""
    for name, *setting, curve in curves:
        r, alpha = setting or (None, None)
        for rate, results in curve.items():
            for seed, result in enumerate(results):
                line = asdict(Run(name, rate, seed, 10, 2, None, r, alpha))
                if isinstance(result, str):
                    line["error"] = {"type": result, "message": "as expected"}
                else:
                    line |= {"loss_b": result, "loss_b_before": before, "base_sha256": "0"}
                text += MARK + json.dumps(line).encode()[1:] + b"\n"
    path.write_bytes(text)
    return path


STOPPED = "TrainingStopped"
INSIDE = {0.001: [1.9, 1.9], 0.01: [1.5, 1.7], 0.1: [1.8, 1.8]}
LOWEST = {0.002: [1.4, 1.4], 0.01: [1.5, 1.5]}
CLIFF = {0.02: [1.8, 1.8], 0.05: [1.7, 1.7], 0.2: [1.1, STOPPED]}  # one seed's good luck is no good rate


def test_the_report_tells_the_best_rate_its_neighbours_and_the_edge(tmp_path, capsys):
    broken = {0.1: ["MemoryError"], 0.2: [STOPPED]}
    path = fill(tmp_path / "sweep.jsonl", ("lora", INSIDE), ("vera", LOWEST), ("dora", CLIFF), ("full", broken))
    command("--report", "--out", path)
    printed = capsys.readouterr().out
    assert "1 failed otherwise (MemoryError: as expected): --retry-failed" in printed
    rows = {row.split()[0]: " ".join(row.split()) for row in printed.splitlines()}
    assert rows["lora"] == "lora 0.01 1.600 ± 0.141 1.900 at 0.001 1.800 at 0.1 6 0"
    assert rows["vera"] == "vera 0.002 1.400 ± 0.000 edge of grid 1.500 at 0.01 4 0"
    assert rows["dora"] == "dora 0.05 1.700 ± 0.000 1.800 at 0.02 failed at 0.2 6 1"
    assert "failed" in rows["full"]
    assert rows["Written:"] == f"Written: {tmp_path / 'sweep.png'}"
    assert (tmp_path / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def axes_of(path):
    lines = list(read(path)[0].values())
    return {axes.get_title(loc="left"): axes for axes in figures.sweep(lines).axes}


def test_the_figure_has_a_panel_for_each_method_with_its_best_rate(tmp_path):
    panels = axes_of(fill(tmp_path / "a", ("lora", INSIDE), ("dora", CLIFF)))
    found = {name: axes.get_title(loc="right") for name, axes in panels.items()}
    assert found == {"dora": "★ 0.05", "lora": "★ 0.01"}
    drawn = {line.get_label(): line for line in panels["dora"].lines}
    assert list(drawn["dora"].get_xdata()) == list(CLIFF)
    assert list(drawn["dora"].get_ydata()) == pytest.approx([1.8, 1.7, 2.0])  # cut off at the loss before tuning
    marked = {line.get_marker(): line for line in panels["dora"].lines}
    assert (list(marked["X"].get_xdata()), list(marked["*"].get_xdata())) == ([0.2], [0.05])
    assert panels["dora"].get_ylim()[1] == 2.0 and panels["dora"].get_xscale() == "log"


def test_the_figure_has_a_panel_for_each_rank_and_alpha_where_several_were_swept(tmp_path):
    rank_4 = {0.01: [1.1, 1.1]}
    path = fill(tmp_path / "a", ("lora", 2, 8.0, INSIDE), ("lora", 4, 8.0, rank_4), ("vera", 2, None, LOWEST),
                ("full", None, None, CLIFF))  # fmt: skip
    shown = {
        title: {line.get_label() for line in axes.lines if not line.get_label().startswith("_")}
        for title, axes in axes_of(path).items()
    }
    assert shown == {"r = 2, alpha = 8": {"lora", "vera", "full"}, "r = 4, alpha = 8": {"lora", "full"}}


def test_the_record_has_the_form_of_learning_rates_json(tmp_path):
    low = {0.001: [1.9, 1.9], 0.002: [1.2, 1.2], 0.01: [1.8, 1.8]}
    path = fill(tmp_path / "a.jsonl", ("vera", low), ("lora", 2, 8.0, INSIDE), ("lora", 4, 8.0, CLIFF), ("full", CLIFF))
    rates = tmp_path / "rates.json"
    command("--record", rates, "--out", path)
    recorded, shipped = json.loads(rates.read_text()), Path(minilora.__file__).parent / "learning_rates.json"
    assert recorded == {"default": 0.01, "methods": {"full": 0.05, "lora": 0.01, "vera": 0.002}}
    assert recorded.keys() == json.loads(shipped.read_text()).keys()


REFUSED = {
    "at the edge": ({"lora": INSIDE, "vera": {0.1: [1.5], 0.2: [1.4]}}, "vera is best at the edge of the grid, 0.2"),
    "seeds missing": ({"lora": {**INSIDE, 0.1: [1.8]}}, "lora lacks seeds"),
    "nothing finished": ({"lora": {0.1: [STOPPED], 0.2: [STOPPED], 0.3: [STOPPED]}}, "lora lacks seeds"),
    "failed for another reason": ({"lora": {**INSIDE, 0.2: ["OSError", 1.9]}}, "--retry-failed"),
}


@pytest.mark.parametrize(("curves", "message"), REFUSED.values(), ids=REFUSED)
def test_a_rate_that_is_not_known_yet_is_not_recorded(curves, message, tmp_path):
    path, rates = fill(tmp_path / "a.jsonl", *curves.items()), tmp_path / "rates.json"
    with pytest.raises(InputError) as caught:
        command("--record", rates, "--out", path)
    assert message in str(caught.value) and not rates.exists()
    if "edge" in message:
        command("--record", rates, "--out", path, "--allow-edge")
        assert json.loads(rates.read_text())["methods"]["vera"] == float(message.split()[-1])
