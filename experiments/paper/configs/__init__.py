"""The runs of the paper's experiments, as configs of train.py."""
