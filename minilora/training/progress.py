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
    """What a bar that shows nothing does.

    tqdm's own, ``disable=True``, starts a thread and takes a lock that forked processes share: one that is killed while
    it has the lock keeps it, and all others wait for ever.
    """

    def __enter__(self):
        return self

    def update(self, n=1):
        pass

    def set_postfix_str(self, s, refresh=True):
        pass
