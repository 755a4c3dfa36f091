"""Continue prompts with a decoder and adapters that train.py has trained, many in one batch.

    lora-jax generate --adapter runs/definitions --prompt "tree:"
    lora-jax generate --adapter runs/a --adapter b=runs/b2 --file in.jsonl --out out.jsonl
    lora-jax generate --base REFERENCE --prompt "Once upon a time" --temperature 0.8
    lora-jax generate --adapter runs/chats --chat

Every adapter continues each --prompt, and each plain line of a file or of stdin; without adapters,
the base does. A line of JSONL names its adapter:

    {"prompt": "tree:", "adapter": "definitions"}
    {"word": "tree", "adapter": "definitions"}

The second line has the fields of the prompt that the adapter was trained on. The adapter "base" is
the base without an adapter. If there is only one adapter, a line need not name it. With --out the
answers are JSONL: the fields of the line, and

    prompt, adapter    the prompt, and the adapter that continued it
    text, tokens       the generated text, and its number of tokens
    finish             "stop" at a stop token, "length" at --max-new-tokens

A line that cannot be used ends the command. With --skip-broken it is written again with the reason
as its "error". A text ends at the model's own end token, and at the token that ended the training
examples of the adapter.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from itertools import chain, islice
from typing import Annotated

import tyro
from rich.text import Text

from lora_jax import models
from lora_jax.cli.adapter_options import AdapterOptions, FileBar, opening, skipped
from lora_jax.cli.text_sinks import BlockSink, JsonlSink, Sink, TypedSink, transcribe
from lora_jax.errors import LoraError, listed
from lora_jax.serving import jsonl, prompts
from lora_jax.serving.generation import Decoder
from lora_jax.serving.prompts import Prompts, Request
from lora_jax.serving.sampling import Sampling
from lora_jax.serving.served_adapters import BASE_NAME, Served
from lora_jax.serving.server import Server
from lora_jax.system.console import Console, command, printable, say


@dataclasses.dataclass(frozen=True)
class GenerateOptions(AdapterOptions):
    """The options of `lora-jax generate`."""

    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = ()
    """A text to continue."""
    out: str | None = None
    """The JSONL file for the answers; - is stdout. None: print the texts to stdout."""
    base_too: bool = False
    """Continue plain prompts with the base as well, as a comparison."""
    max_new_tokens: int = 128
    """The largest number of tokens to generate for a prompt."""
    temperature: float = 0.0
    """0: always the most likely token. 1: sample from the model's probabilities. In between: sample
    with sharper probabilities."""
    top_k: int | None = None
    """Sample only from this many most likely tokens."""
    top_p: float | None = None
    """Sample only from the most likely tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling. A prompt's result depends on its position, not on other prompts."""
    stop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = ()
    """A text of one token that ends the generated text, in addition to the usual end tokens."""
    batch_size: int = 8
    """Prompts that are continued at the same time."""
    chat: bool = False
    """Keep a conversation: each line of stdin is a message, which is answered at once."""
    template: bool = True
    """Put a prompt into the chat template, as a user's message: for adapters that were trained on
    conversations, and for the base alone if it has a template."""


def run(options: GenerateOptions, console: Console, aside: Console) -> None:
    """Read prompts, generate texts and write them to `console`; print messages to `aside`."""
    counts = ("batch_size", "max_new_tokens")
    source = None if options.chat else options.source(("prompt",), counts)
    if not options.adapter and options.base is None:
        raise LoraError(
            "no model: give --adapter PATH, a run directory of train.py, or --base REFERENCE, such "
            f"as\n  --base {models.SMOLLM2}"
        )
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    if options.chat:
        _converse(options, sampling, console, aside)
        return
    # The prompts are read before the model, so that their errors come at once.
    skip = options.skip_broken
    given = list(prompts.read(source, keep_broken=skip) if source else options.prompt)
    served = options.served("generate", aside)
    asked = Prompts(served, options.stop, options.base_too, options.template)
    requests = asked.all(given, f"{source}, line" if source else "--prompt", keep_broken=skip)
    faults = [request.error for request in requests if request.error]
    if requests and len(faults) == len(requests):
        raise LoraError(f"no prompt can be used:\n{listed(faults)}")
    say(aside, _opening(served, asked))
    good = [number for number, request in enumerate(requests) if not request.error]
    asking = [requests[number] for number in good]
    server = _server(served, asked, asking, options)
    texts = server.texts(asking, options.max_new_tokens, sampling)
    with aside.status("reading the prompts; the first time this compiles ..."):
        first = list(islice(texts, 1))
    with _sink(options, source, requests, console, aside) as sink:
        transcribe(chain(first, texts), good, requests, sink)
    if faults:
        say(aside, skipped(faults, len(requests), options.out))
    say(aside, _closing(server.decoder, len(good)))


