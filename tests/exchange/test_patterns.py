"""Patterns of a stranger are matched as `re` and PEFT do, and in bounded time."""

from __future__ import annotations

import re
from typing import Any

import pytest

import lora_jax
from lora_jax.exchange import patterns, peft_config

NAMES = [
    *(f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1, 10) for x in "qkvo"),
    *(f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in (1, 2) for j in (0, 2)),
    *(
        "model.vision.layers.0.q_proj",
        "q_proj",
        "lm_head",
        "layers.1.q_proj",
        "h.aa.bb",
        "ü.Q_PROJ",
    ),
]
LEGITIMATE = [
    *("q_proj", ".*", r".*\.(q|v)_proj", "((a|b)+|.*q_proj)", "(a+)+q|(.|q)*v_proj", "(.*)*proj"),
    *("^(?!.*vision).*q_proj$", r".*(?<!vision)\.layers\.\d+\..*", r"(?=.*self)(?=.*[qv]_).*"),
    *(r"h\.(.)\1\.(.)\2", r"(?P<x>h)\.(?P<y>a)(?P=y)\.b+", "(?i).*Q_PROJ", r"(?s).*\W.*_proj"),
    "(?x) .* \\. (?: q | k )  # the two\n _proj",
    *(r"(?:(?:[a-z]+|\d{1,2})\.)*(?:(?:q|k)_proj)", r".*\.layers\.([02468]|1\d?)\..*", "(?>.*)x"),
    *(r"(model\.)?(?(1)layers.*|q_proj)", r"\w+\.\w+", r".*layers\.\d+?\.(?:self_attn\.)?q_proj"),
]  # fmt: skip


@pytest.mark.parametrize("pattern", LEGITIMATE)
def test_a_pattern_matches_what_re_matches(pattern: str) -> None:
    asked = {"whole": (patterns.WHOLE, [pattern]), "start": ("(.*x)?{}", [pattern])}
    found = patterns.first_matches({"whole": asked["whole"]}, NAMES)
    wanted = {name: (pattern, None) for name in NAMES if re.fullmatch(pattern, name)}
    assert found == {"whole": wanted}
    assert wanted or pattern == "(?>.*)x"
    if not pattern.startswith("(?") or pattern.startswith(("(?=", "(?!", "(?:", "(?P", "(?>")):
        wanted = {n: (pattern, None) for n in NAMES if re.match(f"(.*x)?{pattern}", n)}
        assert patterns.first_matches({"start": asked["start"]}, NAMES) == {"start": wanted}


