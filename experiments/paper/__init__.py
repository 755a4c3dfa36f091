"""The paper's questions, asked of a model that a laptop can train: `python -m experiments.paper`.

    experiments   what is run: commands, and what of the report they make
    costs         what a command took, and on what machine
    published     the paper's own numbers
    settings      runs that differ in the seed alone, as one line of a table
    latency, benefits   what is measured rather than trained
    forward, trained    the programs that they measure
    latencies   what the first of them keeps, and what the report says of it
    measured    on what machine, in turns, and kept as JSON
    shapes      published models with random weights
    sections      what the report says of each question

`experiments/paper/configs` holds the runs themselves, which `train.py` trains.
"""