def _converse(
    options: GenerateOptions, sampling: Sampling, console: Console, aside: Console
) -> None:
    """Answer each line of stdin, with the whole conversation before it, until stdin ends."""
    for name in ("prompt", "file", "out"):
        if getattr(options, name):
            raise LoraError(f"--chat and --{name} exclude each other: drop one")
    served = options.served("generate", aside)
    asked = Prompts(served, options.stop, chat=options.template)
    name = served.names[0] if served.names else BASE_NAME
    if len(served.names) > 1 or name not in asked.chats:
        raise LoraError(
            "--chat keeps a conversation with one adapter that was trained on conversations, or "
            f"with a base that has a chat template; got {', '.join(served.names) or 'the base'}"
        )
    say(aside, f"{_opening(served, asked)}\nWrite a message; /new begins another conversation.")
    server = Server(served, batch_size=1, max_tokens=2_048, prompts=asked)
    messages: list[dict[str, str]] = []
    for line in filter(None, map(str.strip, sys.stdin)):
        messages, answer = [*messages, {"role": "user", "content": line}], ""
        if line == "/new":
            messages = []
            continue
        try:
            most = options.max_new_tokens
            with server.stream(messages, max_new_tokens=most, sampling=sampling) as pieces:
                for piece in pieces:
                    answer += piece
                    console.print(Text(printable(piece)), end="", soft_wrap=True)
        except LoraError as error:  # the message is forgotten, and the conversation goes on
            say(aside, str(error))
            messages = messages[:-1]
            continue
        console.print()
        messages.append({"role": "assistant", "content": answer})


def _server(
    served: Served, asked: Prompts, requests: Sequence[Request], options: GenerateOptions
) -> Server:
    """Return a server with as many rows as there are prompts, up to --batch-size, and as long."""
    longest = max((len(request.prompt.tokens) for request in requests), default=1)
    return Server(
        served,
        batch_size=min(options.batch_size, 1 << max(0, len(requests) - 1).bit_length()),
        max_tokens=-(-(longest + options.max_new_tokens) // 64) * 64,
        prompts=asked,
    )


def _sink(
    options: GenerateOptions,
    source: str | None,
    requests: Sequence[Request],
    console: Console,
    aside: Console,
) -> Sink:
    if options.out is not None:
        writer = jsonl.Writer(options.out, reading=source)
        return JsonlSink(writer, FileBar(aside, source, "texts"), requests)
    if len(requests) == 1 and console.is_terminal:
        return TypedSink(console, requests[0])
    return BlockSink(console, requests)


def _opening(served: Served, asked: Prompts) -> str:
    if not served.names:
        how = ", prompts in its chat template (--no-template: as they are)" if asked.chats else ""
        return f"{served.reference} alone, no adapter{how}"
    said = {name: f"{name}: trained on conversations" for name in asked.chats}
    for name, template in asked.templates.items():
        said[name] = f"{name}: trained on prompts like {template.text!r}"
    each = [said.get(name, name) for name in served.names]
    return opening(served, each)


def _closing(decoder: Decoder, count: int) -> str:
    speed, programs = decoder.speed, len(decoder.compiled)
    said = [f"{count:,} prompt{'s' * (count != 1)}"]
    if speed["read"]:
        rate = speed["read"] / max(speed["reading"], 1e-9)
        said.append(f"{speed['read']:,} tokens read at {rate:,.0f}/s")
    if speed["written"]:
        rate = speed["written"] / max(speed["writing"], 1e-9)
        said.append(f"{speed['written']:,} written at {rate:,.1f}/s")
    if programs:
        seconds = sum(decoder.compiled.values())
        said.append(f"{seconds:.1f} s to compile {programs} program{'s' * (programs != 1)}")
    return ", ".join(said)


main = command("generate", GenerateOptions, __doc__, run, adding=True)
