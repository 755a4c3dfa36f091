"""GRPO: the loss by hand, and policies that learn a reward as one program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.rewards import grpo
from experiments.rewards.grpo import Rules
from experiments.rewards.policies import Policies, Policy, taught
from experiments.rewards.tasks import TASKS
from lora_jax import models
from measuring.golden_runs import GOLDEN

MASK = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
ADVANTAGE = jnp.array([1.0, -2.0])


def test_advantages_are_of_the_group() -> None:
    rewards = jnp.array([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_allclose(grpo.advantages(rewards)[0], [-1, 1, 1, -1], rtol=1e-3)
    assert not grpo.advantages(rewards)[1].any(), "a group of equal rewards teaches nothing"
    assert grpo.advantages(rewards, divide=False)[0].tolist() == [-0.5, 0.5, 0.5, -0.5]


@pytest.mark.parametrize(
    ("aggregation", "weights"), [("tokens", [1, 1, 1]), ("rows", [0.75, 0.75, 1.5])]
)
def test_the_gradient_at_the_old_policy_is_that_of_reinforce(
    aggregation: str, weights: list[float]
) -> None:
    old = jnp.array([[-1.0, -2.0, -3.0], [-0.5, -1.0, -1.0]])
    rules = Rules(aggregation=aggregation)  # type: ignore[arg-type]
    found = jax.grad(grpo.loss)(old, old, old, ADVANTAGE, MASK, rules)
    want = np.zeros((2, 3))
    want[[0, 0, 1], [0, 1, 0]] = -np.array([1, 1, -2]) * weights / 3
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_a_ratio_beyond_the_clip_has_no_gradient_in_its_direction() -> None:
    new, old = jnp.log(jnp.array([[1.5]])), jnp.zeros((1, 1))
    one = jnp.ones((1, 1))
    slope = jax.grad(grpo.loss)
    assert slope(new, old, old, jnp.array([1.0]), one, Rules()) == 0
    assert slope(new, old, old, jnp.array([-1.0]), one, Rules()) == pytest.approx(1.5)


def test_the_divergence_is_zero_at_the_base_and_positive_elsewhere() -> None:
    rules, zero = Rules(kl=1.0), jnp.zeros(2)
    base = jnp.array([[-1.0, -2.0, -3.0], [-0.5, -1.0, -1.0]])
    assert grpo.loss(base, base, base, zero, MASK, rules) == 0
    for shift in (-0.5, 0.5):
        got = grpo.loss(base + shift, base + shift, base, zero, MASK, rules)
        assert got == pytest.approx(np.exp(-shift) + shift - 1, rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_a_right_answer_has_the_whole_reward_and_another_less(name: str) -> None:
    task, rng = TASKS[name], np.random.default_rng(0)
    first, others = task.ask(rng), [task.ask(rng) for _ in range(8)]
    assert task.reward(first.answer, first.answer) == 1
    other = next(x.answer for x in others if x.answer != first.answer)
    assert task.reward(other, first.answer) < 1
    assert task.reward("", first.answer) == 0


def test_a_number_in_brackets_has_half_of_the_reward() -> None:
    assert TASKS["format"].reward(" [3]", " [7]") == 0.5
    assert TASKS["format"].reward(" 7", " [7]") == 0
    assert TASKS["sums"].reward(" 12, or so", " 12") == 1
    assert TASKS["sums"].reward(" 1 2", " 12") == 0


def tiny(policies: list[Policy], answers: int) -> Policies:
    source = models.open(str(GOLDEN / "llama"))
    assert isinstance(source.config, models.DecoderConfig)
    rows = len(policies) * 2 * answers
    targets = ("layers*/attention/*/kernel", "layers*/mlp/*/kernel")
    return Policies(
        source.config,
        source.load(),
        targets,
        policies,
        rows=rows,
        end=1,
        rules=Rules(),
    )


@pytest.mark.slow
def test_policies_of_two_ranks_learn_a_reward_as_one_program() -> None:
    """The reward is the share of even tokens. Padding of the ranks stays zero."""
    policies = tiny([Policy(1, 0, 2e-2), Policy(4, 1, 2e-2)], answers=8)
    means = []
    for number in range(25):
        found = policies.rollout([[3, 4], [5, 6, 7]], 8, 5, seed=number)
        share = [[np.mean([x % 2 == 0 for x in t] or [0]) for t in own] for own in found.texts]
        rewards = np.array(share).reshape(2, 2, 8)
        means.append(rewards.mean((1, 2)))
        policies.learn(found, rewards)
    first, last = np.mean(means[:3], axis=0), np.mean(means[-3:], axis=0)
    assert (first < 0.7).all()
    assert (last > 0.9).all(), (first, last)
    one, four = policies.adapters
    assert {t.rank for t in one.layout.targets} == {1}
    padded = policies.layout.targets[0].path
    assert not np.asarray(policies._stack.factors[padded].a[0])[..., 1:].any()
    assert np.asarray(four.parameters[padded].b).any()


@pytest.mark.slow
def test_a_rollout_marks_what_was_written_and_each_row_has_its_policy() -> None:
    policies = tiny([Policy(1, 0, 1e-2), Policy(2, 1, 1e-2)], answers=2)
    found = policies.rollout([[3, 4], [5, 6, 7]], 2, 5, seed=0)
    for k, row in np.ndindex(2, 4):
        text, prompt = found.texts[k][row], [[3, 4], [5, 6, 7]][row // 2]
        written = found.ids[k, row, 1:][found.mask[k, row]].tolist()
        assert written[: len(text)] == text
        assert written[len(text) :] in ([], [1])
        assert found.ids[k, row, : len(prompt)].tolist() == prompt
    old, base = policies._score(policies._factors, policies._params, found.ids)
    np.testing.assert_allclose(old, base, atol=1e-6)  # fresh adapters change nothing


@pytest.mark.slow
def test_teaching_makes_the_answers_likely() -> None:
    source = models.open(str(GOLDEN / "llama"))
    model = models.DecoderModel(source.config)
    f = lambda params, ids: model.apply({"params": params}, ids)  # noqa: E731
    rows = np.tile(np.array([[3, 4, 9, 8, 1]], np.int32), (30, 4, 1))
    mask = np.zeros((30, 4, 4), bool)
    mask[..., 1:] = True
    params = source.load()
    after = taught(f, params, ("layers*/**/kernel",), rows, mask, 3e-2)
    likely = lambda p: float(grpo.scores(f(p, rows[0]), rows[0])[0][:, 1:].mean())  # noqa: E731
    assert likely(after) > likely(params) + 1
    assert lora_jax.paths.shapes(after) == lora_jax.paths.shapes(params)