def test_the_first_pattern_decides_and_one_process_answers_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain patterns need no process, and any number of others need one."""
    run, started = patterns.subprocess.run, []
    monkeypatch.setattr(
        patterns.subprocess, "run", lambda *a, **k: started.append(a) or run(*a, **k)
    )
    plain = {"a": ("(?:.*[.])?{}$", ["k_proj", "q_proj", "proj"])}
    assert set(patterns.first_matches(plain, NAMES)["a"].values()) == {
        ("k_proj", None),
        ("q_proj", None),
    }
    assert not started
    many = {"a": ("{}", ["h.*", ".*q_proj", ".*"]), "b": ("{}", [f".*{i}.*" for i in range(300)])}
    found = patterns.first_matches(many, NAMES)
    assert found["a"]["h.aa.bb"][0] == "h.*" and found["a"]["q_proj"][0] == ".*q_proj"
    assert found["a"]["lm_head"][0] == ".*" and len(found["a"]) == len(NAMES)
    assert {p for p, _ in found["b"].values()} == {".*0.*", ".*1.*", ".*2.*"}
    assert len(started) == 1


HOSTILE = [".*" * 25 + "Z", "(?=(a*)*)(.*.*)*(?<!Z)Z", "(?:(?:.*)*)*Z"]
KEYS: dict[str, Any] = {
    "target_modules": lambda p: {"target_modules": p},
    "exclude_modules": lambda p: {"exclude_modules": p},
    "layers_pattern": lambda p: {
        "layers_pattern": ["h", p], "layers_to_transform": 1, "target_modules": ["q_proj"]
    },
    "rank_pattern": lambda p: {"rank_pattern": {f"{p}{i}": 2 for i in range(1000)}},
    "alpha_pattern": lambda p: {"alpha_pattern": {"k_proj": 2, p: 3}},
}  # fmt: skip


@pytest.mark.few(5)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_slow_pattern_is_an_error(
    key: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.4)
    config = peft_config.parse({"peft_type": "LORA", **KEYS[key](pattern)})
    with pytest.raises(lora_jax.LoraError, match=rf"{key}.*took more than 0.4 s.*as a list"):
        config.of_modules(NAMES)


def test_a_greedy_pattern_is_an_error() -> None:
    with pytest.raises(lora_jax.LoraError, match=r"target_modules: .*(took more|MemoryError)"):
        patterns.first_matches({"target_modules": ("{}", ["(?:(x)|.)*"])}, ["a" * 30_000_000])


@pytest.mark.parametrize(
    "pattern", ["(", "*", "(?L)a", "(?P<a>x)(?P<a>y)", "a{99999999999}", "(" * 9999]
)
def test_what_is_not_a_pattern_is_an_error(pattern: str) -> None:
    with pytest.raises(lora_jax.LoraError, match=r"rank_pattern: .* is not a pattern"):
        peft_config.parse({"peft_type": "LORA", "rank_pattern": {pattern: 1}}).of_modules(NAMES)


def test_many_names_of_many_modules_are_found_at_once() -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(100_000)]
    settings = {
        "peft_type": "LORA",
        "target_modules": names,
        "exclude_modules": [f"{i}" for i in range(100_000)],
    }
    found = peft_config.parse(settings).of_modules(names)
    assert all(targeted for _, _, targeted in found.values())


# Settings -> for each of NAMES whether PEFT 0.21.2 adapts it, or its rank. They are the answers of
# PEFT's own `check_target_module_exists` and `get_pattern_key`.
OF_PEFT: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_proj"]}, "1000100010000000110100"),
    ({"target_modules": ["proj"]}, "0000000000000000000000"),
    ({"target_modules": []}, "0000000000000000000000"),
    ({"rank_pattern": {"": 3}}, "8888888888888888888888"),
    ({"target_modules": ["self_attn.q_proj", "h.aa.bb", "lm_head"]}, "1000100010000000001010"),
    ({"target_modules": ".*q_proj"}, "1000100010000000110100"),
    ({"target_modules": "q_proj"}, "0000000000000000010000"),
    ({"target_modules": "^(?!.*vision).*q_proj$"}, "1000100010000000010100"),
    ({"target_modules": ".*q_proj", "exclude_modules": ".*vision.*"}, "1000100010000000010100"),
    (
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.q_proj", "lm_head"]},
        "1000100010000000010100",
    ),
    ({"target_modules": ["q_proj"], "exclude_modules": "q_proj"}, "1000100010000000100100"),
    ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}, "0000100000001100010000"),
    (
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 10]},
        "1000000010000000110000",
    ),
    (
        {
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": [0],
            "layers_pattern": "layers",
        },
        "1000000000000000110000",
    ),
    (
        {
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": [2, 0],
            "layers_pattern": ["h", "experts"],
        },
        "0000000000001111010000",
    ),
    (
        {
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": [0, 1],
            "layers_pattern": ["self|layers"],
        },
        "0000000000000000010100",
    ),
    (
        {
            "target_modules": ["layers.1.q_proj", "k_proj"],
            "layers_to_transform": [0],
            "layers_pattern": ["l.*s"],
        },
        "0100000000000000000100",
    ),
    ({"target_modules": "(?i).*q_proj"}, "1000100010000000110101"),
    ({"rank_pattern": {"q_proj": 2, "layers.1.self_attn.q_proj": 3}}, "2888288828888888228288"),
    ({"rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 2}}, "2888388828888888228288"),
    ({"rank_pattern": {"layers\\.1\\..*": 3, "[qk]_proj": 2}}, "2288333322883388228388"),
    ({"rank_pattern": {"model|q_proj": 3, "^lm": 5, ".*head": 4}}, "3888388838888888334388"),
    ({"rank_pattern": {"(?!layers).*q_proj": 3}}, "3888388838888888338388"),
    ({"rank_pattern": {"a)|(h": 3, "layers.1": 4}}, "8888888888888888888838"),
]


@pytest.mark.parametrize(("settings", "wanted"), OF_PEFT)
def test_modules_are_those_of_peft(settings: dict[str, Any], wanted: str) -> None:
    found = peft_config.parse({"peft_type": "LORA", **settings}).of_modules(NAMES)
    ranks = "rank_pattern" in settings
    got = "".join(str(own[0] if ranks else int(own[2])) for own in found.values())
    assert got == wanted
