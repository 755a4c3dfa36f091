"""The load of a router per token: the share of the tokens that each expert gets, per target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.primitives import jaxprs
from lora_jax.transform import adapt
from lora_jax.updates.gating import tally


class Load(NamedTuple):
    """The distribution of a router's rows (tokens or examples) over n experts; each sums to 1.

    Attributes:
      share: [..., n], the fraction of the choices: the number of rows in which the expert is among
        the `top`, divided by `top` and by the number of rows. Without `top`, a row chooses the
        expert with its largest gate.
      gate: [..., n], the mean gate over all rows.
    """

    share: Any
    gate: Any

    @staticmethod
    def of(gates: Any, top: int | None = None) -> Load:
        """Return the load of given gates, such as the gates of one router per example.

        Args:
          gates: [rows, n].
          top: the number of experts for each row; None: all.
        """
        return Load.from_tally(tally(gates, top))

    @staticmethod
    def from_tally(sums: Any) -> Load:
        """Return the load from sums over rows; NaN if there was no row.

        Args:
          sums: [..., 2, n], the gradient of `Routed.probe`.
        """
        mean = sums / sums.sum(-1, keepdims=True)
        return Load(mean[..., 0, :], mean[..., 1, :])


def router_load(
    layout: Layout, f: Callable[..., Any], params: Any, routed: Any, *args: Any, **kwargs: Any
) -> dict[str, Load]:
    """Return the share of the tokens and the mean gate of each expert, in `f(params, ..., *args)`.

    Every row that a product multiplies counts, including padding. The gates are counted as the
    gradient of a probe (`lora_jax.updates.gating.counted`). That works through `scan`, `checkpoint`
    and the like, and costs a backward pass. If you compute gradients anyway, differentiate with
    respect to `Routed.probe` as well (start from `probe`), and `Load.from_tally` costs nothing.

    Args:
      layout, f, params, routed, *args, **kwargs: as in `adapt(layout, f)(params, routed, ...)`.

    Returns:
      `{path: Load(share [*stack, n], gate [*stack, n])}`; NaN for a target whose product reaches
      no floating output that can be differentiated.

    Raises:
      LoraError: f has no floating output, or `adapt` or `route` raise one.

    >>> import lora_jax
    >>> f = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.ones((2, 3))}, jnp.eye(2)[jnp.array([0, 0, 0, 1])]
    >>> own = lora_jax.resolve(lora_jax.LoraSpec(1, targets="w"), f, params, x)
    >>> one = lora_jax.init(jax.random.key(0), own)
    >>> layout, stacked = lora_jax.multi.stack([(own, one), (own, one)])
    >>> routed = lora_jax.moe.route(stacked, {"w": jnp.eye(2)}, top=1)
    >>> router_load(layout, f, params, routed, x)["w"].share.tolist()
    [0.75, 0.25]
    """
    g = adapt(layout, f)

    def outputs(probes: Any) -> list[Any]:
        out = g(params, dataclasses.replace(routed, probe=probes), *args, **kwargs)
        return [x for x in jax.tree.leaves(out) if jaxprs.is_float(jnp.asarray(x).dtype)]

    outs, backward = jax.vjp(outputs, probe(layout, routed.stack.size))
    if not outs:
        raise LoraError(
            "the load is counted in a backward pass, and the function has no floating output to "
            "go back from; count it on a function that returns the logits, say"
        )
    (sums,) = backward(jax.tree.map(jnp.zeros_like, outs))
    return {path: Load.from_tally(s) for path, s in sums.items()}


def probe(layout: Layout, n: int) -> dict[str, Any]:
    """Return zeros `{path: [*stack, 2, n]}` whose gradient in `Routed.probe` counts the load."""
    return {t.path: jnp.zeros((*t.sizes(t.stack), 2, n)) for t in layout.targets}


def balance(loads: dict[str, Load]) -> Any:
    """Return the load-balancing loss of Switch Transformers, averaged over targets and layers.

    It is `n * sum_i share_i * gate_i`: 1 for an even load, and n if one expert gets everything. Its
    gradient goes through the mean gates.

    Args:
      loads: `{path: Load}`, from `router_load` or `Load.from_tally`.

    Returns:
      [] float32.

    Source:
      arXiv 2101.03961, equation 4.
    """
    each = [
        (load.share * load.gate).sum(-1).ravel() * load.share.shape[-1] for load in loads.values()
    ]
    return jnp.concatenate(each).mean()
