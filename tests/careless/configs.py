"""Config files that somebody has just edited, and numbers that are not."""

from __future__ import annotations

from tests.careless.case import Case

HEAD = """
from lora_jax.data.config import DataConfig
from lora_jax.training.classification import classification
from lora_jax.training.config import Config, LoraConfig, OptimizerConfig
from lora_jax.training.text import ModelConfig, TextConfig
"""
FILE = "train --config {here}/c.py"


def written(name: str, text: str, *says: str, head: str = HEAD) -> Case:
    """A config file with a fault in line 6 or later; the error names the file and the line."""
    return Case(f"config_{name}", FILE, ("c.py", *says), {"c.py": head + text})


def field(name: str, text: str, *says: str) -> Case:
    return written(name, f"config = Config(workload=print, {text})\n", "line 6", *says)


CONFIGS = [
    written("syntax", "config = Config(\n", "line 6", "'(' was never closed"),
    written("indentation", "if True:\nconfig = 1\n", "line 7", "expected an indented block"),
    written("import", "import flaxx\n", "line 6", "flaxx", "pip install"),
    written("import_name", "from flax import linnen\n", "line 6", "linnen", "flax"),
    written("name", "config = Cofig(steps=3)\n", "line 6", "Cofig", "NameError"),
    written("raises", "config = 1 / 0\n", "line 6", "ZeroDivisionError"),
    written("raises_in_a_function", "def f(): [][0]\nf()\n", "line 6", "IndexError"),
    written("exits", "import sys\nsys.exit(0)\n", "line 7", "SystemExit"),
    written("function", "def config(): return Config\n", "of the type function", "Config(...)"),
    written("other_value", "config = 3\n", "of the type int", "Config(...)"),
    written("nothing", "cfg = 3\n", "no config named 'config'", "holds none"),
    Case("config_not_text", FILE, ("c.py", "null bytes"), {"c.py": b"\x00\x01"}),
    Case("config_latin1", FILE, ("c.py, line 1", "utf-8"), {"c.py": b"x = 'caf\xe9'\n"}),
    Case("config_folder", "train --config {here}", ("no config file",)),
    Case("config_empty", "train --config", ("--config is empty",), status=2, extra=("",)),
    Case("config_json", "train --config {here}/c.json", ("not a Python file",), {"c.json": "{}"}),
    field("unknown_field", "stepz=3", "stepz", "nearest: steps"),
    field("positional", "3, steps=3", "positional"),
    field("steps_text", 'steps="30"', "steps must be int", "'30'"),
    field("steps_float", "steps=30.5", "steps must be int", "30.5"),
    field("steps_none", "steps=None", "steps must be int", "None"),
    field("steps_bool", "steps=True", "steps must be int", "True"),
    field("steps_negative", "steps=-3", "steps must be at least 1, got -3"),
    field("seed_large", "seed=2**70", "seed must be", str(2**70)),
    field("fresh_text", 'fresh="no"', "fresh must be bool", "'no'"),
    field("run_dir_number", "run_dir=3", "run_dir must be str or None", "3"),
    field("nonfinite_word", 'on_nonfinite="halt"', "on_nonfinite must be 'stop' or 'skip'", "halt"),
    field("lora_dict", 'lora={"rank": 3}', "lora must be LoraConfig", "rank"),
    written("workload_none", "config = Config(workload=None)\n", "line 6", "workload must be"),
    field("rank_text", 'lora=LoraConfig(rank="8")', "lora.rank must be int", "'8'"),
    field("alpha_text", 'lora=LoraConfig(alpha="8")', "lora.alpha must be float", "'8'"),
    field("alpha_none", "lora=LoraConfig(alpha=None)", "lora.alpha must be float", "None"),
    field("targets_text", 'lora=LoraConfig(targets="**")', "lora.targets", "('**',)"),
    field("targets_none", "lora=LoraConfig(targets=None)", "lora.targets", "None"),
    field("kind_number", "lora=LoraConfig(kind=3)", "lora.kind must be str", "3"),
    field(
        "rate_text",
        'optimizer=OptimizerConfig(learning_rate="1e-3")',
        "optimizer.learning_rate must be float",
        "'1e-3'",
    ),
    field("schedule", 'optimizer=OptimizerConfig(schedule="liner")', "'linear' or 'cosine'"),
    written("batch_text", 'x = DataConfig(batch_size="16")\n', "line 6", "data.batch_size", "int"),
    written("fields_text", 'x = DataConfig(text_fields="text")\n', "line 6", "('text',)"),
    written("length_float", "x = DataConfig(max_length=12.5)\n", "data.max_length must be int"),
    written("model_none", "x = ModelConfig(reference=None)\n", "model.reference must be str"),
    written("model_dropout", "x = ModelConfig('m', dropout='0.1')\n", "model.dropout", "float"),
    Case(
        "config_own_field",
        FILE,
        ("c.py, line 6: width must be int", "'9'"),
        {"c.py": "\n\n\n\nimport configs.own_model as m\nconfig = m.OwnConfig("
         "workload=m.workload, width='9')\n"},
    ),
    written("workload_returns", "config = Config(workload=lambda config: 3)\n", "Workload", "3"),
    written(
        "workload_raises",
        "def model(config):\n    return 1 / 0\nconfig = Config(workload=model)\n",
        "line 7",
        "ZeroDivisionError",
    ),
    written(
        "sweep",
        "from lora_jax.sweeps.sweep import SweepConfig\n"
        'config = SweepConfig(base=Config(workload=print), grid={"lora.rank": ["a"]})\n',
        "line 7",
        "lora.rank must be int",
    ),
]  # fmt: skip

