"""A small copy of openpi's structure (pi0): a vision tower, and two towers of experts.

The towers share attention. Their layers are scanned and rematerialised in Linen, and the model is
NNX. Names and shapes of the parameters are openpi's; `lora` adds its adapters, with its einsums.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from flax.nnx import bridge

from lora_jax import paths
from tests.cases import near_ones_and_zeros, normal
from tests.foreign.copies.attention import attend


@dataclasses.dataclass(frozen=True)
class Expert:
    """One tower. With `rank`, its products have openpi's adapters; attention scales by `scale`."""

    width: int
    hidden: int
    heads: int = 3
    head: int = 4
    rank: int = 0
    scale: float = 1.0


EXPERTS = (Expert(8, 12), Expert(6, 10))  # of the language, and of the actions
DRAW = nn.initializers.normal(0.3)


def _name(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


class Einsum(nn.Module):
    """Multiplies by `w`; openpi's adapter replaces the last letter of w, then the one before it."""

    shape: tuple[int, ...]
    expert: Expert

    @nn.compact
    def __call__(self, equation: str, x: Any) -> Any:
        y = jnp.einsum(equation, x, self.param("w", DRAW, self.shape).astype(x.dtype))
        if not (r := self.expert.rank):
            return y
        *some, inputs, outputs = self.shape
        a = self.param("lora_a", DRAW, (*some, inputs, r)).astype(x.dtype)
        b = self.param("lora_b", DRAW, (*some, r, outputs)).astype(x.dtype)
        left, out = equation.split("->")
        x_axes, w_axes = left.split(",")
        middle = out.replace(w_axes[-1], "L")
        low = jnp.einsum(f"{x_axes},{w_axes.replace(w_axes[-1], 'L')}->{middle}", x, a)
        up = jnp.einsum(f"{middle},{w_axes.replace(w_axes[-2], 'L')}->{out}", low, b)
        return y + self.expert.scale * up


class FeedForward(nn.Module):
    """Multiplies by slices of `gating_einsum`, then by `linear`; openpi's adapters have scale 1."""

    expert: Expert

    def weight(self, name: str, *shape: int) -> list[Any]:
        *some, inputs, outputs = shape
        found = [self.param(name, DRAW, shape)]
        if r := self.expert.rank:
            found.append(self.param(f"{name}_lora_a", DRAW, (*some, inputs, r)))
            found.append(self.param(f"{name}_lora_b", DRAW, (*some, r, outputs)))
        return found

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def times(x: Any, w: Any, a: Any = None, b: Any = None) -> Any:
            y = x @ w.astype(x.dtype)
            return y if a is None else y + x @ a.astype(x.dtype) @ b.astype(x.dtype)

        gating = self.weight("gating_einsum", 2, self.expert.width, self.expert.hidden)
        gate, up = (times(x, *(w[i] for w in gating)) for i in range(2))
        linear = self.weight("linear", self.expert.hidden, self.expert.width)
        return times(nn.gelu(gate) * up, *linear)


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        scale = self.param("scale", nn.initializers.zeros_init(), x.shape[-1:])
        return nn.standardize(x.astype(jnp.float32)).astype(x.dtype) * (1 + scale).astype(x.dtype)


class Attention(nn.Module):
    experts: tuple[Expert, ...]

    @nn.compact
    def __call__(self, xs: Any, mask: Any) -> Any:
        found = []
        for i, (x, e) in enumerate(zip(xs, self.experts, strict=True)):
            q = Einsum((e.heads, e.width, e.head), e, name=_name("q_einsum", i))
            kv = Einsum((2, 1, e.width, e.head), e, name=_name("kv_einsum", i))
            found.append((q("BTD,NDH->BTNH", x), *kv("BSD,2KDH->2BSKH", x)))
        q, k, v = (jnp.concatenate(each, axis=1) for each in zip(*found, strict=True))
        encoded = attend(q, k[:, :, 0], v[:, :, 0], mask)
        out, start = [], 0
        for i, (x, e) in enumerate(zip(xs, self.experts, strict=True)):
            project = Einsum((e.heads, e.head, e.width), e, name=_name("attn_vec_einsum", i))
            out.append(project("BTNH,NHD->BTD", encoded[:, start : start + x.shape[1]]))
            start += x.shape[1]
        return out


class Block(nn.Module):
    experts: tuple[Expert, ...]

    @nn.compact
    def __call__(self, xs: Any, mask: Any) -> Any:
        normed = [Norm(name=_name("pre_attention_norm", i))(x) for i, x in enumerate(xs)]
        attended = Attention(self.experts, name="attn")(normed, mask)
        xs = [x + y for x, y in zip(xs, attended, strict=True)]
        for i, e in enumerate(self.experts):
            y = Norm(name=_name("pre_ffw_norm", i))(xs[i])
            xs[i] += FeedForward(e, name=_name("mlp", i))(y)
        return xs, None


class Gemma(nn.Module):
    experts: tuple[Expert, ...]
    depth: int = 2

    def setup(self) -> None:
        table = nn.initializers.normal()
        self.table = self.param("input_embedding", table, (11, self.experts[0].width))
        self.layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )(self.experts)
        self.final_norms = [Norm(name=_name("final_norm", i)) for i in range(len(self.experts))]

    def embed(self, ids: Any) -> Any:
        return self.table[ids]

    def __call__(self, xs: Any, mask: Any) -> Any:
        xs, _ = self.layers(xs, mask)
        return [norm(x) for norm, x in zip(self.final_norms, xs, strict=True)]

    def start(self, xs: Any, mask: Any) -> Any:
        return self.embed(jnp.zeros((1, 1), int)), self(xs, mask)


