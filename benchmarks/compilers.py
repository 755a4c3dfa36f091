"""Small programs as the compilers of a TPU and a GPU make them: memory, collectives, kernels.

    python -m benchmarks.compilers                all cases (about ten minutes on two cores)
    python -m benchmarks.compilers --only rank    one table: programs, rank

The models are in `measuring.compiled_steps`; the tests of `tests/aot` read the same programs. It
needs `pip install 'lora-jax[train,plan-tpu,plan-cuda]'`, Linux on x86-64, and no TPU or GPU.
"""

from __future__ import annotations

import argparse
import collections

from lora_jax.planner import real_compiler
from lora_jax.system.table import aligned
from measuring.compiled_steps import Case, compiled

BASES, FSDP, TENSOR = ("bfloat16", "int8", "nf4"), (1, 4, 1), (1, 2, 2)
TABLES = {
    "programs": [
        *(Case("", base=base, kind=kind) for base in BASES for kind in ("lora", "dora")),
        *(Case("", base=base, sizes=sizes) for sizes in (FSDP, TENSOR) for base in BASES),
        Case("", sizes=(4, 1, 1)),
        *(Case("", what, adapters=n) for what in ("mixed", "decode") for n in (8, 64)),
        Case("", "sweep", adapters=8),
        Case("", "experts", sizes=FSDP),
        Case("", "merge", base="nf4"),
    ],
    "rank": [
        Case("", rank=rank, scan=scan, sizes=sizes)
        for scan, sizes in ((False, (1, 1, 1)), (True, (1, 1, 1)), (True, (1, 1, 4)))
        for rank in (1, 2, 4, 8)
    ],
}
HEAD = ["program", "device", "peak MiB", "temporaries MiB", "collectives (KiB received)"]
HEAD += ["gathers of single numbers", "kernels", "s"]


def line(case: Case) -> list[str]:
    """Compile a case; return its line of the table."""
    found = compiled(case)
    made = found.program
    counts: collections.Counter[str] = collections.Counter()
    received: collections.Counter[str] = collections.Counter()
    for array in found.arrays:
        name = f"{array.kind} {array.operand.dtype} of {array.of}"
        counts[name] += array.times
        received[name] += array.times * array.result.bytes
    kernels = (f"{count} {name.strip('_')}" for name, count in made.kernels.items())
    return [
        str(case),
        case.device,
        f"{made.peak / 2**20:.2f}",
        f"{made.temporaries / 2**20:.2f}",
        ", ".join(f"{n} {name} ({received[name] / 2**10:.0f})" for name, n in counts.items()),
        str(found.scalar_gathers),
        ", ".join(kernels),
        f"{made.seconds:.0f}",
    ]


def main() -> None:
    """Compile the cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=TABLES, action="append")
    parser.add_argument("--device", default=["tpu-v5e", "h100-80gb"], nargs="+")
    given = parser.parse_args()
    rows = [HEAD]
    for device in given.device:
        if said := real_compiler.missing(device):
            print(said)
            continue
        for name in given.only or TABLES:
            rows += [line(case._replace(device=device)) for case in TABLES[name]]
    print("\n".join(aligned(rows)))


if __name__ == "__main__":
    main()