OWN = "train --config configs/own_model.py"
_NUMBERS = {
    "--optimizer.learning-rate": ("inf", "nan", "-1", "0"),
    "--optimizer.weight-decay": ("inf", "nan", "-1"),
    "--optimizer.warmup": ("nan", "2"),
    "--optimizer.b1": ("nan", "1"),
    "--optimizer.b2": ("-1",),
    "--optimizer.eps": ("inf", "0"),
    "--optimizer.clip": ("inf", "nan"),
    "--optimizer.head-learning-rate": ("inf",),
    "--optimizer.loraplus-lr-ratio": ("inf", "0"),
    "--lora.alpha": ("inf", "nan", "-1"),
    "--lora.dropout": ("1.5", "nan"),
    "--seed": ("-1", "99999999999999999999"),
    "--mesh.data": ("0",),
}
NUMBERS = [
    Case(
        f"{option[2:]}_{value}",
        f"{OWN} {option}={value}",
        # tyro refuses a nested config itself, with status 2
        (option[2:].replace("-", "_"), "must be"),
        status=2 if "." in option else 1,
    )
    for option, values in _NUMBERS.items()
    for value in values
]
NUMBERS += [
    Case("plan_devices", f"{OWN} --plan --plan-devices 0", ("plan_devices must be at least 1",)),
    Case("steps_text", f"{OWN} --steps many", ("--steps", "many"), status=2),
    Case("predict_batch", "predict --adapter x --text a --batch-size 0", ("--batch-size",)),
    Case("predict_window", "predict --adapter x --text a --window -1", ("--window", "-1")),
    Case("generate_nan", "generate --base x --prompt a --temperature nan",
         ("temperature must be", "nan")),
    Case("generate_top_k", "generate --base x --prompt a --top-k 0", ("top_k must be at least 1",)),
    Case("generate_new", "generate --base x --prompt a --max-new-tokens 0", ("--max-new-tokens",)),
    Case("shard_nan", "export {world}/run --format hf --out {here}/o --shard-gb nan",
         ("--shard-gb must be", "nan")),
    Case("shard_zero", "export {world}/run --format hf --out {here}/o --shard-gb 0",
         ("--shard-gb must be", "0")),
    Case("show_rank", "show {world}/model --ranks 0", ("--ranks", "0")),
    Case("import_lengths", "import {world}/peft --out {here}/o --lengths 0 --base {world}/model",
         ("--lengths must be", "0")),
]  # fmt: skip
