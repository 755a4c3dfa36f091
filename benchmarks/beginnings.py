"""Train on review snippets with adapters that begin as PiSSA, OLoRA, EVA or LoftQ, or as Gaussian.

Command:   python -m benchmarks.beginnings
Hardware:  2 CPU cores, 1 GB; 21 runs of about one minute and a half on one core each
Result:    test accuracy of three seeds, on the float base and on NF4

Each run is the default config, r=8 on q and v and a head, for an eighth of its steps, so that the
initialization still matters. With several `--rates`, each method uses the rate with the best mean
accuracy on the validation split; the test accuracies are at that rate.
"""

import argparse
import pathlib
import statistics

from benchmarks import common, runs

METHODS = (
    ("none", "gaussian"),
    ("none", "pissa"),
    ("none", "olora"),
    ("none", "eva"),
    ("nf4", "gaussian"),
    ("nf4", "pissa"),
    ("nf4", "loftq"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Review snippets: how adapters begin.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bases", nargs="+", default=["none", "nf4"], choices=["none", "nf4"])
    parser.add_argument("--rates", nargs="+", default=["2e-3"])
    parser.add_argument("--steps", type=int, default=161)
    parser.add_argument("--runs", type=pathlib.Path, default=runs.ROOT / "runs" / "beginnings")
    options = parser.parse_args()
    rows = []
    for base, method in METHODS:
        if base not in options.bases:
            continue
        best = max(
            (_of_rate(base, method, rate, options) for rate in options.rates),
            key=lambda found: statistics.mean(found[1]),
        )
        rate, validation, test = best
        each = " ".join(f"{x:.4f}" for x in test)
        means = (f"{statistics.mean(x):.4f}" for x in (validation, test))
        rows.append((base, method, rate, *means, each))
    print(f"\n{common.hardware()}\n")
    names = ("base", "begins as", "learning rate", "validation", "test")
    print(common.table((*names, f"seeds {options.seeds}"), rows))


def _of_rate(
    base: str, method: str, rate: str, options: argparse.Namespace
) -> tuple[str, list[float], list[float]]:
    """Return the rate, and the accuracies of all seeds on the validation and the test split."""
    after = []
    for seed in options.seeds:
        arguments = ["--steps", str(options.steps), "--seed", str(seed), "--lora.init", method]
        arguments += ["--model.quantize", base, "--optimizer.learning-rate", rate]
        folder = options.runs / f"{base}-{method}-{rate}-{seed}"
        after.append(runs.summary(arguments, folder)["after"])
    validation, test = (
        [found[split]["accuracy"] for found in after] for split in ("validation", "test")
    )
    return rate, validation, test


if __name__ == "__main__":
    main()
