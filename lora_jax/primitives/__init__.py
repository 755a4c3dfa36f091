"""The rules of JAX primitives: how each acts on the named axes of an adapted weight."""
