"""The formulae give the article's numbers of trained parameters, in millions as in the article."""

from __future__ import annotations

import pytest

from experiments.paper import counts

GPT3 = {"width": 12288, "layers": 96}
MEDIUM, LARGE = {"width": 1024, "layers": 24}, {"width": 1280, "layers": 36}  # GPT-2
ROBERTA_BASE, ROBERTA_LARGE = {"width": 768, "layers": 12}, {"width": 1024, "layers": 24}


def houlsby(size: int, width: int, layers: int) -> int:
    """Two adapter layers in each layer; the article counts no norms here."""
    return counts.adapter(width, size, 2 * layers)


def pfeiffer(size: int, width: int, layers: int) -> int:
    return counts.adapter(width, size, layers)


def lin(size: int, width: int, layers: int) -> int:
    return counts.adapter(width, size, layers, norms=layers)


def query_and_value(rank: int, width: int, layers: int) -> int:
    return counts.lora(rank, [(width, width)] * 2 * layers)


@pytest.mark.parametrize(
    ("count", "paper"),
    [
        # Table 4, GPT-3.
        (houlsby(1, **GPT3), "7.1"),
        (houlsby(8, **GPT3), "40.1"),
        (query_and_value(1, **GPT3), "4.7"),
        (query_and_value(8, **GPT3), "37.7"),
        # 256 special tokens before the text and 8 behind it; 256 in all would be 3.1.
        (counts.prefix_embedding(GPT3["width"], 256 + 8), "3.2"),
        # Table 3, GPT-2 medium and large, at the widths that lead to its counts.
        (lin(6, **MEDIUM), "0.37"),
        (lin(224, **MEDIUM), "11.09"),
        (lin(8, **LARGE), "0.88"),
        (lin(248, **LARGE), "23.00"),
        # Table 2, RoBERTa base and large.
        (query_and_value(8, **ROBERTA_BASE), "0.3"),
        (query_and_value(8, **ROBERTA_LARGE), "0.8"),
        (pfeiffer(16, **ROBERTA_LARGE), "0.8"),
        (houlsby(8, **ROBERTA_LARGE), "0.8"),
        (counts.biases(768, 3072, 12), "0.1"),
    ],
)
def test_the_formula_gives_the_papers_number(count: int, paper: str) -> None:
    digits = len(paper.partition(".")[2])
    assert f"{count / 1e6:.{digits}f}" == paper


@pytest.mark.parametrize(
    ("count", "ours", "paper"),
    [
        # GPT-3, BitFit: a GPT block has 11 d biases (7 d and the MLP's 4 d); the article's number
        # is 12 L d.
        (counts.biases(12288, 4 * 12288, 96), "13.0", "14.2"),
        # GPT-3, PreEmbed with lp + li = 256 read literally (with 256 + 8 it is 3.2, above).
        (counts.prefix_embedding(12288, 256), "3.1", "3.2"),
        # GPT-2 medium, Adapter^H: the nearest width; 113 gives 11.16, and all norms 11.11.
        (houlsby(112, **MEDIUM), "11.06", "11.09"),
        # GPT-2, LoRA r = 4 on query and value.
        (query_and_value(4, **MEDIUM), "0.39", "0.35"),
        (query_and_value(4, **LARGE), "0.74", "0.77"),
        # GPT-2 medium, PreLayer, quoted there from Li and Liang, who say 0.1 % of the model: the
        # nearest number of tokens; 15 gives 0.37.
        (counts.prefix_layer(1024, 14, 24), "0.34", "0.35"),
        # RoBERTa large, Adapter^P and Adapter^H of width 64: in units of 2^20 they are 3.02 and
        # 6.05.
        (pfeiffer(64, **ROBERTA_LARGE), "3.2", "3.0"),
        (houlsby(64, **ROBERTA_LARGE), "6.3", "6.0"),
    ],
)
def test_where_the_papers_number_is_not_its_formulas(count: int, ours: str, paper: str) -> None:
    digits = len(paper.partition(".")[2])
    assert f"{count / 1e6:.{digits}f}" == ours != paper


def test_bitfit_of_gpt3_is_twelve_vectors_a_layer() -> None:
    """The article's 14.2M is this number."""
    assert f"{12 * GPT3['layers'] * GPT3['width'] / 1e6:.1f}" == "14.2"
