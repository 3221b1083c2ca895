"""What the published tiktoken rank files do not say: how text is cut into words, and which ids are special.

A rank file holds byte strings and their ids, nothing else.  The rest is in the code of the package it came with.
"""

from dataclasses import dataclass
from typing import Literal

TiktokenPattern = Literal["gpt2", "cl100k", "o200k", "qwen"]


@dataclass(frozen=True)
class Published:
    """A published rank file."""

    name: str
    pattern: TiktokenPattern
    special: dict[str, int]
    """Names and ids beside those of the file; `<|endoftext|>` or `<|end_of_text|>` is one of them."""
    nfc: bool = False
    """Whether its library brings text into Unicode's normal form C first."""


def _numbered(first: int, names: list[str]) -> dict[str, int]:
    return {name: first + i for i, name in enumerate(names)}


def _llama3() -> dict[str, int]:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    names += ["<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
    names += ["<|eot_id|>", "<|python_tag|>", "<|image|>"]
    return _numbered(128000, [*names, *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))])


def _llama4() -> dict[str, int]:
    def reserved(kind: str, first: int, end: int) -> list[str]:
        return [f"<|{kind}_reserved_special_token_{i}|>" for i in range(first, end)]

    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    names += ["<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"]
    names += [*reserved("text_post_train", 0, 6), "<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"]
    names += reserved("text_post_train", 8, 69)
    names += ["<|image_start|>", "<|image_end|>", *reserved("vision", 0, 2), "<|tile_x_separator|>"]
    names += ["<|tile_y_separator|>", *reserved("vision", 2, 6), "<|image|>", *reserved("vision", 6, 7), "<|patch|>"]
    names += reserved("vision", 7, 1048)
    names += [*reserved("reasoning", 0, 8), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"]
    return _numbered(200000, [*names, *(f"<|reserved_special_token_{i}|>" for i in range(2048 - len(names)))])


_CL100K = {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
_QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]

# By the sha256 of lines of `base64-of-token rank` in the order of ranks, which is that of the files as published.
PUBLISHED = {
    # tiktoken 0.14, tiktoken_ext/openai_public.py; the first is also GPT-2's, and whisper/assets/gpt2.tiktoken.
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": Published(
        "r50k_base", "gpt2", {"<|endoftext|>": 50256}
    ),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": Published(
        "p50k_base", "gpt2", {"<|endoftext|>": 50256}
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": Published(
        "cl100k_base", "cl100k", {**_CL100K, "<|endofprompt|>": 100276}
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": Published(
        "o200k_base", "o200k", {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}
    ),
    # llama-models 0.3.0, models/llama3/tokenizer.py and models/llama4/tokenizer.py; both files are tokenizer.model.
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": Published("Llama 3", "cl100k", _llama3()),
    "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed": Published("Llama 4", "o200k", _llama4()),
    # dashscope 2.0.2, dashscope/tokenizers/qwen_tokenizer.py.
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": Published(
        "Qwen", "qwen", _numbered(151643, _QWEN), nfc=True
    ),
    # openai-whisper 20250625, whisper/tokenizer.py; marks of languages and times, which text never is, are left out.
    "b34b360dbb493e781e479794586d661700670d65564001f23024971d1f2fa126": Published(
        "Whisper multilingual", "gpt2", {"<|endoftext|>": 50257}
    ),
}
