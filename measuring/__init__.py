"""What benchmarks, experiments and tests share: timing, published models by their shapes, runs."""
