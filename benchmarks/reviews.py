"""Compare the accuracy on review snippets of LoRA with a head, and of the same head alone.

    python -m benchmarks.reviews

Each run is one command of `train.py`, which is printed: the default config for three epochs, with
dropout (the default takes two without dropout, to be faster). A finished run is read, not repeated.
The test accuracy is that of the adapter that the validation split picked.
"""

import argparse
import pathlib
import statistics

from benchmarks import common, runs

LONGER = ("--steps", "1932", "--model.dropout", "0.1")
SETTINGS = {"LoRA r=8 on q and v, and the head": (), "the head alone": ("--lora.targets",)}


def accuracy(arguments: tuple[str, ...], folder: pathlib.Path) -> tuple[float, float]:
    """Return the validation and test accuracy of one run."""
    after = runs.summary(arguments, folder)["after"]
    return after["validation"]["accuracy"], after["test"]["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Review snippets: LoRA against the head alone.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=pathlib.Path, default=runs.ROOT / "runs" / "reviews")
    args = parser.parse_args()
    lines = []
    for name, arguments in SETTINGS.items():
        kind = "head" if arguments else "lora"
        pairs = [
            accuracy((*LONGER, "--seed", str(seed), *arguments), args.runs / f"{kind}-{seed}")
            for seed in args.seeds
        ]
        for split, numbers in zip(("validation", "test"), zip(*pairs, strict=True), strict=True):
            each = " ".join(f"{x:.4f}" for x in numbers)
            lines.append((name, split, each, f"{statistics.mean(numbers):.4f}"))
    print(f"\n{common.hardware()}\n")
    print(common.table(("trained", "split", f"seeds {args.seeds}", "mean"), lines))


if __name__ == "__main__":
    main()
