"""Models from strangers: configurations, weights, GGUF files and tokenizers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pathlib
from random import Random
from typing import Any

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from lora_jax import data, models
from lora_jax.errors import WeightsError
from lora_jax.exchange import tensor_file
from lora_jax.exchange.gguf_adapter_file import GgufAdapterFile
from lora_jax.models.text import tokens
from lora_jax.models.weights import preprocessing
from lora_jax.models.weights.folder import Folder
from lora_jax.system import safetensors_reader
from tests.fuzz import mutate, tensors
from tests.fuzz.gguf_bytes import STRING, Field, Gguf, Tensor, change
from tests.fuzz.kind import GOLDEN, Files, stored

FOLDERS = GOLDEN / "golden_models"
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
LARGEST = 10**6  # numbers in all tensors of a case that is loaded


# ---- config.json -----------------------------------------------------------------------------

# fmt: off
IMAGES = {
    "size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "resample": 2, "rescale_factor": 0.00392156862745098, "do_resize": True, "do_rescale": True,
    "do_normalize": True, "image_processor_type": "ViTImageProcessor",
}
# fmt: on


@functools.cache
def configs() -> tuple[bytes, ...]:
    plain = [stored(folder)[CONFIG] for folder in sorted(FOLDERS.iterdir())]
    llama = json.loads(stored(FOLDERS / "llama")[CONFIG])
    base = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    ropes: list[dict[str, Any]] = [
        {"rope_type": "linear"},
        {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "beta_fast": 32},
    ]
    return (*plain, *(json.dumps(llama | {"rope_parameters": base | r}).encode() for r in ropes))


def make_config(random: Random) -> Files:
    if random.random() < 0.1:
        files = {CONFIG: stored(FOLDERS / "vit")[CONFIG]}
        return {**files, preprocessing.FILE: mutate.json_text(random, json.dumps(IMAGES))}
    return {CONFIG: mutate.json_text(random, random.choice(configs()))}


def read_config(random: Random, folder: pathlib.Path) -> None:
    """Read a config.json, and name the modules of the model that it describes."""
    config = Folder(folder).config
    assert isinstance(hash(config), int)
    assert dataclasses.replace(config) == config
    if isinstance(config, models.VitConfig):
        if (folder / preprocessing.FILE).exists():
            preprocessing.read(folder, config)
    else:
        assert models.hf_names(config)


# ---- safetensors and folders -----------------------------------------------------------------


def make_safetensors(random: Random) -> Files:
    name = random.choice(("llama", "gpt2", "bert", "llama_int8", "llama_nf4"))
    weights = next(x for n, x in stored(FOLDERS / name).items() if n.endswith(".safetensors"))
    header, body = tensors.split(weights)
    tree = mutate.read(header)
    end = max(pair[1][2][1][1] for pair in tree[:6] if pair[0] != "__metadata__")
    # The body mostly has more bytes than the header describes.
    few = mutate.dump(mutate.Pairs(tree[:6])).encode()
    return {WEIGHTS: tensors.changed(random, tensors.joined(few, body[:end]))}


def read_safetensors(random: Random, folder: pathlib.Path) -> None:
    """Read a safetensors file by the reader of adapters or by that of models."""
    path = folder / WEIGHTS
    if random.random() < 0.5:
        found = tensor_file.read(path).tensors
        assert all(np.isfinite(x).all() for x in found.values())
        assert sum(x.nbytes for x in found.values()) <= path.stat().st_size
        return
    for tensor in safetensors_reader.read(path, WeightsError).tensors.values():
        assert tensor.whole().shape == tensor.shape


def make_folder(random: Random) -> Files:
    name = random.choice(("llama", "llama", "bert", "gpt2", "qwen3_moe", "llama_nf4", "llama_int8"))
    files = {n: x for n, x in stored(FOLDERS / name).items() if not n.endswith(".npz")}
    index = "model.safetensors.index.json"
    weights = random.choice([n for n in files if n.endswith(".safetensors")])
    match random.randrange(6):
        case 0:
            files[CONFIG] = mutate.json_text(random, files[CONFIG], 1)
        case 1 if index in files:
            files[index] = mutate.json_text(random, files[index])
        case 1 | 2:
            files[weights] = tensors.renamed(random, files[weights])
        case 3:
            files[weights] = mutate.bytes_of(random, files[weights])
        case 4:
            del files[random.choice(sorted(files))]
        case _:
            files[weights] = tensors.changed(random, files[weights])
    return files


def read_folder(random: Random, folder: pathlib.Path) -> None:
    """Read the tensors of a folder as `read_model` does."""
    read_model(random, models.open(str(folder)))


def read_model(random: Random, source: models.Source) -> None:
    """Check every tensor's shape; in one case of four, load a model that is small."""
    held = source.stored()
    total = 0
    for name, shape in held.shapes.items():
        assert isinstance(name, str) and all(n >= 0 for n in shape)
        total += int(np.prod(shape, dtype=float))
    if total < LARGEST and random.random() < 0.25:
        config: Any = source.config
        loaded = source.load(config, keep_quantised=random.random() < 0.5)
        assert all(x.size < LARGEST for x in jax.tree.leaves(loaded))


