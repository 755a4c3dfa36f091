"""The claims of what came after LoRA, tested with a tuned learning rate for every method.

`python -m experiments.sequel` runs the tables and writes the report.

    claims      what the papers say, with their numbers
    cells       one cell of a table: a run of train.py with a method, a learning rate and a seed
    results     the scores of all cells, in one file
    programs    trains cells, those with the same shapes as one program
    grids       grids of learning rates that go on until the best is not at an edge
    verdicts    "holds here", "does not hold here", "cannot be told at this size"
    tables      the tables: their methods and their claims
    formats     what a format of the base loses before any training
    page        the report
"""
