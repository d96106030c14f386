"""Where the runs of a sweep are executed: processes on this machine, or a Dask cluster."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process

from ..errors import InputError
from ..training.optim import check_positive

BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def local(workers):
    """The executor of ``workers`` processes, each with one BLAS thread; an error in the block ends them at once."""
    check_positive(workers=workers)
    others, before = set(active_children()), {name: os.environ.get(name) for name in BLAS_THREADS}
    os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))  # a process reads them when it starts: at a run, not here
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as executor:
            try:
                yield executor
            except BaseException:
                for process in set(active_children()) - others:
                    process.kill()
                raise
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _start_worker():
    """Leave Ctrl-C to the sweep, and end with it if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent():
    parent_process().join()
    os._exit(1)


@contextmanager
def cluster(address):
    """The executor of the Dask cluster at ``address``. Raises InputError if none can be reached."""
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
