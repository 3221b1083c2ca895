"""`lfm WORD ...`, or `python -m lfm WORD ...`: every command by one word.  Help imports none of them."""

import importlib
import sys
from dataclasses import dataclass

from lfm.errors import UserError
from lfm.exits import command


@dataclass(frozen=True)
class Word:
    module: str
    """Whose `main` it runs."""
    help: str
    before: tuple[str, ...] = ()
    """Arguments that stand before the user's."""


WORDS = {
    "train": Word("lfm.commands.pretrain", "train a model, or go on with a run"),
    "plan": Word("lfm.commands.pretrain", "what a run would take: parameters, FLOPs, memory", ("--dry-run",)),
    "prepare": Word("data_pipeline.prepare", "make a data set of text, code or conversations"),
    "init": Word("lfm.commands.init", "write a commented config of a run, to be changed"),
    "generate": Word("lfm.commands.generate", "continue prompts"),
    "chat": Word("lfm.commands.chat", "talk to a model"),
    "serve": Word("lfm.commands.serve", "a page and OpenAI's API for trained models"),
    "eval": Word("lfm.commands.evaluate", "score texts, tasks or held-out rows with checkpoints, and compare them"),
    "export": Word("lfm.commands.export", "a checkpoint for others: Hugging Face transformers, safetensors, ONNX"),
    "import": Word("lfm.commands.import_weights", "a run folder of what lfm export wrote"),
    "plot": Word("lfm.commands.plot", "curves of runs: loss, throughput, expert load, reservoirs"),
    "certify": Word("lfm.commands.certify", "compare parallel layouts with one process"),
    "ablate": Word("lfm.commands.ablate", "compare arms on equal terms: rates and seeds for each, one table"),
    "medical": Word("lfm.commands.medical", "heads that know when an answer is likely to be wrong; no medical device"),
    "plasticity": Word("lfm.commands.plasticity", "does a model with plastic synapses learn new words from a text?"),
    "doctor": Word("lfm.commands.doctor", "what this machine and environment have"),
    "completion": Word("lfm.commands.completion", "words of the command line for bash, zsh or fish"),
}


def usage() -> str:
    lines = [f"  {word:<12}{entry.help}" for word, entry in WORDS.items()]
    return "\n".join(
        [
            "usage: lfm WORD [arguments]      lfm WORD --help says what WORD takes",
            "",
            *lines,
            "",
            "From a text to a model: lfm prepare book.txt, lfm train --data data/book, lfm chat --checkpoint RUN",
            "Keys of a config are set as key=value or --key value: lfm train --config lfm_debug --optimizer.lr 1e-3",
        ]
    )


@command
def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    word = arguments[0]
    if word in ("--version", "version"):
        from lfm import __version__

        print(f"lfm {__version__}")
        return
    if word not in WORDS:
        import difflib

        near = difflib.get_close_matches(word, WORDS, n=1)
        raise UserError(
            f"lfm has no command {word!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(WORDS)}")
        )
    entry = WORDS[word]
    sys.argv = [f"lfm {word}", *entry.before, *arguments[1:]]
    importlib.import_module(entry.module).main()
