"""Command lines with hostile keys, values, flags and paths: a function of a seed, and nothing outside a folder."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_pipeline.labelled import LabelledConfig
from data_pipeline.prepare_config import PrepareConfig
from lfm.config import Config
from lfm.inference.sampling import SamplingConfig
from lfm.training.run import RunConfig
from tests.training.tiny_run import ROOT, TINY

SCALARS = [
    *["", "~", "null", "true", "false", "yes", "off", "on", "0", "1", "-1", "2", "010", "1:30", "1_000", "1.5", "-0.0"],
    *["1e30", "1e-30", "1e309", ".inf", "-.inf", ".nan", "65537", "2147483648", "9223372036854775807", "1e3", "0x10"],
    *["18446744073709551616", "-9223372036854775809", "9" * 5000, "0o7", "2024-01-01", "12:34:56", "x", "auto", "none"],
    *["!!timestamp x", "!!binary x", "!!python/name:os.system x", "!!set {a}", "!!int x", "!!bool maybe", "!x y", "!"],
    *["[]", "[1]", "[x, y]", "[[1]]", "{}", "{a: 1}", "{kind: x}", "{1: 2}", "{a: 1, a: 2}", "{? [1] : 2}", "- 1"],
    *[
        "&a [1]",
        "*a",
        "{x: &a 1, y: *a}",
        "[" * 2000,
        "{" * 50,
        "'",
        '"',
        "a: b: c",
        "%",
        "@",
        "`",
        "|",
        ">",
        "#",
        "\t",
    ],
    *[
        "x" * 5000,
        "\u6f22\u5b57\u00df",
        "\u202e",
        "\ufeff",
        "\x1b[31m",
        "a\nb",
        "a\x07b",
        "\ud800",
        "\udcff",
        "-",
        "--",
        "=",
        ".",
    ],
]
FLAGS = [
    "--help",
    "--nonsense",
    "--config",
    "--dry-run=1",
    "--folder",
    "--full",
    "--html",
    "--",
    "-h",
    "-x",
    "--seed=-1",
]


@dataclass(frozen=True)
class World:
    """What cases may use: a trained run, its data, texts; and `arena`, the working directory, which they may damage."""

    run: Path
    data: Path
    texts: Path
    arena: Path

    def build_arena(self) -> None:
        self.arena.mkdir(exist_ok=True)
        (self.arena / "folder").mkdir(exist_ok=True)
        (self.arena / "file").write_text("text")
        (self.arena / "binary").write_bytes(bytes(range(256)))
        (self.arena / "bad.yaml").write_text("a: [")
        for name, make in (("fifo", os.mkfifo), ("loop", lambda path: path.symlink_to(path))):
            if not os.path.lexists(self.arena / name):
                make(self.arena / name)


PATHS = [
    "folder",
    "file",
    "binary",
    "fifo",
    "loop",
    "absent",
    "file/below",
    "absent/below",
    "bad.yaml",
    "x" * 300,
    "a\u00e9",
]


def keys(config: type[Config]) -> list[str]:
    return [line.strip().split(": ")[0] for line in config.describe().splitlines() if line[:3].strip()]


def value(chance: random.Random) -> str:
    return chance.choice(PATHS) if chance.random() < 0.2 else chance.choice(SCALARS)


def overrides(chance: random.Random, legal: list[str]) -> list[str]:
    """One to three `key=value`, most of them of keys that exist."""
    found = []
    for _ in range(chance.randint(1, 3)):
        key = chance.choice(legal)
        if chance.random() < 0.1:
            key = chance.choice(
                [key + "x", key + ".x", key.split(".")[0], "." + key, key + ".", "", "base", "\u00e9", "x" * 3000]
            )
        found.append(key + "=" + value(chance) if chance.random() < 0.95 else key)
    return found


def extra_flags(chance: random.Random) -> list[str]:
    return [chance.choice(FLAGS)] if chance.random() < 0.1 else []


def config_file(chance: random.Random, good: Path) -> str:
    return str(good) if chance.random() < 0.93 else chance.choice(PATHS)


def pretrain(chance: random.Random, world: World) -> list[str]:
    # `output` last: nothing is made outside the arena.  Only counted, not trained.
    changes = overrides(chance, keys(RunConfig))
    argv = [
        "--config",
        config_file(chance, ROOT / "configs/lfm_debug.yaml"),
        *TINY,
        f"data.path={world.data}",
        *changes,
    ]
    return [*argv, "output=runs", chance.choice(["--dry-run", "--folder"]), *extra_flags(chance)]


def prepare(chance: random.Random, world: World) -> list[str]:
    good = world.texts.parent / "prepare.yaml"
    tree = {"output": "x", "sources": [{"kind": "text", "paths": [str(world.texts)]}], "seq_length": 16}
    good.write_text(yaml.safe_dump(tree | {"tokenizer": {"train_vocab_size": 260}, "validation_fraction": 0.5}))
    legal = [key for key in keys(PrepareConfig) if not key.startswith(("sources", "output"))]
    argv = ["--config", config_file(chance, good), *overrides(chance, legal), "num_workers=0"]
    return [*argv, f"output={chance.choice(['made', *PATHS])}", *extra_flags(chance)]


def labelled(chance: random.Random, world: World) -> list[str]:
    good = world.texts.parent / "labelled.yaml"
    good.write_text(yaml.safe_dump({"output": "x", "source": {"kind": "icd10", "file": str(world.texts / "0.txt")}}))
    changes = [change for change in overrides(chance, keys(LabelledConfig)) if "url" not in change]
    return ["--config", config_file(chance, good), *changes, f"output={chance.choice(['made', *PATHS])}"]


def _talk(chance: random.Random, world: World) -> list[str]:
    checkpoint = str(world.run) if chance.random() < 0.8 else chance.choice(PATHS)
    argv = ["--checkpoint", checkpoint, "--device", chance.choice(["cpu", "cpu", "cpu", "cpu", "cuda", "tpu"])]
    for name in chance.sample(list(SamplingConfig.model_fields), 2):
        argv += ["--" + name.replace("_", "-")] if name == "greedy" else [f"--{name.replace('_', '-')}={value(chance)}"]
    # Last, unless it is what is tried and no number: a reply of a billion tokens would take for ever.
    return [*argv, *([] if chance.random() < 0.1 else ["--max-new-tokens=1"])]


def generate(chance: random.Random, world: World) -> list[str]:
    prompts = f"--prompt={value(chance)}" if chance.random() < 0.8 else f"--prompts={chance.choice(PATHS)}"
    return [*_talk(chance, world), prompts, *(["--json"] if chance.random() < 0.2 else []), *extra_flags(chance)]


def chat(chance: random.Random, world: World) -> list[str]:
    state = [f"--state={chance.choice(PATHS)}"] if chance.random() < 0.5 else []
    return [*_talk(chance, world), *state, *extra_flags(chance)]


def verify(chance: random.Random, world: World) -> list[str]:
    return [
        chance.choice([str(world.data), *PATHS]),
        *(["--full"] if chance.random() < 0.5 else []),
        *extra_flags(chance),
    ]


def inspect(chance: random.Random, world: World) -> list[str]:
    page = [f"--html={chance.choice(PATHS)}"] if chance.random() < 0.5 else []
    return [chance.choice([str(world.data), *PATHS]), *page, *extra_flags(chance)]


def audit(chance: random.Random, world: World) -> list[str]:
    run = str(world.run)
    return [
        *chance.choice([[run, run], [run, chance.choice(PATHS)], [chance.choice(PATHS), run], [run]]),
        *extra_flags(chance),
    ]


COMMANDS: dict[str, tuple[str, Callable[[random.Random, World], list[str]]]] = {
    "pretrain": ("launch.pretrain", pretrain),
    "prepare": ("data_pipeline.prepare", prepare),
    "generate": ("launch.generate", generate),
    "chat": ("launch.chat", chat),
    "verify": ("data_pipeline.verify", verify),
    "inspect": ("data_pipeline.inspect", inspect),
    "audit": ("data_pipeline.audit", audit),
    "labelled": ("data_pipeline.labelled", labelled),
}


def case(seed: int, world: World) -> tuple[str, list[str]]:
    """Module and arguments of case `seed`."""
    chance = random.Random(seed)
    module, make = COMMANDS[chance.choice(list(COMMANDS))]
    return module, make(chance, world)
