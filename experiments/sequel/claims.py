"""The claims of the papers, with their numbers.

A number that was not read in the paper is marked as remembered.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Claim(NamedTuple):
    """A claim of a paper that a table tests.

    better, than: the names of the two arms that are compared, each at its own best rate.
    expects: "better" (a lower loss), or "equal" (a loss that differs by less than `margin`).
    text: the claim in a sentence.
    paper: the paper's number, with its source.
    checked: whether that number was read in the paper.
    """

    better: str
    than: str
    text: str
    paper: str
    checked: bool
    expects: Literal["better", "equal"] = "better"
    margin: float = 0.01

    @property
    def number(self) -> str:
        """The paper's number, marked if it was not read there."""
        return self.paper if self.checked else f"{self.paper} (remembered, not checked)"


DORA = Claim(
    "dora r8",
    "lora r8",
    "DoRA is better than LoRA",
    "LLaMA-7B, mean accuracy at rank 8: 77.9 against 40.7 (2402.09353)",
    checked=True,
)
DORA_LOW = Claim(
    "dora r1",
    "lora r1",
    "at a low rank, DoRA is far better than LoRA",
    "LLaMA-7B, mean accuracy at rank 4: 61.9 against 39.5 (2402.09353)",
    checked=True,
)
WHERE = Claim(
    "mlp r4",
    "attention r5",
    "at equal parameters, the MLP is better than attention",
    "attention alone is worse at equal parameters (LoRA Without Regret, 2025)",
    checked=True,
)
ALL = Claim(
    "all r2",
    "mlp r4",
    "the MLP alone is as good as all layers",
    "MLP alone as good as all (LoRA Without Regret, 2025)",
    checked=True,
    expects="equal",
)
FULL = Claim(
    "all r2",
    "full",
    "LoRA on all layers is as good as full fine-tuning",
    "equal below capacity, at 9.8 times the rate (LoRA Without Regret, 2025)",
    checked=False,
    expects="equal",
)
LARGE_BATCH = Claim(
    "all r2",
    "all r2, batch 32",
    "a larger batch at equal examples hurts LoRA",
    "large batches hurt (LoRA Without Regret, 2025)",
    checked=False,
)
VERA = Claim(
    "vera r256",
    "lora r8",
    "VeRA is about as good as LoRA with a tenth of its parameters",
    "RoBERTa-base: 85.2 with 0.043M parameters, about LoRA's (2310.11454)",
    checked=True,
    expects="equal",
)
TUNED = "nine variants end within 1 to 2 % of each other at their own rates (2602.04998, abstract)"
LOHA = Claim(
    "loha r4", "lora r8", "with tuned rates, LoHa is as good as LoRA", TUNED, True, "equal"
)
LOKR = Claim(
    "lokr r24", "lora r8", "with tuned rates, LoKr is as good as LoRA", TUNED, True, "equal"
)
RS_AT_256 = Claim(
    "rslora r256",
    "rslora r4",
    "with alpha / sqrt(r), a higher rank is better",
    "perplexity 1.863 at rank 4, 1.836 at rank 2048 (2312.03732)",
    checked=False,
)
RS_OVER_PLAIN = Claim(
    "rslora r256",
    "lora r256",
    "at a high rank, alpha / sqrt(r) is better than alpha / r",
    "alpha / r stays flat over the rank (2312.03732)",
    checked=False,
)
LORA_PLUS = Claim(
    "ratio 16",
    "ratio 1",
    "a rate of B that is 16 times A's is better than the best single rate",
    "1 to 2 % better, up to 2 times faster (2402.12354)",
    checked=False,
)
PISSA = Claim(
    "pissa",
    "zeros",
    "PiSSA ends better than a start at zero",
    "GSM8K 73.76 against 70.79 on NF4 (2404.02948)",
    checked=True,
)
OLORA = Claim(
    "olora", "zeros", "with tuned rates, OLoRA ends as a start at zero", TUNED, True, "equal"
)
EVA = Claim("eva", "zeros", "with tuned rates, EVA ends as a start at zero", TUNED, True, "equal")
_QLORA = "NF4 with double quantisation loses nothing (2305.14314)"
NF4 = Claim("nf4 double", "float32", "an NF4 base loses nothing", _QLORA, False, "equal")
NF4_INT4 = Claim("nf4", "int4", "NF4 is better than int4", "NF4 > FP4 > int4 (2305.14314)", False)
