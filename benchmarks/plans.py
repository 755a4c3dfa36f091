"""Plans against the compilers of TPUs and GPUs: the memory of steps, estimated and compiled.

    python -m benchmarks.plans              all cases, each in a process of its own (half an hour)
    python -m benchmarks.plans --only gpt3  the cases whose names contain a text

It needs `pip install 'lora-jax[train,plan-tpu,plan-cuda]'`, Linux on x86-64, and no TPU or GPU.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

from lora_jax.system.table import aligned

LLAMA = ("--config", "configs/llama3_70b.py")
GPT3 = ("--config", "configs/gpt3_175b.py", "--mesh.fsdp", "16", "--mesh.tensor", "4")
SMALL = (
    "--layers=16", "--hidden=2048", "--mlp=8192", "--quantize=none", "--accumulate=1", "--rows=1",
    "--length=8192",
)  # fmt: skip
EIGHT = ("--layers=32", "--hidden=4096", "--mlp=14336", "--accumulate=1")
CASES: dict[str, tuple[str, ...]] = {
    "llama3-70b nf4, 8 x 2048 in 8 parts": (*LLAMA, "--plan-devices=1"),
    "llama3-70b nf4, 8 x 2048, fsdp 8": (*LLAMA, "--plan-devices=8", "--accumulate=1"),
    "llama3-70b nf4, 16 x 2048, fsdp 16": (
        *LLAMA, "--plan-device=tpu-v5e", "--plan-devices=16", "--accumulate=1", "--rows=16",
    ),
    "gpt3-175b, 128 x 2048 in 2 parts, fsdp 16 x tensor 4": (
        *GPT3, "--plan-device=tpu-v5p", "--plan-devices=64",
    ),
    "1.5B, 1 x 8192": (*LLAMA, *SMALL, "--plan-devices=1"),
    "1.5B, 1 x 32768": (*LLAMA, *SMALL, "--length=32768", "--plan-devices=1"),
    "1.5B, 1 x 131072": (*LLAMA, *SMALL, "--length=131072", "--plan-devices=1"),
    "1.5B, 4 x 8192, fsdp 4": (
        *LLAMA, *SMALL, "--rows=4", "--plan-device=tpu-v5e", "--plan-devices=4",
    ),
    "llama3-8b nf4, 1 x 8192": (
        *LLAMA, *EIGHT, "--rows=1", "--length=8192", "--plan-device=l4-24gb", "--plan-devices=1",
    ),
    "llama3-8b bf16, 8 x 2048, fsdp 8": (
        *LLAMA, *EIGHT, "--quantize=none", "--plan-device=tpu-v6e", "--plan-devices=8",
    ),
    "llama3-8b nf4, 1 x 2048": (
        *LLAMA, *EIGHT, "--rows=1", "--plan-device=tpu-v5e", "--plan-devices=1",
    ),
    "llama3-70b nf4, 32 x 2048, 2 slices of 16": (
        *LLAMA, "--plan-device=tpu-v5e", "--plan-devices=32", "--plan-slices=2", "--rows=32",
        "--accumulate=1", "--mesh.data=2", "--mesh.fsdp=16",
    ),
    "llama3-70b nf4, 256 x 2048, data 16 x fsdp 16": (
        *LLAMA, "--plan-device=tpu-v5e", "--plan-devices=256", "--rows=256", "--accumulate=1",
        "--mesh.data=16", "--mesh.fsdp=16",
    ),
}  # fmt: skip


def case(arguments: list[str]) -> None:
    """Plan one case in this process, and print its numbers as JSON."""
    from lora_jax.cli import train as command_line
    from lora_jax.planner import plan

    root = pathlib.Path(__file__).resolve().parents[1]
    given = [*arguments, "--plan-compiler=real"]
    name, config, options = command_line.parse(given, "", root)
    made = plan.make(name, config, options, compare=False)  # type: ignore[arg-type]
    costs, gb = made.runs[plan.LORA], 1e9
    said = costs.program
    assert said is not None
    temporaries = f"{said.temporaries / 2**30:.2f}"
    off = costs.bytes.total / said.needs - 1
    moved = sum(t.bytes for t in costs.traffic)
    row = [
        made.compiler,
        f"{costs.bytes.total / gb:.2f}",
        f"{said.needs / gb:.2f}",
        f"{off:+.1%}",
        temporaries,
        f"{said.peak / gb:.2f}",
        "yes" if made.fits(plan.LORA) else "no",
        f"{moved / gb:,.1f}",
        f"{said.seconds:.0f}",
    ]
    print(json.dumps(row))


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--case", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.case:
        case(given.case)
        return
    head = ["step", "compiler", "estimate GB", "compiled GB", "off"]
    head += ["temporaries GiB", "peak GB", "fits", "collectives GB", "seconds"]
    rows = [head]
    for name, arguments in CASES.items():
        if given.only in name:
            command = [sys.executable, "-m", "benchmarks.plans", "--case", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = done.stdout.splitlines() or [json.dumps([done.stderr[-300:], *[""] * 8])]
            rows.append([name, *json.loads(lines[-1])])
            print(f"{name}: {rows[-1][1:]}", file=sys.stderr)
    print("\n".join(aligned(rows)))


if __name__ == "__main__":
    main()
