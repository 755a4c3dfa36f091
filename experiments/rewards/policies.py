"""K policies over one base: each is an adapter of its own rank, seed and learning rate.

A rollout is one decoding batch, in which each row has its policy. A step is one program: the
factors are stacked, padded with zeros to the largest rank, which stay zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from experiments.rewards import grpo
from experiments.rewards.grpo import Rules
from lora_jax import Adapter, Layout, LoraSpec, models, multi
from lora_jax.serving.generation import Decoder
from lora_jax.serving.jobs import Prompt
from lora_jax.serving.sampling import Sampling

AT_ONCE = 2  # policies that go through the model at the same time in a step
CAPACITY = 48  # tokens of a question and its answer


class Policy(NamedTuple):
    """The settings of a policy. alpha is 2 * rank."""

    rank: int
    seed: int
    rate: float


class Answers(NamedTuple):
    """The answers of K policies; B is questions x answers.

    ids: [K, B, T], the question, the answer and padding.
    mask: [K, B, T - 1], whether the token after each was written by the policy.
    texts: the tokens of each answer, without the one that ends it.
    """

    ids: Any
    mask: Any
    texts: list[list[list[int]]]


class Policies:
    """The policies, their optimizer, and the compiled programs."""

    def __init__(
        self,
        config: models.DecoderConfig,
        params: Any,
        targets: tuple[str, ...],
        policies: Sequence[Policy],
        *,
        rows: int,
        end: int,
        rules: Rules,
    ) -> None:
        """Draw the adapters. `end` is the token that ends an answer; nothing is compiled yet."""
        self.policies, self._params, self._end, self._rules = policies, params, end, rules
        model = models.DecoderModel(config)
        f = lambda params, ids: model.apply({"params": params}, ids)  # noqa: E731
        members = []
        for one in policies:
            spec = LoraSpec(one.rank, 2.0 * one.rank, targets)
            layout = lora_jax.resolve(spec, f, params, jnp.zeros((1, 2), jnp.int32))
            members.append(Adapter(layout, lora_jax.init(jax.random.key(one.seed), layout)))
        self._own = [member.layout for member in members]
        self.layout, self._stack = multi.stack(members)
        self._tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))
        self._opt = jax.vmap(self._tx.init)(self._factors)
        how = {"rows": rows, "capacity": CAPACITY}
        self._decoder = Decoder(config, params, self.layout, self._stack, **how)
        self._rates = jnp.array([one.rate for one in policies], jnp.float32)
        self._scales = jax.tree.map(lambda x: x[:-1], self._stack.scales)
        self._score = jax.jit(self._scored)
        self._update = jax.jit(self._updated)
        self._f, self._adapted = f, lora_jax.adapt(self.layout, f)

    @property
    def _factors(self) -> Any:
        """The factors of the policies, without the base's slot of zeros."""
        return jax.tree.map(lambda x: x[:-1], self._stack.factors)

    @property
    def adapters(self) -> list[Adapter]:
        """Each policy as an ordinary adapter, in its own rank."""
        return [Adapter(own, multi.unstack(own, self._stack, i)) for i, own in enumerate(self._own)]

    def rollout(
        self, questions: Sequence[Sequence[int]], answers: int, most: int, seed: int
    ) -> Answers:
        """Let every policy answer every question so many times, with at most `most` tokens."""
        rows = [q for q in questions for _ in range(answers)]
        prompts = [
            Prompt(q, adapter=k, stop=(self._end,)) for k in range(len(self.policies)) for q in rows
        ]
        jobs = self._decoder.submit(prompts, most, Sampling(temperature=1.0, seed=seed))
        texts: list[list[int]] = [[] for _ in prompts]
        ended = set[int]()
        for piece in self._decoder.read(jobs):
            if piece.token is not None:
                texts[piece.row].append(piece.token)
            elif piece.finish == "stop":
                ended.add(piece.row)
        width = max(map(len, rows)) + most
        ids = np.zeros((len(prompts), width), np.int32)
        mask = np.zeros((len(prompts), width - 1), bool)
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            whole = [*prompt.tokens, *text, *([self._end] if i in ended else [])]
            ids[i, : len(whole)] = whole
            mask[i, len(prompt.tokens) - 1 : len(whole) - 1] = True
        shape = (len(self.policies), len(rows), -1)
        split = [texts[i : i + len(rows)] for i in range(0, len(texts), len(rows))]
        return Answers(ids.reshape(shape), mask.reshape(shape), split)

    def learn(self, answers: Answers, rewards: Any, steps: int = 1) -> Any:
        """Take steps on the answers, whose rewards are [K, questions, answers].

        Returns the mean entropy of the tokens that were written, [K].
        """
        advantage = grpo.advantages(jnp.asarray(rewards), self._rules.divide)
        advantage = advantage.reshape(len(self.policies), -1)
        old, base = self._score(self._factors, self._params, answers.ids)
        for _ in range(steps):
            own = (self._factors, self._opt, self._params)
            batch = (answers.ids, answers.mask, advantage, old, base)
            factors, self._opt, entropy = self._update(*own, batch)
            with_base = lambda x, all: jnp.concatenate([x, all[-1:]])  # noqa: E731
            whole = jax.tree.map(with_base, factors, self._stack.factors)
            self._stack = dataclasses.replace(self._stack, factors=whole)
        self._decoder.put(self._params, self._stack)
        return entropy

    def _scored(self, factors: Any, params: Any, ids: Any) -> tuple[Any, Any]:
        """Return the log probabilities by each policy and by the base, [K, B, T - 1]."""

        def one(own: Any) -> tuple[Any, Any]:
            factors, scales, ids = own
            chosen = multi.Scaled(factors, scales)
            new, _ = grpo.scores(self._adapted(params, chosen, ids), ids)
            return new, grpo.scores(self._f(params, ids), ids)[0]

        return jax.lax.map(one, (factors, self._scales, ids), batch_size=AT_ONCE)

    def _updated(self, factors: Any, opt: Any, params: Any, batch: Any) -> Any:
        def one(own: Any) -> Any:
            factors, opt, scales, rate, (ids, mask, advantage, old, base) = own

            def loss(factors: Any) -> tuple[Any, Any]:
                logits = self._adapted(params, multi.Scaled(factors, scales), ids)
                new, entropy = grpo.scores(logits, ids)
                said = (entropy * mask).sum() / jnp.maximum(mask.sum(), 1)
                return grpo.loss(new, old, base, advantage, mask, self._rules), said

            grads, entropy = jax.grad(loss, has_aux=True)(factors)
            updates, opt = self._tx.update(grads, opt)
            moved = jax.tree.map(lambda x, u: x - rate * u, factors, updates)
            return moved, opt, entropy

        own = (factors, opt, self._scales, self._rates, batch)
        return jax.lax.map(one, own, batch_size=AT_ONCE)


def taught(f: Any, params: Any, targets: tuple[str, ...], rows: Any, mask: Any, rate: float) -> Any:
    """Return the base, trained on rows [steps, B, T] where `mask` says, with the update merged."""
    layout: Layout = lora_jax.resolve(LoraSpec(8, 16.0, targets), f, params, rows[0])
    g, tx = lora_jax.adapt(layout, f), optax.adam(rate)

    @jax.jit
    def step(own: Any, opt: Any, params: Any, ids: Any, mask: Any) -> Any:
        def loss(own: Any) -> Any:
            chosen, _ = grpo.scores(g(params, own, ids), ids)
            return -(chosen * mask).sum() / mask.sum()

        updates, opt = tx.update(jax.grad(loss)(own), opt)
        return optax.apply_updates(own, updates), opt

    own = lora_jax.init(jax.random.key(0), layout)
    opt = tx.init(own)
    for ids, learned in zip(rows, mask, strict=True):
        own, opt = step(own, opt, params, ids, learned)
    return lora_jax.merge(layout, params, own)
