"""Adapters on one base, in use: predictions and texts for many threads at once."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax import models, paths
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.errors import LoraError, listed
from lora_jax.multi.stack import BASE
from lora_jax.serving.classifier import Classifier, adapter_of, predict
from lora_jax.serving.generation import Decoder
from lora_jax.serving.jsonl import JsonLine
from lora_jax.serving.prompts import FIELD, Prompts, Request
from lora_jax.serving.sampling import GREEDY, Sampling
from lora_jax.serving.served_adapters import BASE_NAME, Served
from lora_jax.serving.text_classifier import TextClassifier
from lora_jax.serving.texts import Texts, decoded

AdapterNames = str | Sequence[str] | None


class Answer(NamedTuple):
    """A generated text.

    Attributes:
      text: the text, without its prompt.
      tokens: its number of tokens.
      finish: "stop" if it ended by itself, "length" if there was no room for more.
    """

    text: str
    tokens: int
    finish: str


class Server:
    """A base with adapters that come and go; `lora_jax.serving.open` makes it.

    All methods may be called from several threads, whose requests share batches. There is no thread
    in the background: the requests are computed while somebody waits for one of them.

    Args:
      served: the base and its first adapters.
      slots: as for `open`; 0: as many as there are adapters.
      batch_size, max_tokens, allow_other_base: as for `open`.
      prompts: what turns prompts into requests. None: the templates and stop tokens that the
        adapters name.
    """

    def __init__(
        self,
        served: Served,
        *,
        slots: int = 0,
        batch_size: int = 8,
        max_tokens: int = 512,
        prompts: Prompts | None = None,
        allow_other_base: bool = False,
    ) -> None:
        self._served, self.slots = served, max(slots, len(served.members))
        self._allow_other_base = allow_other_base
        self._engine: Decoder | Classifier
        if not served.classifies:
            self._prompts = prompts or Prompts(served)
            own = (_params(served), *(served.stack(self.slots) if served.members else ()))
            self._engine = Decoder(served.config, *own, rows=batch_size, capacity=max_tokens)
            self._engine.slots = self.slots
        else:
            self._engine = _classifier(served, batch_size, self.slots)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters that can be asked for now."""
        with self._served.lock:
            return self._served.names

    @property
    def decoder(self) -> Decoder:
        """The engine of `generate` and `stream`."""
        if isinstance(self._engine, Decoder):
            return self._engine
        raise LoraError(f"{self._served.reference} is open as a classifier: use predict()")

    @property
    def classifier(self) -> Classifier:
        """The engine of `predict`."""
        if isinstance(self._engine, Classifier):
            return self._engine
        raise LoraError(f"{self._served.reference} writes texts: use generate() or stream()")

    def predict(self, texts: Sequence[Any], adapter: AdapterNames = None) -> list[dict[str, Any]]:
        """Classify texts or images.

        Args:
          texts: texts, pairs of texts, or paths of images; or mappings with the fields that the
            adapter was trained on.
          adapter: the name of the adapter, or one name for each text. None: the only one.

        Returns:
          For each text its fields, the "adapter", the "prediction", and for classes the
          "probabilities" of all.

        Raises:
          LoraError: an unknown name, with the nearest one; or a text that cannot be classified.
        """
        tasks, lines = self.classifier.tasks, list[JsonLine]()
        for number, (text, name) in enumerate(_each(texts, adapter), 1):
            with self._served.lock:
                line = JsonLine({"adapter": name}, f"text {number}")
                fields = tasks[adapter_of(line, self._served)].fields
            if not isinstance(text, Mapping):
                given = (text,) if isinstance(text, str) else tuple(text)
                if len(given) != len(fields):
                    raise LoraError(f"{line.where}: {len(given)} texts, expected {fields}")
                text = dict(zip(fields, given, strict=True))
            lines.append(JsonLine({**text, **line.value}, line.where))
        return list(predict(self._served, self.classifier, lines))

    def generate(
        self,
        prompts: Sequence[Any],
        adapter: AdapterNames = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
    ) -> list[Answer]:
        """Continue prompts, or answer conversations.

        Args:
          prompts: each is a text, a conversation (a list of messages, `{"role": ..., "content":
            ...}`), or a mapping with the fields of the prompt that the adapter was trained on.
          adapter: the name of the adapter, or one name for each prompt; "base" stands for the
            base alone. None: the only one, or the base.
          max_new_tokens: the largest number of tokens of a text.
          sampling: how tokens are chosen. The samples depend on its seed and on the place of the
            prompt among `prompts`, and not on other requests.

        Returns:
          An answer for each prompt.

        Raises:
          LoraError: an unknown name, with the nearest one; or a prompt that cannot be used.
        """
        found = [Answer("", 0, "") for _ in prompts]
        with self._asked(prompts, adapter, max_new_tokens, sampling) as texts:
            for piece in texts:
                text, tokens, _ = found[piece.row]
                tokens += piece.token is not None
                found[piece.row] = Answer(text + piece, tokens, piece.finish or "")
        return found

    def stream(
        self,
        prompt: Any,
        adapter: str | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
    ) -> Texts:
        """Continue one prompt, or answer one conversation, and yield the text in pieces.

        Args:
          prompt: a text, a conversation or a mapping, as for `generate`.
          adapter: as for `generate`.
          max_new_tokens: the largest number of tokens of the text.
          sampling: how tokens are chosen.

        Returns:
          An iterator of strings. Closing it, leaving its `with` block or dropping it cancels the
          text and frees its row.

        Raises:
          LoraError: as for `generate`.
        """
        return self._asked([prompt], adapter, max_new_tokens, sampling)

    def _asked(self, prompts: Sequence[Any], adapter: AdapterNames, *how: Any) -> Texts:
        self.decoder  # noqa: B018  the error of an encoder
        asked = list[JsonLine]()
        for number, (prompt, name) in enumerate(_each(prompts, adapter), 1):
            if not isinstance(prompt, Mapping):
                prompt = {FIELD if isinstance(prompt, str) else "messages": prompt}
            asked.append(JsonLine({**prompt, "adapter": name}, f"prompt {number}"))
        with self._served.lock:  # until the prompts wait, their adapters stay where they are
            return self.texts(self._prompts.all(asked, "prompt"), *how)

    def texts(
        self, requests: Sequence[Request], max_new_tokens: int = 128, sampling: Sampling = GREEDY
    ) -> Texts:
        """Write the texts of requests, whose `Prompts` are this server's."""
        first = next((member for member in self._served.members if member.trainable), None)
        if first is not None and any(request.name == BASE_NAME for request in requests):
            raise LoraError(
                f"{BASE_NAME!r} is asked for, and {first.name!r} was trained together with "
                "parameters of the base itself: run the base alone, with --base and no --adapter"
            )
        jobs = self.decoder.submit([r.prompt for r in requests], max_new_tokens, sampling)
        pieces = decoded(self.decoder.read(jobs), requests, self._prompts.tokenizer)
        return Texts(pieces, jobs)

    def add(self, name: str, adapter: str | pathlib.Path) -> None:
        """Open one more adapter, and put it into a free slot.

        Nothing is compiled, so it must fit into the slots: every target of it is one of an adapter
        that was opened at first, with a rank that is not larger, and its head has no more outputs.
        A name that is there already is replaced. Requests that came before go on with the adapter
        that they were for.

        Args:
          name: the name to ask for it by.
          adapter: a run directory, or a folder that `lora_jax.save` wrote.

        Raises:
          LoraError: there is no free slot, or the adapter does not fit, or is for another base.
        """
        if name == BASE_NAME:
            raise LoraError(
                f"an adapter cannot be called {BASE_NAME!r}: that stands for no adapter"
            )
        member = self._served.read(name, str(adapter), self._allow_other_base)
        if isinstance(self._engine, Decoder):
            _check_alone([*self._served.members, member])
        self._engine.between_turns(lambda: self._put(member))

    def remove(self, name: str) -> None:
        """Forget an adapter. Its slot is free when the requests that came before are answered.

        Args:
          name: the name of the adapter.

        Raises:
          LoraError: there is no such adapter; the error names the nearest one.
        """
        with self._served.lock:
            if (i := self._served.id_of(name, "remove")) == BASE:
                raise LoraError(f"{BASE_NAME!r} stands for no adapter, and cannot be removed")
            del self._served.slots[i]

    def warm_up(self) -> float:
        """Compile all programs, so that no request has to wait for one.

        Returns:
          The seconds that it took.
        """
        began = time.monotonic()
        self._engine.between_turns(self._warm_up)
        return time.monotonic() - began

    def _put(self, member: SavedAdapter) -> None:
        """Put an adapter into a slot that no request uses, between two turns."""
        served, engine = self._served, self._engine
        while True:
            with served.lock:
                free = {*range(self.slots)} - {*served.slots}
                if not free:
                    raise LoraError(
                        f"no slot is free for {member.name!r}: there are {self.slots}, for\n"
                        f"{listed(served.names, 10)}\nremove one of them first, or open the server "
                        "with more slots"
                    )
                if idle := free - engine.busy():
                    self._put_into(min(idle), member)
                    return
            engine.turn()

    def _put_into(self, i: int, member: SavedAdapter) -> None:
        try:
            self._engine.add(i, member)
        except LoraError as error:
            raise LoraError(
                f"adapter {member.name!r} does not fit into this server: {error}\nOpen one anew, "
                "with this adapter among its first"
            ) from error
        if isinstance(self._engine, Decoder):
            self._prompts.add(member)
        slots = self._served.slots
        for n in [n for n, other in slots.items() if other.name == member.name]:
            del slots[n]
        slots[i] = member

    def _warm_up(self) -> None:
        while self._engine.busy():
            self._engine.turn()
        with self._served.lock:
            for i, member in [*self._served.slots.items()][:1]:
                self._engine.add(i, member)  # the same again: what swaps it is compiled
        self._engine.warm_up()


