"""PEFT's `adapter_config.json`: every key is read, ignored as history, or refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lora_jax.errors import LoraError
from lora_jax.exchange import patterns
from lora_jax.exchange.tensor_file import shown

# Settings of training, which do not change the function of the trained adapter.
HISTORY = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "qalora_group_size", "revision", "runtime_config", "velora_config",
}  # fmt: skip
# Settings that change the function and that we cannot express: refused unless switched off.
REFUSED = {
    "arrow_config": "several adapters routed by Arrow; load each of them by itself",
    "block_share": "blocks that share one rotation; merge it in PEFT, and load the model",
    "coft": "COFT, which projects its rotations when it runs; merge it in PEFT",
    "kasa_config": "KaSA, which cuts the base's weights; merge it in PEFT, and load the model",
    "layer_replication": "layers that are repeated; build the base with the repeated layers, and "
    "take the key out of adapter_config.json",
    "monteclora_config": "MonteCLoRA, which draws its weights; merge it in PEFT",
    "use_bdlora": "block-diagonal factors; convert it to plain LoRA in PEFT",
    "use_qalora": "QALoRA, whose factors see pooled inputs; merge it in PEFT",
}
_LYCORIS = {"init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"}
METHODS: dict[str, set[str]] = {
    "LORA": set(),
    "LOHA": _LYCORIS,
    "LOKR": _LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
    "IA3": {"feedforward_modules", "init_ia3_weights"},
    "MISS": {"mini_r", "miss_dropout"},
    "OFT": {"eps", "init_weights", "module_dropout", "oft_block_size", "r"},
    "TRAINABLE_TOKENS": {"init_weights"},
    "VERA": {"d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"},
}
"""PEFT's methods that are read, each with settings of its own that the tensors repeat."""
RENAMED = {"alpha": "lora_alpha", "token_indices": "trainable_token_indices"}  # not in LORA
HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task -> the modules that PEFT trains as a whole. Old files do not list them."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
OFF: tuple[Any, ...] = (None, False, "", [], {})
# PEFT's own expressions around the patterns of ranks and alphas, and of layers.
_END, _LAYER = r"(.*\.)?({})$", r"{}\.(?P<idx>\d+)\."

ModuleSettings = tuple[int, float, bool]  # rank, alpha, whether PEFT would adapt the module


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
    alora_invocation_tokens: Any = None
    init_lora_weights: Any = True
    init_weights: Any = True
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    peft_version: str | None = None
    task_type: str | None = None

    @property
    def scaling(self) -> str:
        return "alpha/sqrt(r)" if self.use_rslora else "alpha/r"

    def of_modules(self, modules: Sequence[str]) -> dict[str, ModuleSettings]:
        """Return what the configuration says of each module, by PEFT's rules."""
        targets, names = _patterns_and_names(self.target_modules)
        exclusions, excluded = _patterns_and_names(self.exclude_modules)
        all_linear = self.target_modules is None or "all-linear" in map(str.lower, targets)
        layers, depths = self.layers_to_transform, self.layers_pattern or []
        layers = {layers} if type(layers) is int else set(layers or ())
        depths = [rf"(?:^|.*?\.){p}" for p in ([depths] if isinstance(depths, str) else depths)]
        asked = {
            "rank_pattern": (_END, self.rank_pattern),
            "alpha_pattern": (_END, self.alpha_pattern),
            "exclude_modules": (patterns.WHOLE, exclusions),
            "target_modules": (patterns.WHOLE, [] if all_linear else targets),
            "layers_pattern": (_LAYER, (depths or [r".*?\.[^.]*"]) if layers and names else []),
        }
        found = patterns.first_matches(asked, modules)
        settings = {}
        for module in modules:
            ends = set(_ends(module))
            first: dict[str, Any] = {k: x.get(module, (None, None)) for k, x in found.items()}
            number = first["layers_pattern"][1]
            inside = not layers or module in names or (number and int(number) in layers)
            named = all_linear or module in found["target_modules"] or (inside and ends & names)
            settings[module] = (
                self.rank_pattern.get(first["rank_pattern"][0], self.r),
                float(self.alpha_pattern.get(first["alpha_pattern"][0], self.lora_alpha)),
                bool(named and not (module in found["exclude_modules"] or ends & excluded)),
            )
        return settings

    def saves(self, tensor: str) -> bool:
        """Return whether a tensor belongs to a module that was trained as a whole."""
        saved = self.modules_to_save or []
        saved = [saved] if isinstance(saved, str) else saved
        heads = HEADS.get(self.task_type or "", ())
        return any(f".{m}." in f".{tensor}" for m in (*saved, *heads))

    def token_numbers(self, module: str) -> list[int]:
        """Return the rows of an embedding that were trained."""
        found = self.trainable_token_indices
        if isinstance(found, Mapping):
            ends = set(_ends(module))
            found = next((v for k, v in found.items() if k in ends), None)
        if not isinstance(found, list) or any(type(i) is not int or i < 0 for i in found):
            raise LoraError(
                f"the file has trained rows of {module!r}, and trainable_token_indices is "
                f"{shown(self.trainable_token_indices)}; expected their numbers"
            )
        return found


