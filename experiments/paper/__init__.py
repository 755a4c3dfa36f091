"""The experiments of the LoRA paper on models that a laptop can train.

`python -m experiments.paper` runs them and writes the report.

    questions       the list of experiments
    experiments     the type of an experiment: its commands, and its part of the report
    costs           the time and memory of a command, and the machine it ran on
    published       the paper's own numbers
    settings        runs that differ only in the seed, as one line of a table
    latency, benefits   the two experiments that measure rather than train
    forward, trained    the programs that these two measure
    latencies       the contents of latency.json, and their section of the report
    page            the report of all experiments

`experiments/paper/configs` contains the configs of the runs, which `train.py` trains.
"""
