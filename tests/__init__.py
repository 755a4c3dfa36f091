"""The tests; this file is imported before any other, and so before NumPy.

One thread for NumPy's linear algebra: workers take all cores already, and OpenBLAS's threads spin
while they wait for one, which made a decomposition ten times as dear.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