def parse(json: Mapping[str, Any]) -> PeftConfig:
    fields = {f.name for f in dataclasses.fields(PeftConfig)}
    method = json.get("peft_type")
    if not isinstance(method, str) or method not in METHODS:
        raise LoraError(
            f"peft_type is {shown(method)}; of PEFT's methods {', '.join(METHODS)} are read"
        )
    json = {k: v for k, v in json.items() if k not in METHODS[method]}
    variant = json.get("init_weights")
    if method == "MISS" and isinstance(variant, str):
        raise LoraError(
            f"init_weights is {shown(variant)!r}: this variant of MiSS is not read; merge it in "
            "PEFT, and load the model"
        )
    renamed = {} if method == "LORA" else RENAMED
    json = {renamed.get(key, key): value for key, value in json.items()}
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


def _patterns_and_names(wanted: Any) -> tuple[list[str], set[str]]:
    """Return the patterns and the names of a setting: a text is a pattern, a list has names."""
    return ([wanted], set()) if wanted and isinstance(wanted, str) else ([], set(wanted or ()))


def _ends(module: str) -> Iterator[str]:
    """Yield the names by which a list can name a module: the ends of its own name."""
    while module:
        yield module
        module = module.partition(".")[2]


def check_values(settings: Mapping[str, Any]) -> None:
    """Raise `LoraError` for a known key with a value of the wrong type."""
    for field in dataclasses.fields(PeftConfig):
        value = settings.get(field.name)
        if value is not None and not _RULES.get(field.name, _IS["flag"])(value):
            raise LoraError(f"{field.name} is {shown(value)}, which it cannot be")


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


_IS: dict[str, Callable[[Any], bool]] = {
    "flag": lambda x: type(x) is bool,
    "text": lambda x: isinstance(x, str),
    "rank": lambda x: type(x) is int and x >= 1,
    "number": lambda x: type(x) in (int, float) and abs(x) < 1e300,  # an int may be any size
    "texts": lambda x: all(isinstance(y, str) for y in (x if isinstance(x, list) else [x])),
    "layers": lambda x: all(type(y) is int for y in (x if isinstance(x, list) else [x])),
    "ranks": lambda x: isinstance(x, dict) and all(map(_IS["rank"], x.values())),
    "numbers": lambda x: isinstance(x, dict) and all(map(_IS["number"], x.values())),
}
_RULES = dict.fromkeys(("peft_type", "peft_version", "task_type"), _IS["text"]) | {
    "r": _IS["rank"], "lora_alpha": _IS["number"], "rank_pattern": _IS["ranks"],
    "alpha_pattern": _IS["numbers"], "bias": lambda x: x in ("none", "all", "lora_only"),
    "target_modules": _IS["texts"], "exclude_modules": _IS["texts"], "layers_pattern": _IS["texts"],
    "target_parameters": _IS["texts"], "modules_to_save": _IS["texts"],
    "layers_to_transform": _IS["layers"], "num_cayley_neumann_terms": _IS["rank"],
    "init_weights": lambda x: isinstance(x, bool),
    "init_lora_weights": lambda x: isinstance(x, bool | str),
    "trainable_token_indices": lambda x: isinstance(x, dict | list),
    "alora_invocation_tokens": lambda x: isinstance(x, list) and all(map(_is_token, x)),
}  # fmt: skip
