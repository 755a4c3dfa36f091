"""Write a trained run as a model or an adapter of another tool.

    lora-jax export runs/reviews --format hf --out merged       a model that transformers opens
    lora-jax export runs/reviews --format peft --out adapter    a PEFT adapter
    lora-jax export runs/a runs/b --format peft --out adapters  several, and vLLM's command for all

    hf       the adapter merged into its base: config.json, safetensors, tokenizer
    peft     adapter_config.json and adapter_model.safetensors, for PEFT, vLLM, SGLang, ...
    gguf     adapter.gguf, for llama.cpp
    mlx      adapters.safetensors, for mlx-lm
    orbax    a copy of the adapter, for lora_jax.restore

--as-lora RANK writes an update of any kind (DoRA, parameters trained in full, a base that PiSSA or
LoftQ changed) as plain LoRA, exactly if it has that rank, and otherwise the nearest. It prints the
error of each target and of the logits on random inputs, and writes them to as_lora.json.

The run directory is not changed. The folder appears whole or not at all, even if the command is
killed; the next export to the same folder deletes what a kill left (`.writing-*`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import shlex
import shutil
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn

from lora_jax import models
from lora_jax.adapters import Adapter
from lora_jax.bases.recipe import ABOUT, BEGUN
from lora_jax.checkpoint import fingerprint, save
from lora_jax.errors import LoraError
from lora_jax.exchange import consumers, hf_settings, model_card, peft, shards
from lora_jax.exchange.gguf_base import GgufBase
from lora_jax.exchange.merged_weights import MergedWeights
from lora_jax.exchange.plain_run import PlainRun, plain_run
from lora_jax.exchange.stored_base_adapter import over_stored_base
from lora_jax.models.hf_module import HfNames
from lora_jax.models.weights.folder import Folder
from lora_jax.models.weights.stored import LAST
from lora_jax.serving.served_adapters import BaseChoice, Served, open_run
from lora_jax.system import table, whole_files
from lora_jax.system.console import Bar, Console, command, say
from lora_jax.system.whole_files import whole_folder, write_json, write_together

Format = Literal["hf", "peft", "gguf", "mlx", "orbax"]


@dataclasses.dataclass(frozen=True)
class ExportOptions(BaseChoice):
    """The options of the command line."""

    run: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """A run directory of train.py, or a folder that lora_jax.save wrote. peft takes several: each
    gets a folder of its name in --out."""
    format: Format
    """The format to write: hf, peft, gguf, mlx or orbax."""
    out: str
    """The folder to write; it must be new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """hf, gguf: the dtype of the weights; gguf takes float32 or float16."""
    shard_gb: float = 5.0
    """hf: the largest size of a file of weights, in units of 10^9 bytes."""
    profile: Literal["faithful", "portable"] = "faithful"
    """peft: faithful writes it as PEFT does, portable so that vLLM, SGLang, llama.cpp, LoRAX and
    Ollama all read it in the same way."""
    head: bool = True
    """peft: write the head of a classifier, too; without it the files describe its encoder."""
    base_name: str | None = None
    """peft: the base model to name in the adapter's configuration. None: the run's own base."""
    as_lora: int | None = None
    """All but hf: write plain LoRA of at most this rank, and say the error. None: write what the
    format has for the run's kind."""
    share_rank: bool = False
    """With --as-lora: the rank is the mean over all matrices, which share it by singular values."""


