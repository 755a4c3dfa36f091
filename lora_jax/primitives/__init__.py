"""What each JAX primitive does to the named axes of an adapted weight."""
