"""Templates with the fields of an example in braces, such as `Define {word}:`."""

from __future__ import annotations

import dataclasses
import string

from lora_jax.errors import DataError
from lora_jax.models.text.example import Example, text_of


@dataclasses.dataclass(frozen=True)
class Template:
    """A text in which `{field}` stands for a field of an example, and `{{` for a brace.

    >>> Template("Define {word}:", "prompt").fill({"word": "tree"}, "wordnet")
    'Define tree:'
    """

    text: str
    """The template."""
    option: str
    """The option of the config that holds it, for error messages."""

    def __post_init__(self) -> None:
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise DataError(
                f"data.{self.option} {self.text!r}: {error}. To write a brace, double it."
            ) from error
        for _, field, form, conversion in parts:
            if field is not None and (not field.isidentifier() or form or conversion):
                raise DataError(
                    f"data.{self.option} {self.text!r}: {{{field}}} is not the name of a field. "
                    "To write a brace, double it."
                )

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the template, each once.

        >>> Template("{word} of {word}: {{", "prompt").fields
        ('word',)
        """
        named = (field for _, field, _, _ in string.Formatter().parse(self.text))
        return tuple(dict.fromkeys(field for field in named if field is not None))

    def fill(self, example: Example, where: str) -> str:
        """Return the text for an example; `DataError` if a field is missing, or neither text nor
        number."""
        values = {name: text_of(example, name, self.option, where) for name in self.fields}
        return self.text.format_map(values)