def export(options: ExportOptions, _: Console, console: Console) -> None:
    """Write the export that the options describe, whole or not at all, and report it."""
    out = pathlib.Path(options.out)
    if not 0 < options.shard_gb < math.inf:
        raise LoraError(f"--shard-gb must be above 0 and finite, got {options.shard_gb}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoraError(f"{out} is there and not an empty folder; choose another --out")
    if len(options.run) != 1:
        _several(options, out, console)
        return
    run = open_run(options.run[0], options.base, options.trust_base)
    say(console, f"{run.member.name}: {run.member.folder}\ntrained on {run.trained_on}")
    if options.as_lora is None:
        if options.share_rank:
            raise LoraError("--share-rank is for --as-lora RANK")
        say(console, _Export(run, None, options, out, console).write())
        return
    if options.format == "hf":
        raise LoraError("--format hf writes merged weights, which have no rank: drop --as-lora")
    plain = plain_run(run, options.as_lora, options.share_rank)
    ranks = {t.path: t.rank for t in plain.adapter.layout.targets}
    rows = [(p, str(ranks.get(p, 0)), f"{cut.relative:.2%}") for p, cut in plain.errors.items()]
    say(console, "\n".join(table.aligned([("as plain LoRA", "rank", "error"), *rows])))
    say(console, f"error of the logits on random inputs: {plain.logits:.3%} of the run's change")
    say(console, _Export(run, plain, options, out, console).write())
    targets = {
        path: {"rank": ranks.get(path, 0), "error": float(x.error), "relative": float(x.relative)}
        for path, x in plain.errors.items()
    }
    write_json(out / "as_lora.json", {"targets": targets, "logits": plain.logits})


def _several(options: ExportOptions, out: pathlib.Path, console: Console) -> None:
    """Export several runs, each to a folder of its name, and print vLLM's command for all."""
    names = [pathlib.Path(run).resolve().name for run in options.run]
    if options.format != "peft" or not names or len(set(names)) < len(names):
        raise LoraError(f"several runs need --format peft and different names; got {names}")
    for run, name in zip(options.run, names, strict=True):
        one = dataclasses.replace(options, run=(run,), out=str(out / name))
        export(one, console, console)
    settings = [peft.describe(out / name).settings for name in names]
    if len({one["base_model_name_or_path"] for one in settings}) > 1:
        say(console, "their bases differ: vLLM serves the adapters of one base at a time")
        return
    base, rank = settings[0]["base_model_name_or_path"], max(map(consumers.vllm_rank, settings))
    modules = " ".join(shlex.quote(f"{name}={out / name}") for name in names)
    several = f"--enable-lora --max-loras {len(names)} --max-lora-rank {rank}"
    say(console, f"vllm serve {shlex.quote(base)} {several} --lora-modules {modules}")


@dataclasses.dataclass(frozen=True)
class _Export:
    """One run on its way to a folder; `plain` is the run as plain LoRA, with --as-lora."""

    run: Served
    plain: PlainRun | None
    options: ExportOptions
    out: pathlib.Path
    console: Console

    def write(self) -> str:
        """Write the folder in its format, with a README.md, and return the message."""
        run, format = self.run, self.options.format
        said: str = getattr(self, format)()
        layout = run.member.layout if self.plain is None else self.plain.adapter.layout
        rank = consumers.vllm_rank({"r": max((t.rank for t in layout.targets), default=1)})
        head = self.options.head or format != "peft"
        card = model_card.text(run, format, self.name, rank, head)
        whole_files.write(self.out / "README.md", card.encode())
        return said

    def hf(self) -> str:
        run, options, out = self.run, self.options, self.out
        dtype = np.dtype(options.dtype if options.dtype != "bfloat16" else jnp.bfloat16)
        files, weights = hf_settings.writers(run, dtype), MergedWeights(run, dtype)
        tensors = weights.tensors()
        total = sum(x.nbytes for x in tensors)
        columns = BarColumn(), DownloadColumn(), TimeRemainingColumn()
        with Bar(self.console, *columns, transient=True) as bar:
            done = functools.partial(bar.advance, bar.add_task("", total=total))
            written = shards.writers(tensors, options.shard_gb * 1e9, done)

            def last(path: pathlib.Path) -> None:
                if not options.allow_other_base:
                    weights.check_base()
                files["config.json"](path)

            write_together(out, {**written, **files, "config.json": last})
        kind = hf_settings.config_json(run, dtype)["architectures"][0]
        return f"wrote {out}: {kind}, {len(tensors)} tensors, {total / 1e9:.2f} GB in {dtype}"

    def peft(self) -> str:
        run, options = self.run, self.options
        task, adapter, names, note = "CAUSAL_LM", self.adapter, self.names, ""
        if run.head is not None and options.head:
            task, note = "SEQ_CLS", f", to be opened with num_labels={run.head.num_classes}"
            hf_settings.check_head(run, merged=False)
        elif run.head is not None:
            decoder = run.head.pooling == LAST
            task = "CAUSAL_LM" if decoder else "FEATURE_EXTRACTION"
            names = models.hf_names(run.config, root=run.root)
            outputs = run.head.num_classes
            note = f"\nleft out: {run.head.pooling} pooling and the head of {outputs} outputs"
            kept = {p: x for p, x in adapter.trainable.items() if not p.startswith("classifier/")}
            adapter = adapter._replace(trainable=kept)
        how: dict[str, Any] = {"base": self.name, "task_type": task, "params": self.base(adapter)}
        how["invocation"] = run.member.about.get("invocation", ())
        how["about"] = {key: x for key, x in run.member.about.items() if key in _KEPT}
        saved = peft.save(self.out, names, adapter, profile=options.profile, **how)
        other = "" if options.base_name else "; --base-name names another"
        return f"{saved}\nthe base in adapter_config.json is {self.name!r}{other}{note}"

    def gguf(self) -> str:
        from lora_jax.exchange import gguf

        if self.options.dtype == "bfloat16":
            raise LoraError("--dtype bfloat16 is not for GGUF adapters: float32 or float16")
        file, adapter = self.out / "adapter.gguf", self.adapter
        how: dict[str, Any] = {"base": _gguf_base(self.run), "dtype": self.options.dtype}
        gguf.save(file, self.names, adapter, params=self.base(adapter), **how)
        return f"wrote {file}: llama-server -m BASE.gguf --lora {file}"

    def mlx(self) -> str:
        from lora_jax.exchange import mlx

        out, adapter = self.out, self.adapter
        mlx.save(out, self.names, adapter, params=self.base(adapter))
        return f"wrote {out}: mlx_lm.generate --model BASE --adapter-path {out}"

    def orbax(self) -> str:
        run, plain, out = self.run, self.plain, self.out
        if plain is None:
            with whole_folder(out) as aside:
                shutil.copytree(run.member.folder, aside, dirs_exist_ok=True)
        else:
            changes = (BEGUN, ABOUT) if run.changed_by is not None else ()
            about = {key: x for key, x in run.member.about.items() if key not in changes}
            base = fingerprint(plain.params)
            save(out, plain.adapter, fingerprint=base, about=about, overwrite=True)
        return f"wrote {out}: lora_jax.restore({str(out)!r})"

    @property
    def name(self) -> str:
        """The name of the base model in the files."""
        return self.options.base_name or model_card.name_of(self.run)

    @property
    def names(self) -> HfNames:
        return models.hf_names(self.run.config, self.run.head)

    @functools.cached_property
    def adapter(self) -> Adapter:
        return over_stored_base(self.run) if self.plain is None else self.plain.adapter

    def base(self, adapter: Adapter) -> Any:
        """Return the shapes of the base, or its arrays if trained parameters need them."""
        run = self.run
        others = any(not path.startswith("classifier/") for path in adapter.trainable)
        if not others and all(t.inputs for t in adapter.layout.targets):
            return run.shapes
        loaded = run.source.load(run.config)
        return loaded if run.head is None else {**run.shapes, run.root.strip("/"): loaded}


# The notes of training about an adapter that `lora-jax import` needs.
_KEPT = ("model", "labels", "text_fields", "lengths", "prompt", "eos", "chat", "template")


def _gguf_base(run: Served) -> GgufBase | pathlib.Path:
    """Return the base's own GGUF file, or llama.cpp's name for the architecture of its folder."""
    source = run.source
    if not isinstance(source, Folder):
        return source.path
    kind = source.json["model_type"]
    return GgufBase(_ARCHITECTURES.get(kind, kind), getattr(run.config, "head_dim", None))


# model_type -> llama.cpp's architecture, if the two differ.
_ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3"}
_ARCHITECTURES |= {"qwen3_moe": "qwen3moe"}


main = command("export", ExportOptions, __doc__, export)
