"""Code that benchmarks, experiments and tests share: timing, published models, golden runs."""
