"""Where the runs of a sweep are executed: processes on this machine, or a Dask cluster."""

import os
import signal
import threading
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process

from ..errors import InputError
from ..training.optim import check_positive

BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Local(Executor):
    """``workers`` processes, each with one BLAS thread; all are replaced when one dies, and ended at once by Ctrl-C."""

    def __init__(self, workers):
        check_positive(workers=workers)
        self.others, self.saved = active_children(), {name: os.environ.get(name) for name in BLAS_THREADS}
        os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))  # a process reads it when it starts: at a run, not here
        self.start = lambda: ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
        self.pool = self.start()

    def submit(self, fn, /, *args):
        try:
            return self.pool.submit(fn, *args)
        except BrokenExecutor:
            self.pool = self.start()
            return self.pool.submit(fn, *args)

    def __exit__(self, kind, *_):
        for process in set(active_children()) - set(self.others) if kind else ():
            process.kill()
        self.pool.shutdown()
        for name, value in self.saved.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def _start_worker():
    """Ctrl-C is the sweep's to handle, and a worker whose sweep was killed does not live on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


@contextmanager
def cluster(address):
    """The executor of the Dask cluster at ``address``. Raises InputError where none can be reached."""
    try:
        import asyncio  # here alone: it would cost every command a thirtieth of a second

        import distributed

        asyncio.run(asyncio.wait_for(distributed.comm.connect(address, timeout=3), 4)).abort()  # a Client would linger
    except ImportError:
        raise InputError('--dask needs the package "distributed": pip install "minilora[dask]"') from None
    except (OSError, ValueError) as error:
        raise InputError(f'no Dask scheduler answers at "{address}": {str(error) or "timed out"}') from error
    with distributed.Client(address, set_as_default=False) as client:
        yield client.get_executor(pure=False)  # pure: one run of two sweeps would be trained once
