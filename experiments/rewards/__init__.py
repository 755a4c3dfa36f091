"""Learn from rewards by GRPO: many policies, each an adapter, roll out and train as one program.

`python -m experiments.rewards` trains policies of several ranks and seeds of SmolLM2 on tasks with
an answer that a script checks.
"""
