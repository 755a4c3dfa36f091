"""Set NumPy's threads for all tests: Python imports this package before a test imports NumPy.

NumPy's linear algebra gets one thread. The test workers already use every core, and a thread of
OpenBLAS that waits for a core spins, which made a decomposition ten times slower.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