class Vision(nn.Module):
    """SigLIP: patches, layers in a scan, and a head of the language tower's width."""

    width: int

    @nn.compact
    def __call__(self, image: Any) -> Any:
        x = nn.Conv(6, (2, 2), strides=2, name="embedding")(image).reshape(len(image), -1, 6)

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                x += nn.MultiHeadDotProductAttention(2, name="attn")(nn.LayerNorm()(x))
                return x + nn.Dense(6, name="down")(nn.gelu(nn.Dense(9, name="up")(x))), None

        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(self.width, name="head")(layers(name="encoderblock")(x, None)[0])


class Pi0(nnx.Module):
    """Velocities of noisy actions [batch, horizon, 5], given an image and a prompt."""

    def __init__(self, experts: tuple[Expert, ...]) -> None:
        rngs = nnx.Rngs(0)
        language, action = (e.width for e in experts)
        llm = bridge.ToNNX(Gemma(experts))
        xs = [jnp.zeros((1, 1, language)), jnp.zeros((1, 1, action))]
        llm.lazy_init(xs, jnp.ones((1, 2, 2), bool), method="start", rngs=rngs)
        img = bridge.ToNNX(Vision(language))
        img.lazy_init(jnp.zeros((1, 4, 4, 3)), rngs=rngs)
        self.PaliGemma = nnx.Dict(llm=llm, img=img)
        self.action_in_proj = nnx.Linear(5, action, rngs=rngs)
        self.action_out_proj = nnx.Linear(action, 5, rngs=rngs)

    def __call__(self, image: Any, prompt: Any, actions: Any) -> Any:
        words = self.PaliGemma.llm(prompt, method="embed")
        seen = self.PaliGemma.img(image).astype(words.dtype)
        prefix = jnp.concatenate([seen, words], axis=1)
        suffix = self.action_in_proj(actions)
        n, total = prefix.shape[1], prefix.shape[1] + suffix.shape[1]
        mask = (jnp.arange(total)[:, None] >= n) | (jnp.arange(total)[None] < n)
        _, out = self.PaliGemma.llm([prefix, suffix], mask[None])
        return self.action_out_proj(out)


def create(experts: tuple[Expert, ...] = EXPERTS) -> Pi0:
    """A model with weights drawn by NumPy, which compiles nothing."""
    model = nnx.eval_shape(lambda: Pi0(experts))
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, near_ones_and_zeros(shapes))
    nnx.update(model, state)
    return model


def example() -> tuple[jax.Array, jax.Array, jax.Array]:
    """An image, a prompt and actions."""
    return normal(1, 2, 4, 4, 3), jnp.arange(6).reshape(2, 3), normal(2, 2, 4, 5)


def write_checkpoint(folder: pathlib.Path) -> None:
    """Write the `params` folder of a run with LoRA in both towers, whose weights are `create`'s.

    It holds every weight, as openpi's do: the frozen ones in bfloat16, the vision tower trained.
    """
    experts = tuple(dataclasses.replace(e, rank=r) for e, r in zip(EXPERTS, (2, 1), strict=True))
    leaves = paths.flatten(nnx.to_pure_dict(nnx.state(create(experts), nnx.Param)))
    tree: dict[str, Any] = {}
    for path, x in leaves.items():
        *above, last = path.split("/")
        inside = functools.reduce(lambda tree, key: tree.setdefault(key, {}), above, tree)
        frozen = "/layers/" in path and "lora" not in path
        x = 1.1 * x if "/img/" in path else x
        inside[last] = {"value": x.astype(jnp.bfloat16) if frozen else x}
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(folder.absolute(), {"params": tree})
