"""The tables: the methods of each, and the claims that it tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.paper.configs import matrices
from experiments.sequel import claims, grids
from experiments.sequel.cells import BATCH, Arm, Cell, Size, cell
from experiments.sequel.claims import Claim
from experiments.sequel.results import Results, Scored

SEEDS = (0, 1, 2)
LORA: dict[str, Any] = {}  # rank 8 and alpha 16 on q and v, as in configs/sweep.py
BIASES = ("bert/encoder/**/bias",)


@dataclasses.dataclass(frozen=True)
class Table:
    """One table: every method at every rate with every seed.

    asks: its question.
    main: the names of the methods that are trained first, and with `--quick` alone.
    """

    name: str
    asks: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    main: tuple[str, ...]

    def chosen(self, main: bool) -> tuple[Arm, ...]:
        """Return all methods, or the main ones."""
        return tuple(arm for arm in self.arms if not main or arm.name in self.main)


def _kind(kind: str, rank: int, **more: Any) -> dict[str, Any]:
    return {"lora.kind": kind, "lora.rank": rank, "lora.alpha": 2.0 * rank, **more}


def _ranks() -> tuple[Arm, ...]:
    """Return both scalings at three ranks. At rank 4 both have the scale 4."""
    found = []
    for rank in (4, 32, 256):
        own = {"lora.rank": rank, "lora.alpha": 16.0}
        rs = {**own, "lora.alpha": 8.0, "lora.scaling": "alpha/sqrt(r)"}
        found += [Arm(f"lora r{rank}", own), Arm(f"rslora r{rank}", rs)]
    return tuple(found)


def _on(targets: str, rank: int) -> dict[str, Any]:
    return _kind("lora", rank, **{"lora.targets": (targets,)})


def _base(quantize: str, **more: Any) -> dict[str, Any]:
    return {"model.quantize": quantize, **more}


TABLES = (
    Table(
        "kinds",
        "Which kind of update, each at its own rate?",
        (
            Arm("lora r8", LORA),
            Arm("lora r2", _kind("lora", 2)),
            Arm("rslora r8", {"lora.scaling": "alpha/sqrt(r)"}),
            Arm("dora r8", _kind("dora", 8)),
            Arm("loha r4", _kind("loha", 4)),
            Arm("lokr r24", _kind("lokr", 24)),
            Arm("vera r256", _kind("vera", 256), (1e-2, 3e-2, 1e-1)),
            Arm("biases", {"lora.kind": "bias", "lora.targets": BIASES}),
        ),
        (claims.DORA, claims.VERA, claims.LOHA, claims.LOKR),
        ("lora r8", "dora r8", "vera r256"),
    ),
    Table(
        "rslora",
        "Does the best rate depend on the rank, with alpha / r and with alpha / sqrt(r)?",
        _ranks(),
        (claims.RS_AT_256, claims.RS_OVER_PLAIN),
        ("lora r4", "lora r256", "rslora r256"),
    ),
    Table(
        "loraplus",
        "Is a larger rate for B better than the best single rate?",
        tuple(
            Arm(f"ratio {ratio:g}", {"optimizer.loraplus_lr_ratio": ratio} if ratio != 1 else LORA)
            for ratio in (0.25, 1, 4, 16, 64)
        ),
        (claims.LORA_PLUS,),
        ("ratio 1", "ratio 16"),
    ),
    Table(
        "bits",
        "How many bits of the base are enough?",
        (
            Arm("float32", LORA),
            Arm("bfloat16", {"model.param_dtype": "bfloat16"}),
            Arm("int8", _base("int8")),
            Arm("int4", _base("int4")),
            Arm("nf4", _base("nf4")),
            Arm("nf4 double", _base("nf4", **{"model.double_quantize": True})),
        ),
        (claims.NF4, claims.NF4_INT4),
        ("float32", "nf4"),
    ),
    Table(
        "starts",
        "Where to begin: zeros, PiSSA, OLoRA or EVA?",
        (
            Arm("zeros", LORA),
            Arm("pissa", {"lora.init": "pissa"}, (1e-3, 3e-3, 1e-2)),
            Arm("olora", {"lora.init": "olora"}, (1e-3, 3e-3, 1e-2)),
            Arm("eva", {"lora.init": "eva"}),
        ),
        (claims.PISSA, claims.OLORA, claims.EVA),
        ("zeros", "pissa"),
    ),
    Table(
        "dora",
        "Is DoRA better at a low rank?",
        tuple(
            Arm(f"{kind} r{rank}", LORA if (kind, rank) == ("lora", 8) else _kind(kind, rank))
            for rank in (1, 2, 4, 8)
            for kind in ("lora", "dora")
        ),
        (claims.DORA_LOW,),
        ("lora r1", "dora r1"),
    ),
    Table(
        "where",
        "Attention, MLP or all, at equal parameters, and against full fine-tuning?",
        (
            Arm("attention r5", _on(matrices.ATTENTION.format("*"), 5)),
            Arm("mlp r4", _on(matrices.MLP.format("*"), 4)),
            Arm("all r2", _on("bert/encoder/layer*/*/*/kernel", 2)),
            Arm("all r2, batch 32", {**_on("bert/encoder/layer*/*/*/kernel", 2), BATCH: 32}),
            Arm("full", {"lora.targets": (), "lora.trainable": ("**",)}, (1e-4, 3e-4, 1e-3)),
        ),
        (claims.WHERE, claims.ALL, claims.FULL, claims.LARGE_BATCH),
        ("attention r5", "mlp r4"),
    ),
)


def cells(arm: Arm, rates: Sequence[float], size: Size) -> list[Cell]:
    """Return the cells of a method at these rates, with all seeds."""
    return [cell(arm, rate, seed, size) for rate in rates for seed in SEEDS]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A method with the results of all its seeds at each rate that is finished.

    found: rate -> the results, in the order of the seeds.
    """

    arm: Arm
    found: Mapping[float, Sequence[Scored]]

    @property
    def losses(self) -> dict[float, list[float]]:
        """The validation losses at each rate."""
        return {rate: [one.validation for one in own] for rate, own in self.found.items()}

    @property
    def rate(self) -> float:
        """The rate with the lowest mean validation loss."""
        return grids.best(self.losses)

    @property
    def best(self) -> Sequence[Scored]:
        """The results at that rate."""
        return self.found[self.rate]


def tuned(arm: Arm, results: Results, size: Size) -> Tuned | None:
    """Return the results of a method; None if no rate has all its seeds yet."""
    found: dict[float, list[Scored]] = {}
    rates = list(arm.rates)
    for rate in rates:  # becomes longer on the way
        keys = [one.key for one in cells(arm, [rate], size)]
        if all(key in results.cells for key in keys):
            found[rate] = [results.cells[key] for key in keys]
        more = _more(arm, found, size)
        if more is not None and more not in rates:
            rates.append(more)
    return Tuned(arm, dict(sorted(found.items()))) if found else None


def _more(arm: Arm, found: Mapping[float, Sequence[Scored]], size: Size) -> float | None:
    """Return the rate with which a grid goes on; None before its first rates are finished."""
    if not set(arm.rates) <= set(found):
        return None
    return grids.next_rate(Tuned(arm, found).losses, size.longer, len(arm.rates))


def waiting(arm: Arm, results: Results, size: Size) -> list[Cell]:
    """Return the cells of a method to train next; none if its best rate is inside its grid."""
    first = [one for one in cells(arm, arm.rates, size) if one.key not in results.cells]
    if first:
        return first
    own = tuned(arm, results, size)
    more = None if own is None else _more(arm, own.found, size)
    return [] if more is None else cells(arm, [more], size)
