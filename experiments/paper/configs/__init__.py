"""The runs of the paper's questions, as configs of train.py."""
