"""A side is a process that answers questions, one line of JSON each way: Side is the parent's end, serve the other.

Each side has its own process, so that its memory can be read, its BLAS gets its own number of threads, and neither
finds its threads, its allocator or its modules changed by the other.
"""

import contextlib
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PAUSE = 0.05  # seconds before a turn: idle threads of the other side spin for some 30 ms before they sleep
# Read when NumPy and PyTorch are imported, hence set before the process starts.
THREAD_VARIABLES = ("OMP", "OPENBLAS", "MKL", "BLIS")


class SideError(Exception):
    """What went wrong at a side, in one line; ``missing`` where something is not installed."""

    def __init__(self, message, missing=False):
        super().__init__(message)
        self.missing = missing


class Side:
    """A process that runs ``versus.<module>`` with ``threads`` BLAS and OpenMP threads."""

    def __init__(self, module, threads, cache=None, **variables):
        """``cache``: an empty folder for torch.compile, so that its first step compiles, whatever was run before.

        ``variables``: more of the environment.
        """
        self.module = module
        env = os.environ | {f"{name}_NUM_THREADS": str(threads) for name in THREAD_VARIABLES}
        env["VECLIB_MAXIMUM_THREADS"] = str(threads)
        env |= variables | ({"TORCHINDUCTOR_CACHE_DIR": cache} if cache else {})
        paths = [str(Path(__file__).parents[1]), env.get("PYTHONPATH")]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        # -P: the minilora that is installed, or that PYTHONPATH names, and not the one of the current folder.
        command = [sys.executable, "-P", "-m", "versus.side", module]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)

    def ask(self, question, **arguments):
        """The answer to one question, a method of the side. Raises SideError."""
        try:
            self.process.stdin.write(json.dumps([question, arguments]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideError(f"the process of versus.{self.module} ended, status {self.process.wait()}, at {question}")
        answer, error, missing = json.loads(line)
        if error:
            raise SideError(error, missing)
        return answer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """A side ends when its questions do; one that is stuck is ended."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def in_turns(sides, rounds, **question):
    """The median ms of every turn, side by side: one turn each, ``rounds`` times."""
    turns = {label: [] for label in sides}
    for _ in range(rounds):
        for label, side in sides.items():
            time.sleep(PAUSE)
            turns[label].append(statistics.median(side.ask("turn", **question)))
    return turns


def medians(turns):
    return {label: statistics.median(ms) for label, ms in turns.items()}


def ratio(ours, theirs):
    """Quartiles, over the rounds, of our time by theirs in the same round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios


def serve(module):
    """Answer from ``versus.<module>`` until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    start, side = time.perf_counter(), None
    for line in sys.stdin:
        question, arguments = json.loads(line)
        answer, error, missing = None, None, False
        try:
            side = side or importlib.import_module(f"versus.{module}").Model(start)
            answer = getattr(side, question)(**arguments)
        except Exception as exception:  # the parent decides what becomes of it
            words = [line for line in str(exception).splitlines() if line.strip()] or ["no message"]
            error, missing = f"{type(exception).__name__}: {words[0]}", isinstance(exception, ImportError)
        print(json.dumps([answer, error, missing]), file=answers, flush=True)


def peak_bytes():
    """The most bytes that this process has had resident, or None where the system does not say (not Linux)."""
    status = Path("/proc/self/status")  # not getrusage's maximum, which a child takes over from its parent
    if not status.exists():
        return None
    (high,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(high.split()[1]) * 1024


class Timed:
    """What both sides answer alike. A side has step(), forward() and generate(n); each waits for its result."""

    def __init__(self, start):
        self.start, self.imported = start, self.peak()

    def startup(self, **arguments):
        """Seconds from before the first import to the end of the first training step."""
        self.build(**arguments)
        self.steps(1)
        return time.perf_counter() - self.start

    def steps(self, n):
        """(loss, seconds) of each of ``n`` training steps."""
        seen = []
        for _ in range(n):
            begin = time.perf_counter()
            seen.append((self.step(), time.perf_counter() - begin))
        return seen

    def turn(self, what, n, warm):
        """The milliseconds of each of ``n`` calls of ``what``, after ``warm`` that are not timed."""
        call, marks = getattr(self, what), []
        for _ in range(n + warm):
            marks.append(time.perf_counter())
            call()
        marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks[warm:])]

    def pool(self):
        """The bytes that the array library has taken from the GPU so far, or None on the CPU."""
        return None

    def imports(self):
        """The peak of memory, in MB, when everything was imported and nothing yet built."""
        return self.imported

    def peak(self):
        """The most memory that this process has had resident, in MB, or None where the system does not say."""
        most = peak_bytes()
        return None if most is None else most / 1e6

    def cpu(self):
        """The seconds of processor time that this process has used."""
        return time.process_time()

    def blas(self):
        """NumPy's BLAS: name, version and threads."""
        import threadpoolctl

        found = [lib for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]
        return ", ".join(f"{lib['internal_api']} {lib['version']}" for lib in found) or "unknown to threadpoolctl"


if __name__ == "__main__":
    serve(sys.argv[1])
