"""The models of the packages that we did not write, all together."""

# Each module enters its models in REGISTRY.
from tests.foreign import equinox_models, flax_models, keras_models, penzai_models  # noqa: F401
from tests.foreign.register import REGISTRY as REGISTRY
