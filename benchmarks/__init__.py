"""Measurements of the transform: FLOPs, step time, tracing time, and PyTorch + PEFT beside it."""