def _each(things: Sequence[Any], adapter: AdapterNames) -> list[tuple[Any, str | None]]:
    """Return each text or prompt with the name of its adapter."""
    if isinstance(things, str | Mapping):
        raise LoraError(f"expected a list, got {str(things)[:80]!r} alone; put it into a list")
    names = [adapter] * len(things) if adapter is None or isinstance(adapter, str) else [*adapter]
    if len(names) != len(things):
        raise LoraError(f"{len(things)} were given, and the names of {len(names)} adapters")
    return list(zip(things, names, strict=True))


def _params(served: Served) -> Any:
    """Return the base of a decoder, with the parameters of it that its only adapter trained."""
    params: Any = served.params
    _check_alone(served.members)
    leaves = paths.flatten(params)
    own = [(path, x) for member in served.members for path, x in member.trainable.items()]
    return paths.replace(params, {path: x.astype(leaves[path].dtype) for path, x in own})


def _check_alone(members: Sequence[SavedAdapter]) -> None:
    """Raise if one of several adapters for a decoder was trained with parameters of the base."""
    for member in members:
        if member.trainable and len(members) > 1:
            raise LoraError(
                f"adapter {member.name!r} ({member.folder}) was trained together with parameters "
                "of the base itself, which cannot be mixed in a batch:\n"
                f"{listed(member.trainable)}\nopen it alone"
            )


def _classifier(served: Served, batch_size: int, slots: int) -> Classifier:
    if isinstance(served.config, models.VitConfig):
        from lora_jax.serving.image_classifier import ImageClassifier  # needs an extra

        return ImageClassifier(served, batch_size, slots)
    return TextClassifier(served, batch_size, slots)