# ---- GGUF ------------------------------------------------------------------------------------

_UINT, _INTS, _FLOAT, _BOOL = 4, 5, 6, 7
_TOKENS = ["<s>", "</s>", *"abcdefgh", "ab", "cd", "abcd", "Ġ", "Ġa", "gh"]
_FIELDS: dict[int, dict[str, Any]] = {
    STRING: {
        "general.architecture": "llama",
        "llama.rope.scaling.type": "linear",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": _TOKENS,
        "tokenizer.ggml.merges": ["a b", "c d", "ab cd", "Ġ a", "g h"],
        "tokenizer.chat_template": "{{ messages }}",
    },
    _UINT: {
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "general.alignment": 32,
    },
    _FLOAT: {
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4,
        "llama.rope.scaling.factor": 2.0,
    },
    _INTS: {"tokenizer.ggml.token_type": [3, 3, *[1] * (len(_TOKENS) - 2)]},
    _BOOL: {"tokenizer.ggml.add_bos_token": True},
}
_MATRICES = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}
_MATRICES |= {"ffn_gate": 32, "ffn_up": 32, "ffn_down": 32}
_BLOCKS = ((0, 128), (8, 34), (2, 18))  # type, and bytes of 32 numbers: float32, Q8_0, Q4_0


def _of(kind: int, name: str, *shape: int) -> Tensor:
    number, size = _BLOCKS[kind]
    return Tensor(name, shape, number, bytes(int(np.prod(shape)) * size // 32))


@functools.cache
def ggufs() -> tuple[Gguf, Gguf]:
    """Return a model of one layer, some of it quantised, and an adapter for it."""
    fields = [Field(name, kind, x) for kind, many in _FIELDS.items() for name, x in many.items()]
    rows = [_of(1, "token_embd.weight", len(_TOKENS), 32)]
    rows += [_of(0, f"{n}norm.weight", 32) for n in ("output_", "blk.0.attn_", "blk.0.ffn_")]
    for number, (name, out) in enumerate(_MATRICES.items()):
        rows.append(_of(number % 3, f"blk.0.{name}.weight", out, 32))
    texts = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    adapter = [Field(name, STRING, text) for name, text in texts.items()]
    adapter.append(Field("adapter.lora.alpha", _FLOAT, 4.0))
    factors = []
    for name in ("attn_q", "attn_v"):
        factors.append(_of(0, f"blk.0.{name}.weight.lora_a", 2, 32))
        factors.append(_of(0, f"blk.0.{name}.weight.lora_b", _MATRICES[name], 2))
    return Gguf(fields, rows), Gguf(adapter, factors)


def _changed(random: Random, file: Gguf) -> bytes:
    file = copy.deepcopy(file)
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        if file.fields and file.tensors:
            change(random, file)
    made = file.dump()
    return mutate.bytes_of(random, made) if random.random() < 0.15 else made


def make_gguf(random: Random) -> Files:
    return {"model.gguf": _changed(random, ggufs()[0])}


def read_gguf(random: Random, folder: pathlib.Path) -> None:
    """Read the configuration, and then the tokenizer or every tensor."""
    source = models.open(str(folder / "model.gguf"))
    if random.random() < 0.5:
        assert source.chat_template is None or isinstance(source.chat_template, str)
        use_tokenizer(source.tokenizer(), source.config.vocab_size)
        return
    read_model(random, source)


def make_gguf_adapter(random: Random) -> Files:
    return {"adapter.gguf": _changed(random, ggufs()[1])}


def read_gguf_adapter(random: Random, folder: pathlib.Path) -> None:
    found = GgufAdapterFile.read(folder / "adapter.gguf")
    for a, b in found.factors.values():
        assert np.isfinite(a).all() and np.isfinite(b).all()


# ---- tokenizers ------------------------------------------------------------------------------


@functools.cache
def tokenizer_files() -> tuple[bytes, ...]:
    """Return a tokenizer.json of each kind of model, with the parts that real ones have."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh", "##a", "##b", "ab", "Ġ", "Ġa"]
    vocabulary = {name: i for i, name in enumerate(names)}
    bpe = tokenizers.models.BPE(vocabulary, [("a", "b"), ("Ġ", "a")], unk_token="[UNK]")
    piece = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    word = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    unigram = tokenizers.models.Unigram([(n, -float(i)) for i, n in enumerate(names)], 1, False)
    cut = pre_tokenizers.Split(tokenizers.Regex(r"\w+|\s+|[^\s\w]+"), behavior="isolated")
    growing = normalizers.Sequence([normalizers.Replace("a", "aa"), normalizers.Lowercase()])
    bert = (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())
    parts: list[tuple[Any, Any, Any, Any]] = [
        (bpe, normalizers.NFC(), pre_tokenizers.ByteLevel(), decoders.ByteLevel()),
        (piece, *bert),
        (word, normalizers.Replace("x", "y"), pre_tokenizers.Sequence([cut]), None),
        (unigram, growing, pre_tokenizers.Metaspace(), decoders.Metaspace()),
    ]
    found = []
    for model, normalizer, pre, decoder in parts:
        one = tokenizers.Tokenizer(model)
        one.normalizer, one.pre_tokenizer = normalizer, pre
        one.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        if decoder is not None:
            one.decoder = decoder
        one.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
        one.enable_padding(pad_id=0, length=8)
        one.enable_truncation(8)
        found.append(one.to_str().encode())
    return tuple(found)


def make_tokenizer(random: Random) -> Files:
    """Draw a tokenizer.json, or in one case of ten a changed chat template."""
    good = random.choice(tokenizer_files())
    lines = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(TEXTS)]
    rows = "\n".join(lines).encode()
    if random.random() < 0.1:
        template = {"chat_template": [{"name": "default", "template": "{{ x }}"}], "a": 1}
        changed = mutate.json_text(random, json.dumps(template))
        return {TOKENIZER: good, "tokenizer_config.json": changed, "a.jsonl": rows}
    return {TOKENIZER: mutate.json_text(random, good), "a.jsonl": rows}


TEXTS = ("ab cd", "a" * 40, "x-\u00e9 \U0001f600 b", "[CLS] a [SEP]", " \n")


def read_tokenizer(random: Random, folder: pathlib.Path) -> None:
    """Read a tokenizer, and encode texts as training does."""
    source = Folder(folder)
    assert source.chat_template is None or isinstance(source.chat_template, str)
    use_tokenizer(source.tokenizer(), 20)
    config = data.DataConfig(str(folder / "a.jsonl"), buckets=(4,), max_length=8)
    if random.random() < 0.3:
        tokenizer = source.tokenizer()
        for batch in data.classification(config, tokenizer, "train", 2, vocabulary=20):
            assert batch["input_ids"].max() < 20 or not batch["mask"].any()


def use_tokenizer(tokenizer: Any, vocabulary: int) -> None:
    """Encode a few texts, and check that the tokens are rows of the embedding."""
    encoder = tokens.Encoder(tokenizer, 8, vocabulary)
    tokens.padding_id(tokenizer)
    assert all(i < vocabulary for i in encoder.start)
    truncation = tokens.TextTruncation()
    for encoding in encoder.truncate(list(TEXTS), truncation):
        assert len(encoding.ids) <= 8 and max(encoding.ids, default=0) < vocabulary
    for ids in encoder.plain(list(TEXTS)):
        tokenizer.decode(ids)
