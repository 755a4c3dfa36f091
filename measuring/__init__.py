"""What `benchmarks` and `experiments` share: timing, and published models by their shapes."""
