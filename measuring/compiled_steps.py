"""Small steps, as the compilers of TPUs and GPUs make them: memory, collectives and kernels.

A model is a scan over layers of two stacked weights, `up` and `down`, or with `scan=False` one
layer after another. It is large enough for the compilers to treat it as a model, and small enough
to compile in seconds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import sharding
from lora_jax.planner import hlo, program, real_compiler
from lora_jax.planner.collectives import Collective, collectives
from lora_jax.training import mesh

# No other axis has as many elements as there are layers.
LAYERS, WIDTH, HIDDEN, ROWS, EXPERTS = 3, 1024, 512, 64, 4
FIRST, SECOND = ("fsdp", "tensor"), ("tensor", "fsdp")  # as lora_jax.models places such a pair


class Case(NamedTuple):
    """A step to compile.

    what: "train", "merge", "sweep" (of `adapters` members), "mixed" (a training step of a batch
      that mixes `adapters`), "decode" (the same, forward, one token an example), or "experts" (a
      training step with an adapter for each expert).
    base: "bfloat16", or a scheme of `lora_jax.quantize`; "nf4" is with double quantisation.
    sizes: the mesh: data, fsdp, tensor.
    """

    device: str
    what: str = "train"
    base: str = "bfloat16"
    kind: str = "lora"
    sizes: tuple[int, int, int] = (1, 1, 1)
    adapters: int = 1
    rank: int = 4
    scan: bool = True

    def __str__(self) -> str:
        axes = [f"{a} {n}" for a, n in zip(mesh.AXES, self.sizes, strict=True) if n > 1]
        several = f" of {self.adapters}" if self.adapters > 1 else ""
        rank = f" r={self.rank}" if self.rank != 4 else ""
        plain = "" if self.scan else " unrolled"
        mesh_of = f" {' x '.join(axes)}" if axes else ""
        return f"{self.what}{several} {self.base} {self.kind}{rank}{plain}{mesh_of}"


class Compiled(NamedTuple):
    """A case as a compiler made it: bytes of one device, its HLO, and what it printed."""

    program: program.CompiledProgram
    module: hlo.Module
    arrays: tuple[Collective, ...]
    state: int
    log: str

    @property
    def scalar_gathers(self) -> int:
        """The number of gathers whose slices are single numbers, and that fetch many of them."""
        return sum(
            i.kind == "gather" and set(i.dims("slice_sizes")) <= {1} and i.results[0].size > 1024
            for i in self.module.instructions
        )

    def floats_of_a_stack(self, case: Case) -> list[str]:
        """The float arrays with a device's part, or all, of every layer of a frozen weight.

        With a bfloat16 base these are only the wider ones.
        """
        wide = ("f32",) if case.base == "bfloat16" else ("f32", "bf16", "f16")
        least = LAYERS * WIDTH * HIDDEN // (case.sizes[1] * case.sizes[2])
        return [
            f"{i.kind} {shape}"
            for i in self.module.instructions
            for shape in i.results
            if shape.dtype in wide
            and len(shape.dims) > 2
            and shape.dims[0] == LAYERS
            and shape.size >= least
        ]

    def copies_of_codes(self, case: Case) -> list[str]:
        """The arrays that the program makes of every layer's codes of a weight, as in a device."""
        least = LAYERS * WIDTH * HIDDEN // (2 * case.sizes[1] * case.sizes[2])
        return [
            f"{i.kind} {shape}"
            for i in self.module.instructions
            for shape in i.results
            if i.kind in ("fusion", "copy", "transpose")
            and shape.dtype in ("u8", "s8")
            and LAYERS in shape.dims
            and shape.size >= least
        ]

    @property
    def on_the_host(self) -> list[str]:
        """The instructions that move arrays between device and host."""
        kinds = ("infeed", "outfeed", "send", "recv")
        return [
            i.name
            for i in self.module.instructions
            if i.kind in kinds or "MoveToHost" in i.attributes or "MoveToDevice" in i.attributes
        ]


