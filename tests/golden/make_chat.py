"""Write golden_chat/expected.json and tokenizer.json: conversations as transformers renders them.

    pip install transformers jinja2
    python tests/golden/make_chat.py

The templates in golden_chat/ are written for these tests, in the formats of well-known models. The
present files were written with transformers 5.24.0.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent / "golden_chat"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>"]
SPECIAL += ["<|assistant|>", "<|end|>", "[INST]", "[/INST]"]
WORDS = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama 3 cuts

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & here, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}


def said(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Return messages of the user and the assistant in turn."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return [*messages, *({"role": roles[i % 2], "content": t} for i, t in enumerate(texts))]


CONVERSATIONS = {
    "one": said("Hi!", "Hello, how are you?"),
    "two": said("Define 'mar'.", "Make imperfect.", "Use it.", "It marred his face."),
    "system": said("What is 2 + 2?", "4", system="You are terse."),
    "spaces": said("  a  ", "  b\n\n", "\nc", " d "),
    "letters": said("¿Qué?", "Ünïcödé, 日本語 and 🙂"),
    "empty": said("", "nothing was said"),
    "asked": said("What now?"),
    "html": said("<b>bold</b> & 'quoted' \"twice\"", "{{ not code }} {% nor this %}"),
    "code": said("print", "```python\nprint('a')\n```"),
    "long": said(*(f"turn {i}" for i in range(8))),
    "tools": [
        {"role": "user", "content": "The weather in Zürich?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "It is 12 °C."},
    ],
    "none": [
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": "Ho", "tool_calls": None},
    ],
}


def tokenizer() -> Tokenizer:
    """Train a small tokenizer on the conversations."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    texts = [m.get("content", "") for c in CONVERSATIONS.values() for m in c]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    made.train_from_iterator(texts * 2, trainer)
    return made


def main() -> None:
    """Render every conversation by every template."""
    made = tokenizer()
    made.save(str(HERE / "tokenizer.json"), pretty=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    expected: dict[str, dict[str, object]] = {}
    for path in sorted(HERE.glob("*.jinja")):
        fast.chat_template = path.read_text()
        rows = expected[path.stem] = {}
        for name, messages in CONVERSATIONS.items():
            tools = [TOOL] if name == "tools" else None
            try:
                texts = [
                    fast.apply_chat_template(
                        messages, tools=tools, tokenize=False, add_generation_prompt=wanted
                    )
                    for wanted in (False, True)
                ]
            except Exception as error:  # noqa: BLE001  raised by the template
                rows[name] = {"error": str(error)}
                continue
            row = rows[name] = {"text": texts[0], "prompt": texts[1]}
            if path.stem.endswith("marked"):
                found = fast.apply_chat_template(
                    messages, return_dict=True, return_assistant_tokens_mask=True
                )
                row |= {"ids": found["input_ids"], "mask": found["assistant_masks"]}
    data = {"conversations": CONVERSATIONS, "tool": TOOL, "expected": expected}
    (HERE / "expected.json").write_text(json.dumps(data, ensure_ascii=False, indent=0) + "\n")


if __name__ == "__main__":
    main()
