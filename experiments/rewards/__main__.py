"""Train policies of several ranks and seeds from rewards, as one program.

    python -m experiments.rewards --task sums --ranks 1 16 --seeds 0 1 2 --out rewards.jsonl

All policies begin with the same short supervised training. Each line of the file has the mean
reward of each policy, its share of questions with different rewards, and its entropy.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from experiments.rewards.grpo import Rules
from experiments.rewards.policies import Policies, Policy, taught
from experiments.rewards.tasks import TASKS
from lora_jax import models
from lora_jax.system.console import Console, guarded, say

TARGETS = ("layers*/attention/{q,v}/kernel",)


@dataclasses.dataclass(frozen=True)
class RewardsOptions:
    """The options of `python -m experiments.rewards`: K = ranks x seeds policies."""

    task: Literal["sums", "sort", "format"] = "sums"
    ranks: tuple[int, ...] = (1, 16)
    seeds: tuple[int, ...] = (0, 1, 2)
    rate: float = 1e-3
    rounds: int = 60
    questions: int = 8
    answers: int = 8
    taught: int = 20
    kl: float = 0.0
    divide: bool = True
    model: str = models.SMOLLM2
    out: str = "runs/rewards.jsonl"


def run(options: RewardsOptions) -> None:
    """Train, and write a line for each round."""
    task, rng, console = TASKS[options.task], np.random.default_rng(0), Console(stderr=True)
    source = models.open(options.model)
    config, words = source.config, source.tokenizer()
    assert isinstance(config, models.DecoderConfig)
    encode = lambda text: words.encode(text, add_special_tokens=False).ids  # noqa: E731
    end = encode("\n")[-1]
    model = models.DecoderModel(config)
    f = lambda params, ids: model.apply({"params": params}, ids)  # noqa: E731
    rows = np.zeros((options.taught, 8, 32), np.int32)
    mask = np.zeros((options.taught, 8, 31), bool)
    for at in np.ndindex(rows.shape[:2]):
        text, answer = task.ask(rng)
        start, whole = encode(text), [*encode(text + answer), end]
        rows[at][: len(whole)], mask[at][len(start) - 1 : len(whole) - 1] = whole, True
    params = taught(f, source.load(config), TARGETS, rows, jnp.asarray(mask), 1e-3)
    members = [Policy(r, s, options.rate) for r in options.ranks for s in options.seeds]
    count = len(members) * options.questions * options.answers
    rules, out = Rules(kl=options.kl, divide=options.divide), pathlib.Path(options.out)
    policies = Policies(config, params, TARGETS, members, rows=count, end=end, rules=rules)
    out.parent.mkdir(parents=True, exist_ok=True)
    for number in range(options.rounds):
        began, asked = time.monotonic(), [task.ask(rng) for _ in range(options.questions)]
        questions = [encode(one.text) for one in asked]
        found = policies.rollout(questions, options.answers, task.tokens, seed=number)
        right = [one.answer for one in asked for _ in range(options.answers)]
        rewards: Any = np.array(
            [[task.reward(words.decode(t), a) for t, a in zip(own, right, strict=True)]
             for own in found.texts]
        ).reshape(len(members), options.questions, -1)  # fmt: skip
        line: dict[str, Any] = {
            "round": number,
            "reward": rewards.mean((1, 2)).tolist(),
            "mixed": (rewards.std(-1) > 0).mean(-1).tolist(),
            "entropy": policies.learn(found, rewards).tolist(),
            "seconds": time.monotonic() - began,
        }
        with out.open("a") as file:
            file.write(json.dumps({**dataclasses.asdict(options), **line}) + "\n")
        say(console, " ".join([str(number), *(f"{x:.2f}" for x in line["reward"])]))


if __name__ == "__main__":
    raise SystemExit(guarded(lambda: run(tyro.cli(RewardsOptions, description=__doc__))))
