"""The config of a run: nested frozen dataclasses that document every field.

`Config` has the fields of every run. A run on text adds a model and a data set
(`lora_jax.training.text.TextConfig`); a run with your own model adds its fields in a subclass (see
configs/own_model.py). Every field of every class can be set on the command line
(`lora_jax.cli.train`).
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal

import tyro

from lora_jax.spec import LoraSpec, Rule
from lora_jax.system import extras
from lora_jax.system.checked import Checked
from lora_jax.system.checked import ConfigError as ConfigError
from lora_jax.system.checked import require as require
from lora_jax.training.workload import Workload
from lora_jax.updates.kind import kind_named

INCIDENTAL = {"incidental": True}
CHANGEABLE = {"changeable": True}  # a run may go on with another value
# A field whose entries mean the same in any order, unless an entry has its own settings (`@`).
UNORDERED = {"unordered": True}
# The labels (`lora_jax.training.optimizer.labels`) of the arrays that weight decay may leave out.
NO_DECAY = ("bias", "norm", "magnitude")


def incidental(default: Any) -> Any:
    """Declare a field that does not change what a run computes, so it does not name the run."""
    return dataclasses.field(default=default, metadata=INCIDENTAL)


def changeable(default: Any) -> Any:
    """Declare a field that a run may change on its way (`lora_jax.training.continuation`)."""
    return dataclasses.field(default=default, metadata=CHANGEABLE)


@dataclasses.dataclass(frozen=True)
class LoraConfig(Checked):
    """The adapters: h = W0 x + (alpha / rank) B A x."""

    _path = "lora."
    _bounds: ClassVar = {
        "at least 1": ("rank",), "above 0": ("alpha",), "in [0, 1)": ("dropout",)
    }  # fmt: skip

    rank: int = 8
    """Rank r of the update."""
    alpha: float = 8.0
    """The update is multiplied by alpha / rank, or by what `scaling` says."""
    targets: tuple[str, ...] = dataclasses.field(default=("all-linear",), metadata=UNORDERED)
    """Patterns of the parameters that get an adapter; the first one that matches decides. `*` stays
    inside one path segment, `**` spans several, `{a,b}` is a or b. `all-linear` is every matrix
    product except the output head. A pattern may have its own settings,
    "**/mlp/*/kernel@rank=4,alpha=8": rank, alpha, kind, scaling, and parts, which are slices of the
    last output axis as start:size, joined by + ("@parts=0:64"). With no pattern, only the
    parameters of `trainable` are trained."""
    init: Literal["gaussian", "uniform", "orthogonal", "pissa", "olora", "loftq", "eva"] = (
        "gaussian"
    )
    """The initial values of A; B begins at zero. gaussian: N(0, 1/inputs). uniform: within
    1/sqrt(inputs), as loralib and PEFT. orthogonal: orthonormal columns. eva: the main directions
    of the inputs of the first batches. With pissa, olora, and loftq (for a quantised base), A and B
    begin with a part of the base, which is subtracted from it."""
    trainable: tuple[str, ...] | None = dataclasses.field(default=None, metadata=UNORDERED)
    """Patterns of base parameters that are trained in full (PEFT: modules_to_save). None: the
    workload decides, which is its new head. "**" with no targets is full fine-tuning."""
    kind: str = "lora"
    """The kind of update: lora, dora, vera, loha, lokr, ia3, oft, miss, tokens, bias
    (docs/kinds.md), or one that the config file registers (lora_jax.updates)."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """The factor of the update; "alpha/sqrt(r)" is rsLoRA (arXiv 2312.03732)."""
    dropout: float = 0.0
    """Share of the inputs of each update that is set to zero in training (PEFT: lora_dropout). The
    base gets all inputs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for target in self.targets:
            _rule(target)

    @property
    def spec(self) -> LoraSpec:
        """The `LoraSpec` of these settings."""
        rules = tuple(_rule(t) for t in self.targets)
        return LoraSpec(self.rank, self.alpha, rules, kind=self.kind, scaling=self.scaling)

    @property
    def is_plain(self) -> bool:
        """Whether every update is LoRA of a whole weight, which members of a group can share."""
        rules = self.spec.rules
        return all(
            kind_named(rule.kind or "", rule.pattern).is_plain and not rule.parts for rule in rules
        )

    @property
    def changes_base(self) -> bool:
        """Whether the adapters begin with a part of the base, which is subtracted from it."""
        return self.init in ("pissa", "olora", "loftq")


