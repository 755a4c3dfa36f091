"""The small model of own_model.py, with a split that is evaluated after the last checkpoint."""

from __future__ import annotations

import dataclasses

from configs.own_model import OwnConfig
from configs.own_model import config as OWN
from configs.own_model import workload as own
from lora_jax.training.workload import Workload


def workload(config: OwnConfig) -> Workload:
    """Return the workload of own_model.py with a test split."""
    made = own(config)
    evaluation = {**made.evaluation, "test": made.evaluation["validation"]}
    return dataclasses.replace(made, evaluation=evaluation)


config = dataclasses.replace(OWN, workload=workload)
