"""One BLAS thread for all tests: their matrices are small, and on a busy machine two can be ten times slower."""

import os

for library in ("OPENBLAS", "OMP", "MKL"):  # read when NumPy is first imported, which is after this file
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
