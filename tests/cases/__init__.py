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

# One program for each rule and each kind of control flow that a weight can meet.
ONE_OF_EACH = (
    "bare_batched_product", "bare_ragged_dot", "bare_experts_by_index", "bare_fused_reshape",
    "bare_sliced_scaled_reversed", "bare_unrolled_stack", "bare_row_by_static_index", "bare_while",
    "bare_cond", "bare_custom_jvp", "bare_custom_jvp_straight_through", "shard_map_all_gather",
    "linen_conv_grouped", "linen_embed_tied", "linen_scan_remat",
)  # fmt: skip