def model(params: Any, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, w: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return h + jnp.tanh(h @ w[0]) @ w[1], None

    return jax.lax.scan(layer, x, (params["up"], params["down"]))[0]


def unrolled(params: Any, x: jax.Array) -> jax.Array:
    for n in range(LAYERS):
        x = x + jnp.tanh(x @ params[f"{n}/up"]) @ params[f"{n}/down"]
    return x


def experts(params: Any, x: jax.Array) -> jax.Array:
    """Apply layers of experts to [experts, rows, width]: rows that a router has sent to them."""

    def layer(h: jax.Array, w: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        up = jnp.tanh(jnp.einsum("erw,ewh->erh", h, w[0]))
        return h + jnp.einsum("erh,ehw->erw", up, w[1]), None

    return jax.lax.scan(layer, x, (params["up"], params["down"]))[0]


class _Step(NamedTuple):
    take: Any
    state: Any  # arguments[0], which is donated, or None
    places: Any  # of all arguments
    arguments: tuple[Any, ...]


@functools.cache
def compiled(case: Case) -> Compiled:
    """Compile a case."""
    count = int(np.prod(case.sizes))
    target = real_compiler.target(case.device, count, 1)
    devices = np.array(target.devices).reshape(case.sizes)
    grid = Mesh(devices, mesh.AXES, axis_types=(AxisType.Auto,) * 3)
    step = _step(case, mesh.Placement(grid, {}, None))
    shapes = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        step.arguments,
        step.places,
    )
    shapes = sharding.gathered(shapes)
    options: dict[str, Any] = {}
    if step.state is not None:
        options = {"donate_argnums": 0, "out_shardings": step.places[0]}
    with jax.set_mesh(grid), _standard_error() as log:
        lowered = jax.jit(step.take, **options).trace(*shapes)
        lowered = lowered.lower(lowering_platforms=(target.platform,))
        start = time.monotonic()
        made = lowered.compile()
        seconds = time.monotonic() - start
        text = "".join(log())
    module = hlo.parse(made.as_text())
    said = program.measured(made, module, target.compiler, seconds)
    where = [] if step.state is None else jax.tree.leaves(step.places[0])
    held = sum(
        int(np.prod(place.shard_shape(x.shape))) * x.dtype.itemsize
        for x, place in zip(jax.tree.leaves(step.state), where, strict=True)
    )
    return Compiled(said, module, tuple(collectives(module)), held, text)


@contextlib.contextmanager
def _standard_error() -> Iterator[Any]:
    """Keep what the compiler prints; yield a function that reads it."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: (file.seek(0), file.read().decode(errors="replace"))[1]
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _step(case: Case, place: mesh.Placement) -> _Step:
    """Return the step of a case, its arguments, and where they are."""
    f, params, specs = _model(case)
    rows = {"mixed": (ROWS, 16), "decode": (ROWS,), "experts": (EXPERTS, ROWS)}
    x = jnp.ones((*rows.get(case.what, (ROWS,)), WIDTH), jnp.bfloat16)
    spec = lora_jax.LoraSpec(rank=case.rank, targets="**", kind=case.kind)
    layout = lora_jax.resolve(spec, f, params, x)
    if case.base != "bfloat16":
        options = {"double": True} if case.base == "nf4" else {}
        quantise = functools.partial(lora_jax.quantize, scheme=case.base, targets=layout, **options)
        params = jax.eval_shape(quantise, params)
        layout = lora_jax.resolve(spec, f, params, x)
    adapters = jax.eval_shape(
        lambda params: lora_jax.init(jax.random.key(0), layout, params=params), params
    )
    own = place.named(sharding.partition_specs(layout, specs))
    where = place.named(sharding.tree_of(specs, params, dict(place.mesh.shape)))
    across = place.named(P(None, mesh.BATCH[0]) if case.what == "experts" else mesh.BATCH)
    call = lora_jax.adapt(layout, f)
    if case.what == "merge":
        merge = functools.partial(lora_jax.merge, layout)
        return _Step(merge, None, (where, own), (params, adapters))
    if case.what in ("mixed", "decode"):
        members: Any = [(layout, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), adapters))]
        members *= case.adapters
        layout, adapters = lora_jax.multi.stack(members)
        own = jax.tree.map(lambda _: place.whole, adapters)
        ids = jnp.arange(ROWS) % case.adapters
        mixed = lora_jax.adapt(layout, f)

        def call(params: Any, stack: Any, x: Any) -> Any:
            return mixed(params, lora_jax.multi.select(stack, ids), x)

        if case.what == "decode":
            return _Step(call, None, (where, own, across), (params, adapters, x))

    def loss(adapters: Any, params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(call(params, adapters, x).astype(jnp.float32)))

    tx = optax.adam(1e-3)

    def step(state: Any, params: Any, x: jax.Array) -> Any:
        adapters, moments = state
        updates, moments = tx.update(jax.grad(loss)(adapters, params, x), moments)
        return optax.apply_updates(adapters, updates), moments

    take: Any = step
    state = (adapters, jax.eval_shape(tx.init, adapters))
    followed = place.following(state, adapters, own)
    if case.what == "sweep":
        take = jax.vmap(step, in_axes=(0, None, None))
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((case.adapters, *x.shape), x.dtype), state
        )
    return _Step(take, state, (followed, where, across), (state, params, x))


def _model(case: Case) -> tuple[Any, Any, dict[str, P]]:
    """Return the model of a case, its parameters, and where they are."""
    lead = (LAYERS, EXPERTS) if case.what == "experts" else (LAYERS,) if case.scan else ()
    pair = {"up": (FIRST, (WIDTH, HIDDEN)), "down": (SECOND, (HIDDEN, WIDTH))}
    names = [""] if case.scan else [f"{n}/" for n in range(LAYERS)]
    params = {
        f"{n}{w}": jax.ShapeDtypeStruct((*lead, *shape), jnp.bfloat16)
        for n in names
        for w, (_, shape) in pair.items()
    }
    specs = {f"{n}{w}": P(*[None] * len(lead), *s) for n in names for w, (s, _) in pair.items()}
    f = experts if case.what == "experts" else model if case.scan else unrolled
    return f, params, specs
