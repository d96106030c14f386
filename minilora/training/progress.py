"""Progress bars: tqdm's on a terminal, and elsewhere nothing, which waits for no process that was killed."""

import sys
from contextlib import nullcontext


def progress_bar(total, label, show=None, done=0):
    """A tqdm bar on standard error; silent unless ``show``, by default where that is a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        return Silent()
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=label, unit="it", dynamic_ncols=True, leave=False)


class Silent(nullcontext):
    """A bar that shows nothing.

    tqdm's own, ``disable=True``, starts a thread and takes a lock that forked processes share: one that is killed while
    it has the lock keeps it, and all others wait for ever.
    """

    def __enter__(self):
        return self

    def update(self, n=1):
        pass

    def set_postfix_str(self, s, refresh=True):
        pass


class Progress:
    """A callback of train(): a bar with loss, tokens per second and the time that is left."""

    def __init__(self, steps, label, show=None, done=0):
        self.bar = progress_bar(steps, label, show, done)

    def __call__(self, step, history):
        self.bar.update()
        speed = history.tokens_per_step / history.seconds[-1]
        self.bar.set_postfix_str(f"loss {history.loss[-1]:.3f}, {speed:,.0f} tok/s", refresh=False)

    def __enter__(self):
        self.bar.__enter__()
        return self

    def __exit__(self, *exception):
        return self.bar.__exit__(*exception)
