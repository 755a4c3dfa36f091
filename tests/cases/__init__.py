"""The table of programs that the transform must handle: Linen, NNX and plain JAX.

Every dimension of a weight is chosen so that no activation has as many elements as the weight. So
the tests can tell a product `a @ b`, or a gradient of W, by its size alone.
"""

# Each module adds its programs to REGISTRY.
from tests.cases import bare, control_flow, linen_modules, mapped, nnx_modules  # noqa: F401
from tests.cases.case import REGISTRY as REGISTRY
from tests.cases.case import Case as Case
from tests.cases.case import near_ones_and_zeros as near_ones_and_zeros
from tests.cases.case import normal as normal
