"""PEFT's `adapter_config.json`: every key is read, ignored as history, or refused by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lora_jax.errors import LoraError
from lora_jax.exchange.tensor_file import shown

# Settings of training, which do not change the function of the trained adapter.
HISTORY = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "qalora_group_size", "revision", "runtime_config", "velora_config",
}  # fmt: skip
# Settings that change the function and that we cannot express: refused unless switched off.
REFUSED = {
    "alora_invocation_tokens": "an adapter that is switched on by tokens; train it without",
    "arrow_config": "several adapters routed by Arrow; load each of them by itself",
    "kasa_config": "KaSA, which cuts the base's weights; merge it in PEFT, and load the model",
    "layer_replication": "layers that are repeated; build the base with the repeated layers, and "
    "take the key out of adapter_config.json",
    "monteclora_config": "MonteCLoRA, which draws its weights; merge it in PEFT",
    "use_bdlora": "block-diagonal factors; convert it to plain LoRA in PEFT",
    "use_qalora": "QALoRA, whose factors see pooled inputs; merge it in PEFT",
}
HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task -> the modules that PEFT trains as a whole. Old files do not list them."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MOST_PATTERN = 2_000  # characters of a regular expression
OFF: tuple[Any, ...] = (None, False, "", [], {})


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The keys that decide the function of an adapter; the names and defaults are PEFT's."""

    peft_type: str
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    target_parameters: Any = None
    modules_to_save: Any = None
    trainable_token_indices: Any = None
    ensure_weight_tying: bool = False
    init_lora_weights: Any = True
    peft_version: str | None = None
    task_type: str | None = None

    @property
    def scaling(self) -> str:
        return "alpha/sqrt(r)" if self.use_rslora else "alpha/r"

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives a module."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def alpha_of(self, module: str) -> float:
        """Return the alpha that the configuration gives a module."""
        return float(_by_pattern(self.alpha_pattern, module, self.lora_alpha))

    def targets(self, module: str) -> bool:
        """Return whether PEFT would adapt a module of this name."""
        if _named(self.exclude_modules, module):
            return False
        wanted = self.target_modules
        if wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear"):
            return True
        return _named(wanted, module) and (isinstance(wanted, str) or self._has_layer(module))

    def _has_layer(self, module: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = self.layers_pattern or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        starts = [rf"(?:^|.*?\.)(?:{p})" for p in patterns] or [r".*?\.[^.]*"]
        for start in starts:
            if match := compiled(rf"{start}\.(?P<layer>\d+)\.").match(module):
                return int(match["layer"]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def saves(self, tensor: str) -> bool:
        """Return whether a tensor belongs to a module that was trained as a whole."""
        saved = self.modules_to_save or []
        saved = [saved] if isinstance(saved, str) else saved
        heads = HEADS.get(self.task_type or "", ())
        return any(f".{m}." in f".{tensor}" for m in (*saved, *heads))

    def token_numbers(self, module: str) -> list[int]:
        """Return the rows of an embedding that were trained.

        Raises:
          LoraError: the configuration does not list them.
        """
        found = self.trainable_token_indices
        if isinstance(found, Mapping):
            found = next((v for k, v in found.items() if _named([k], module)), None)
        if not isinstance(found, list) or any(type(i) is not int or i < 0 for i in found):
            raise LoraError(
                f"the file has trained rows of {module!r}, and trainable_token_indices is "
                f"{shown(self.trainable_token_indices)}; expected their numbers"
            )
        return found


def parse(json: Mapping[str, Any]) -> PeftConfig:
    """Read the JSON object.

    Raises:
      LoraError: an unknown key, or one with an impossible value.
    """
    fields = {f.name for f in dataclasses.fields(PeftConfig)}
    if json.get("peft_type") != "LORA":
        raise LoraError(
            f"peft_type is {shown(json.get('peft_type'))}; of PEFT's methods LORA alone is read"
        )
    for key, value in json.items():
        if key in REFUSED and value not in OFF:
            raise LoraError(f"{key} is {shown(value)}: {REFUSED[key]}")
        if key not in fields | HISTORY | set(REFUSED) and value not in OFF:
            raise LoraError(
                f"the key {shown(key)!r} ({shown(value)}) is not understood by this lora_jax; it "
                "may change what the adapter means"
            )
    start = str(json.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_BASE):
        raise LoraError(
            f"init_lora_weights is {shown(json['init_lora_weights'])!r}: PEFT changes the base's "
            "weights when it loads this adapter. In PEFT, save it as plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    known = {key: json[key] for key in fields if json.get(key) is not None}
    check_values(known)
    return PeftConfig(**known)


def compiled(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression that comes from a file.

    Raises:
      LoraError: an invalid expression, or one that could take for ever: a repeated group that holds
        a repetition or a choice, `(a+)+`.
    """
    if _repeats_a_repetition(pattern):
        raise LoraError(f"the pattern {shown(pattern)!r} repeats what repeats itself")
    try:
        if len(pattern) > MOST_PATTERN:
            raise re.error(f"longer than {MOST_PATTERN} characters")
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise LoraError(f"{shown(pattern)!r} is not a pattern: {error}") from error


def _repeats_a_repetition(pattern: str) -> bool:
    """Return whether a repeated group holds a repetition, so that matching may take for ever."""
    groups: list[bool] = []  # for each open group: whether it holds a repetition
    closed = False  # the same for the group that ends at the last character
    previous = ""
    for c in re.sub(r"\\.", "_", pattern):  # an escaped character stands for itself
        if c in "*+{" and previous == ")" and closed:
            return True
        if c in "*+{|":
            groups = [True] * len(groups)
        elif c == "(":
            groups.append(False)
        elif c == ")":
            closed = bool(groups and groups.pop())
        previous = c
    return False


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the name, as in PEFT."""
    for pattern, value in patterns.items():
        if compiled(rf"(.*\.)?({pattern})$").match(module):
            return value
    return default


def _named(wanted: Any, module: str) -> bool:
    """Return whether a list names the module by its end, or a pattern matches its whole name."""
    if not wanted:
        return False
    if isinstance(wanted, str):
        return compiled(wanted).fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def check_values(settings: Mapping[str, Any]) -> None:
    """Raise `LoraError` for a known key with a value of the wrong type."""
    fields = {f.name for f in dataclasses.fields(PeftConfig)}
    known = {key: value for key, value in settings.items() if key in fields and value is not None}

    def number(x: Any) -> bool:
        return type(x) in (int, float) and abs(x) < 1e300  # an int may be larger than any float

    def rank(x: Any) -> bool:
        return type(x) is int and x >= 1

    def texts(x: Any) -> bool:
        return isinstance(x, str) or (isinstance(x, list) and all(isinstance(y, str) for y in x))

    def layers(x: Any) -> bool:
        return type(x) is int or (isinstance(x, list) and all(type(y) is int for y in x))

    def each(check: Any) -> Any:
        return lambda x: isinstance(x, dict) and all(map(check, x.values()))

    def anything(x: Any) -> bool:
        return True

    def flag(x: Any) -> bool:
        return type(x) is bool

    rules = dict.fromkeys(known, flag) | {
        "peft_type": anything, "r": rank, "lora_alpha": number, "rank_pattern": each(rank),
        "alpha_pattern": each(number), "bias": lambda x: x in ("none", "all", "lora_only"),
        "target_modules": texts, "exclude_modules": texts, "layers_to_transform": layers,
        "layers_pattern": texts, "target_parameters": texts, "modules_to_save": texts,
        "trainable_token_indices": lambda x: isinstance(x, dict | list),
        "init_lora_weights": lambda x: isinstance(x, bool | str),
        "peft_version": lambda x: isinstance(x, str), "task_type": lambda x: isinstance(x, str),
    }  # fmt: skip
    for key, value in known.items():
        if not rules[key](value):
            raise LoraError(f"{key} is {shown(value)}, which it cannot be")
