"""The config of a run: nested frozen dataclasses, every field with its default and its meaning.

`Config` holds what every run has. A run on text adds a model and a data set
(`lora_jax.training.text.TextConfig`); a model of your own adds whatever it needs in a subclass (see
configs/own_model.py). Every field of every class can be set on the command line
(`lora_jax.command_line`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import tyro

from lora_jax.errors import LoraError
from lora_jax.spec import LoraSpec, Rule
from lora_jax.training.workload import Workload


class ConfigError(LoraError):
    """A value that a config field cannot have; the message names the field."""


def require(condition: bool, field: str, got: Any, expected: str) -> None:
    """Raise `ConfigError` naming `field` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field} must be {expected}, got {got!r}")


INCIDENTAL = {"incidental": True}
# A field that came later: at its default it names no run, so runs from before are found again.
LATER = {"later": True}
# A field whose entries mean the same in any order, unless one has settings of its own (`@`).
UNORDERED = {"unordered": True}
# Labels (`lora_jax.labels`) of arrays that weight decay may leave out.
NO_DECAY = ("bias", "norm", "magnitude")


def later(default: Any) -> Any:
    """A field that came later (`LATER`)."""
    return dataclasses.field(default=default, metadata=LATER)


def incidental(default: Any) -> Any:
    """A field that does not change what a run computes, so it does not name the run either."""
    return dataclasses.field(default=default, metadata=INCIDENTAL)


InitMethod = Literal["gaussian", "uniform", "orthogonal", "eva", "pissa", "olora", "loftq"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The adapters: h = W0 x + (alpha / rank) B A x."""

    rank: int = 8
    """Inner dimension r of the update."""
    alpha: float = 8.0
    """The update is scaled by alpha / rank, or as `scaling` says."""
    targets: tuple[str, ...] = dataclasses.field(default=("all-linear",), metadata=UNORDERED)
    """Patterns of the parameters that get an adapter; the first that matches wins. `*` stays in
    one path segment, `**` crosses them, `{a,b}` is either. `all-linear`: every product but the
    output head. A pattern may carry settings of its own: "**/mlp/*/kernel@rank=4,alpha=8", and
    kind, scaling, parts (start:size of slices of the last output axis, joined by +: "@parts=0:64").
    None at all trains only what `trainable` names."""
    init: Literal["gaussian", "uniform", "orthogonal", "pissa", "olora", "loftq", "eva"] = (
        "gaussian"
    )
    """How A begins, while B begins at zero: N(0, 1/inputs), uniform within 1/sqrt(inputs) (loralib,
    PEFT), with orthonormal columns, or (eva) with the main directions of the first batches. Or both
    begin with a part of the base, which then lacks it: pissa, olora, and loftq over a quantised
    base."""
    trainable: tuple[str, ...] | None = dataclasses.field(default=None, metadata=UNORDERED)
    """Patterns of base parameters trained in full (PEFT: modules_to_save). None: those the workload
    names, its new head. "**" with no targets is full fine-tuning."""
    kind: str = later("lora")
    """The kind of update: lora, dora, vera, loha, lokr, bias, or one that the config's file has
    registered (lora_jax.updates)."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = later("alpha/r")
    """What the update is scaled by; "alpha/sqrt(r)" is rsLoRA (arXiv 2312.03732)."""
    dropout: float = later(0.0)
    """Share of the inputs of each update that are set to zero in training (PEFT: lora_dropout);
    the base sees them all."""

    def __post_init__(self) -> None:
        require(self.rank > 0, "lora.rank", self.rank, "at least 1")
        require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "in [0, 1)")
        for target in self.targets:
            _rule(target)

    @property
    def spec(self) -> LoraSpec:
        """The same, as the core asks for it."""
        rules = tuple(_rule(t) for t in self.targets)
        return LoraSpec(self.rank, self.alpha, rules, kind=self.kind, scaling=self.scaling)

    @property
    def is_plain(self) -> bool:
        """Whether every update is LoRA of a whole weight, which members of a group can share."""
        rules = self.spec.rules
        return all(rule.kind == "lora" and not rule.parts for rule in rules)

    @property
    def changes_base(self) -> bool:
        """Whether the adapters begin with a part of the base, which then lacks it."""
        return self.init in ("pissa", "olora", "loftq")


