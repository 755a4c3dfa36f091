"""All models of packages that we did not write."""

# Each module adds its models to REGISTRY.
from tests.foreign import equinox_models, flax_models, keras_models, penzai_models  # noqa: F401
from tests.foreign.register import REGISTRY as REGISTRY
