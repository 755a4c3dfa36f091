"""What `train.py` is made of: the config, the workload, the step, the loop, and what is kept."""