def _rule(text: str) -> Rule:
    """`pattern@rank=4,alpha=8` as a rule.

    >>> _rule("qkv@rank=4,parts=0:64+128:64").parts
    ((0, 64), (128, 64))
    """
    pattern, _, settings = text.partition("@")
    readers: dict[str, Callable[[str], Any]] = {
        "rank": int,
        "alpha": float,
        "kind": str,
        "scaling": str,
        "parts": lambda value: tuple(map(_slice, value.split("+"))),
    }
    values = {}
    for setting in filter(None, settings.split(",")):
        name, _, value = setting.partition("=")
        try:
            values[name] = readers[name](value)
        except (KeyError, ValueError):
            raise ConfigError(
                f"lora.targets: cannot read {setting!r} of {text!r}; "
                "a pattern's own settings are written pattern@rank=4,alpha=8"
            ) from None
    return Rule(pattern, **values)


def _slice(text: str) -> tuple[int, int]:
    start, _, size = text.partition(":")
    return int(start), int(size)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on the adapters and the head."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    head_learning_rate: float | None = None
    """Peak learning rate of the base parameters trained in full. None: the same."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up: to zero in a line, to zero along a cosine, or none."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float | None = 1.0
    """Largest global norm of the gradient; None does not clip."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    loraplus_lr_ratio: float = later(1.0)
    """The learning rate of B divided by that of A. LoRA+ (arXiv 2402.12354) recommends 16."""
    no_decay: tuple[Literal["bias", "norm", "magnitude"], ...] = later(())
    """What weight decay leaves out: biases and norms that are trained in full, magnitudes of
    DoRA."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "head_learning_rate", "loraplus_lr_ratio", "clip"):
            value = getattr(self, name)
            require(value is None or value > 0, f"optimizer.{name}", value, "above 0")
        require(0 <= self.warmup < 1, "optimizer.warmup", self.warmup, "in [0, 1)")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0")
        for name in ("b1", "b2"):
            require(
                0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "in [0, 1)"
            )
        require(self.eps > 0, "optimizer.eps", self.eps, "above 0")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out: data x fsdp x tensor of them, over all processes."""

    data: int = -1
    """Copies of the frozen weights, each for its part of the batch. -1: all devices left over."""
    fsdp: int = 1
    """Devices that share one copy of the weights, and each have their part of the batch too."""
    tensor: int = 1
    """Devices that share one copy of the weights and the products with it (Megatron's way)."""
    rules: tuple[str, ...] = ()
    """Placements of single parameters, before those of the workload: "**/embedding=fsdp,tensor"
    puts a mesh axis on each dimension; `-` is none, `fsdp+tensor` is both on one dimension."""

    def __post_init__(self) -> None:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            require(size == -1 or size > 0, f"mesh.{name}", size, "at least 1, or -1 for the rest")
        free = [name for name, size in sizes.items() if size == -1]
        require(len(free) <= 1, "mesh", " and ".join(free), "-1 (the rest) on one axis only")


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    """The processes of the run. Needed only where no launcher says it: one process alone, SLURM,
    Open MPI, Cloud TPU and Kubernetes are found out from the environment (docs/pods.md)."""

    coordinator: str | None = None
    """host:port of process 0, as all processes reach it."""
    count: int | None = None
    """How many there are. 1 without a coordinator: alone, whatever the environment says."""
    index: int | None = None
    """Which of them this is, from 0."""
    connect_timeout: int = 300
    """Seconds that the processes wait for each other at the start."""
    heartbeat_timeout: int = 100
    """Seconds without a sign of life after which a process counts as dead and all others end."""

    def __post_init__(self) -> None:
        given = [self.coordinator, self.count, self.index]
        alone = self.count == 1 and self.coordinator is None and self.index is None
        expected = "given together: coordinator, count and index (or count 1 alone)"
        require(alone or given.count(None) in (0, 3), "processes", given, expected)
        for name in ("connect_timeout", "heartbeat_timeout"):
            require(getattr(self, name) > 0, f"processes.{name}", getattr(self, name), "above 0")
        if self.coordinator is not None and self.count is not None and self.index is not None:
            host, _, port = self.coordinator.rpartition(":")
            readable = bool(host) and port.isdecimal()
            require(readable, "processes.coordinator", self.coordinator, "host:port")
            require(self.count > 0, "processes.count", self.count, "at least 1")
            known = 0 <= self.index < self.count
            require(known, "processes.index", self.index, f"from 0 to {self.count - 1}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    workload: tyro.conf.Suppress[Callable[[Any], Workload]]
    """What is trained: a function from this config to a `Workload`; set in the config file."""
    steps: int = 1000
    """Optimizer steps."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after the other on the devices; their gradients are
    summed in float32 and weighted by tokens, so the step is that of the whole batch."""
    seed: int = 0
    """Of the adapters, the new head, dropout and the order of the data."""
    evaluate_every: int = 100
    """Steps between evaluations on the validation split, which also pick the best adapter."""
    checkpoint_every: int = incidental(100)
    """Steps between checkpoints. A killed run goes on from the last one."""
    log_every: int = incidental(10)
    """Steps between lines printed where there is no terminal for the progress bar."""
    on_nonfinite: Literal["stop", "skip"] = incidental("stop")
    """At a loss or gradient that is not finite: stop and name the step, or skip it and count."""
    run_dir: str | None = incidental(None)
    """Where the run is kept. None: runs/<config>-<hash of the values that matter>, so that the
    same command goes on with its run and another never meets it."""
    fresh: bool = incidental(False)
    """Delete what an earlier run left in the run directory and start from step 0."""
    allow_other_base: bool = incidental(False)
    """Go on with a run although the frozen weights are others than those it began on."""
    start_from: Annotated[str | None, tyro.conf.arg(name="from")] = later(None)
    """Begin with the adapters, and the parameters trained in full, of another run or import, or of
    a folder that lora_jax.save wrote. Ranks, scales, targets and kinds are theirs; lora.dropout and
    lora.trainable are this run's."""
    lora: LoraConfig = LoraConfig()
    """The adapters."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    mesh: MeshConfig = dataclasses.field(default=MeshConfig(), metadata=INCIDENTAL)
    """The layout of the devices. A run may go on with another one."""
    processes: ProcessesConfig = dataclasses.field(default=ProcessesConfig(), metadata=INCIDENTAL)
    """The processes of the run. It may go on with another number of them."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "evaluate_every", "checkpoint_every", "log_every"):
            require(getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        if self.start_from is None:
            kinds = [str(rule.kind) for rule in self.lora.spec.rules]
            check_loraplus(self.optimizer.loraplus_lr_ratio, kinds)

    @property
    def adaptation(self) -> LoraConfig:
        """The adapters of the run: `lora`, unless a subclass trains by another method."""
        return self.lora

    @property
    def group_key(self) -> tuple[Any, ...]:
        """What members of a group have in common that train at once; others train after them."""
        lora = self.adaptation
        if lora.changes_base:
            return (lora,)
        own = () if lora.is_plain else (dataclasses.replace(lora, init="gaussian"),)
        return (lora.dropout, *own)

    def full_fine_tuning(self, **changes: Any) -> Config:
        """Return the same run with all parameters trained and no adapters, to compare with."""
        lora = dataclasses.replace(self.lora, targets=(), trainable=("**",))
        return dataclasses.replace(self, lora=lora, start_from=None, **changes)


def check_loraplus(ratio: float, kinds: Iterable[str]) -> None:
    """Raise `ConfigError` for LoRA+ with kinds of update that have no B of their own."""
    without = sorted({*kinds} & {"vera", "loha", "lokr", "bias"})
    one = f"1 with lora.kind {', '.join(without)}, in which no B begins at zero"
    require(ratio == 1 or not without, "optimizer.loraplus_lr_ratio", ratio, one)


def check_start(before: Config, after: Config) -> None:
    """Raise `ConfigError` where a command line says of adapters what `--from` says already.

    Args:
      before: the config in its file. after: with the changes of the command line.
    """
    if after.start_from is None:
        return
    for field in dataclasses.fields(LoraConfig):
        value = getattr(after.lora, field.name)
        free = field.name in ("dropout", "trainable")
        if not free and value != getattr(before.lora, field.name):
            raise ConfigError(
                f"--lora.{field.name} {value}: with --from the adapters are those of "
                f"{after.start_from}, with their own ranks, scales, targets and kinds; leave it "
                "out (--lora.dropout and --lora.trainable count)"
            )


def check_lora_counts(config: Config, given: str) -> None:
    """Raise `ConfigError` where settings of `lora` are `given` with another method."""
    if config.adaptation != config.lora:
        raise ConfigError(
            f"{given} sets something of lora, but the config trains by another method "
            "(method.name), with which nothing of lora counts: leave it out, or name the method "
            "'lora'"
        )
