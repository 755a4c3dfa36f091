"""Plain Flax models, and the loaders of their published weights."""
