"""Compare the tokens per second of greedy generation by lora_jax and by transformers.

    python -m benchmarks.peft.generation

Both sides open SmolLM2-135M in float32, as `lora-jax export --format hf` writes it, and continue
the same prompts of random tokens. Two worker processes (`generation_ours.py`,
`generation_theirs.py`) run in turns. The time to read the prompts is that of writing one token. The
time of decoding is what more tokens take beyond that. The numbers are medians; of the two
attentions of transformers, the faster one counts. The output says whether both sides write the same
tokens.
"""

import argparse
import os
import pathlib
import sys
import tempfile

from benchmarks import commands, common
from benchmarks.exported_model import exported
from benchmarks.peft.compare import HERE, VECTORS, Seconds, Worker, environment, medians

PROMPT = 48


def rate(tokens: int, taken: float) -> str:
    return f"{tokens / taken:,.1f}"


def lines(rows: int, new: int, found: dict[tuple[str, str], Seconds]) -> list[tuple[str, ...]]:
    """Return the lines of the table for a batch of `rows` rows: prefill and decoding."""
    faster = min(("eager", "sdpa"), key=lambda a: found["theirs", f"{rows} {new} {a}"].wall)
    ours = [found["ours", f"{rows} {count} -"] for count in (1, new)]
    theirs = [found["theirs", f"{rows} {count} {faster}"] for count in (1, new)]
    said = []
    for what, tokens, of in (
        ("read", rows * PROMPT, lambda both: both[0]),
        ("write", rows * (new - 1), lambda b: Seconds(*(y - x for x, y in zip(*b, strict=True)))),
    ):
        mine, other = of(ours), of(theirs)
        numbers = (rate(tokens, mine.wall), f"{rate(tokens, other.wall)} ({faster})")
        ratios = (f"{other.wall / mine.wall:.2f}", f"{other.cpu / mine.cpu:.2f}")
        said.append((str(rows), what, *numbers, *ratios))
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description="Generation: lora_jax / transformers.")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new", type=int, default=32, help="tokens that are written to each row")
    parser.add_argument("--vectors", choices=VECTORS, default="native")
    parser.add_argument("--cores", type=int, default=2, help="cores that both sides may use")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--python", type=pathlib.Path, help="a Python with torch and peft")
    parser.add_argument("--model", type=pathlib.Path, help="an exported folder; else one is made")
    args = parser.parse_args()
    python = args.python or environment()
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or exported(pathlib.Path(scratch))
        asked = [str(folder), str(PROMPT), str(args.new), str(args.cores), *map(str, args.rows)]
        ours = (sys.executable, "-m", "benchmarks.peft.generation_ours")
        theirs = (str(python), str(HERE / "generation_theirs.py"))
        workers = {
            name: Worker(*command, *asked, vectors=args.vectors)
            for name, command in (("ours", ours), ("theirs", theirs))
        }
        found = medians(workers, args.repeats)
        for worker in workers.values():
            worker.close()
    said = [worker.versions.split("; wrote ") for worker in workers.values()]
    versions = said[1][0]
    print(f"{common.hardware(versions)}; vectors: {args.vectors}; {commands.load()}")
    print(
        "same tokens on both sides" if said[0][1] == said[1][1] else "DIFFERENT TOKENS", end="\n\n"
    )
    header = ("rows", "tokens", "lora_jax, tokens/s", "transformers, tokens/s")
    table = [line for rows in args.rows for line in lines(rows, args.new, found)]
    print(common.table((*header, "ours / theirs", "of CPU time"), table))


if __name__ == "__main__":
    main()