def _rule(text: str) -> Rule:
    """Read `pattern@rank=4,alpha=8` as a rule.

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
class OptimizerConfig(Checked):
    """AdamW for the adapters and the head."""

    _path = "optimizer."
    _bounds: ClassVar = {
        "above 0": ("learning_rate", "head_learning_rate", "loraplus_lr_ratio", "clip", "eps"),
        "in [0, 1)": ("warmup", "b1", "b2"),
        "at least 0": ("weight_decay",),
    }

    learning_rate: float = 1e-3
    """Peak learning rate."""
    head_learning_rate: float | None = None
    """Peak learning rate of the base parameters trained in full. None: learning_rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """The learning rate after the warm-up: linear or cosine decay to zero, or constant."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float | None = 1.0
    """Largest global norm of the gradient. None: no clipping."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    loraplus_lr_ratio: float = 1.0
    """The learning rate of B divided by that of A. LoRA+ (arXiv 2402.12354) recommends 16."""
    no_decay: tuple[Literal["bias", "norm", "magnitude"], ...] = ()
    """Parameters without weight decay: biases and norms that are trained in full, DoRA's
    magnitudes."""


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
    """The device mesh: data x fsdp x tensor devices, over all processes."""

    _path = "mesh."
    _bounds: ClassVar = {"at least 1, or -1 for the rest": ("data", "fsdp", "tensor")}

    data: int = -1
    """Copies of the frozen weights, each with its part of the batch. -1: all remaining devices."""
    fsdp: int = 1
    """Devices that share one copy of the weights; each has its part of the batch, too (FSDP)."""
    tensor: int = 1
    """Devices that share one copy of the weights and compute products together (Megatron)."""
    rules: tuple[str, ...] = ()
    """Shardings of single parameters, which come before the workload's:
    "**/embedding=fsdp,tensor" gives each dimension a mesh axis; `-` means that it has none, and
    `fsdp+tensor` means both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        free = [name for name in ("data", "fsdp", "tensor") if getattr(self, name) == -1]
        require(len(free) <= 1, "mesh", " and ".join(free), "-1 (the rest) on one axis only")


@dataclasses.dataclass(frozen=True)
class ProcessesConfig(Checked):
    """The processes of the run. These are needed only if no launcher sets them: a single process,
    SLURM, Open MPI, Cloud TPU and Kubernetes are detected from the environment (docs/pods.md)."""

    _path = "processes."
    _bounds: ClassVar = {
        "above 0": ("connect_timeout", "heartbeat_timeout"), "at least 1": ("count",)
    }  # fmt: skip

    coordinator: str | None = None
    """host:port of process 0, at an address that all processes can reach."""
    count: int | None = None
    """The number of processes. 1 without a coordinator: a single process in any environment."""
    index: int | None = None
    """The number of this process, from 0."""
    connect_timeout: int = 300
    """Seconds that the processes wait for each other at the start."""
    heartbeat_timeout: int = 100
    """Seconds without a heartbeat after which a process counts as dead and all others stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [self.coordinator, self.count, self.index]
        alone = self.count == 1 and self.coordinator is None and self.index is None
        expected = "given together: coordinator, count and index (or count 1 alone)"
        require(alone or given.count(None) in (0, 3), "processes", given, expected)
        if self.coordinator is not None and self.count is not None and self.index is not None:
            host, _, port = self.coordinator.rpartition(":")
            readable = bool(host) and port.isdecimal()
            require(readable, "processes.coordinator", self.coordinator, "host:port")
            known = 0 <= self.index < self.count
            require(known, "processes.index", self.index, f"from 0 to {self.count - 1}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """One training run."""

    _bounds: ClassVar = {
        "at least 1": ("steps", "accumulate", "evaluate_every", "checkpoint_every", "log_every")
        + ("patience",),
        "at least 0": ("seed", "profile"),
    }

    workload: tyro.conf.Suppress[Callable[[Any], Workload]]
    """A function that returns the `Workload` of this config; set in the config file."""
    steps: int = changeable(1000)
    """Optimizer steps. A run goes on if it is asked for more in its run directory, also with other
    settings of the optimizer, accumulate, evaluate_every, patience and data.batch_size."""
    accumulate: int = changeable(1)
    """Parts that a batch is split into, which the devices compute one after the other. Their
    gradients are summed in float32, weighted by tokens: the step equals that of the whole batch."""
    seed: int = 0
    """Seed of the adapters, the new head, dropout and the order of the data."""
    day: str | None = incidental(None)
    """The date that a chat template is told (strftime_now), as 2026-12-03. None: the day on which
    the run began."""
    evaluate_every: int = changeable(100)
    """Steps between evaluations on the validation split, which also pick the best adapter."""
    patience: int | None = changeable(None)
    """Stop after this many evaluations on the validation split without a new best adapter. None:
    take all the steps."""
    checkpoint_every: int = incidental(100)
    """Steps between checkpoints. A run that was killed continues from the last one."""
    log_every: int = incidental(10)
    """Steps between printed lines if there is no terminal for the progress bar."""
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = incidental(("tensorboard",))
    """The loggers that get the numbers of metrics.jsonl: TensorBoard's events in the run directory,
    Weights & Biases (WANDB_PROJECT, WANDB_MODE) and MLflow (MLFLOW_TRACKING_URI)."""
    profile: int = incidental(0)
    """Steps that JAX's profiler traces into the folder `profile` of the run directory, from the
    first one whose program is compiled already. 0: none."""
    on_nonfinite: Literal["stop", "skip"] = incidental("stop")
    """If a loss or gradient is not finite: stop and name the step, or skip and count the step."""
    run_dir: str | None = incidental(None)
    """The run directory. None: runs/<config>-<hash of the fields that decide the result>, so that
    the same command continues its run, and another command never uses the same directory."""
    fresh: bool = incidental(False)
    """Delete the earlier run in the run directory and start from step 0."""
    allow_other_base: bool = incidental(False)
    """Continue a run even if the frozen weights differ from the weights that it started with."""
    start_from: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Start with the adapters, and the parameters trained in full, of another run, of an import, or
    of a folder written by lora_jax.save. Ranks, scales, targets and kinds then come from that
    adapter; lora.dropout and lora.trainable are this run's."""
    lora: LoraConfig = LoraConfig()
    """The adapters."""
    optimizer: OptimizerConfig = dataclasses.field(default=OptimizerConfig(), metadata=CHANGEABLE)
    """The optimizer."""
    mesh: MeshConfig = dataclasses.field(default=MeshConfig(), metadata=INCIDENTAL)
    """The device mesh. A run may be continued on another mesh."""
    processes: ProcessesConfig = dataclasses.field(default=ProcessesConfig(), metadata=INCIDENTAL)
    """The processes. A run may be continued with another number of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            datetime.date.fromisoformat(self.day or "2000-01-01")
        except ValueError:
            raise ConfigError(f"day must be a date, as 2026-12-03, got {self.day!r}") from None
        for name in self.log_to:
            if name != "tensorboard":
                extras.require(name, f"--log-to {name}")
        if self.start_from is None:
            kinds = [str(rule.kind) for rule in self.lora.spec.rules]
            check_loraplus(self.optimizer.loraplus_lr_ratio, kinds)
            for kind in kinds:
                on = "a kind that is on for all tokens (lora_jax.multi.activated trains it)"
                require(not kind_named(kind, "lora.kind").activated, "lora.kind", kind, on)

    @property
    def adaptation(self) -> LoraConfig:
        """The adapters of the run: `lora`, unless a subclass trains by another method."""
        return self.lora

    @property
    def group_key(self) -> tuple[Any, ...]:
        """The settings that members of a group must share to train at the same time."""
        lora = self.adaptation
        if lora.changes_base:
            return (lora,)
        own = () if lora.is_plain else (dataclasses.replace(lora, init="gaussian"),)
        return (lora.dropout, *own)

    def full_fine_tuning(self, **changes: Any) -> Config:
        """Return the same run with all parameters trained and no adapters, to compare with.

        Args:
          **changes: other fields to change.

        Returns:
          The config.
        """
        lora = dataclasses.replace(self.lora, targets=(), trainable=("**",))
        return dataclasses.replace(self, lora=lora, start_from=None, **changes)


def check_loraplus(ratio: float, kinds: Iterable[str]) -> None:
    """Raise `ConfigError` if LoRA+ is used with a kind of update that has no B starting at zero."""
    without = sorted(k for k in {*kinds} if kind_named(k, "lora.kind").zero_at_first != "b")
    one = f"1 with lora.kind {', '.join(without)}, in which no B begins at zero"
    require(ratio == 1 or not without, "optimizer.loraplus_lr_ratio", ratio, one)


def check_start(before: Config, after: Config) -> None:
    """Raise `ConfigError` if the command line sets a field that `--from` takes from the adapter."""
    if after.start_from is None:
        return
    for field in dataclasses.fields(LoraConfig):
        value = getattr(after.lora, field.name)
        free = field.name in ("dropout", "trainable")
        if not free and value != getattr(before.lora, field.name):
            raise ConfigError(
                f"--lora.{field.name} {value}: with --from the adapters come from "
                f"{after.start_from}, with their own ranks, scales, targets and kinds; leave it "
                "out (only --lora.dropout and --lora.trainable have an effect)"
            )


def check_lora_counts(config: Config, given: str) -> None:
    """Raise `ConfigError` if settings of `lora` are given for a run of another method."""
    if config.adaptation != config.lora:
        raise ConfigError(
            f"{given} sets a field of lora, but the config trains by another method "
            "(method.name), which does not use lora: leave it out, or set the method to "
            "'lora'"
        )
