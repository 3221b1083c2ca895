"""Init: `lfm init my_run.yaml [--family KIND]`: a commented config of a run, to be changed and trained."""

import argparse
import re
import shlex

from lfm.commands.own_data import DEFAULT_FAMILY, PRESETS, check_family
from lfm.config import path_flag
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import exists, ready_folder, shown, write_durably
from lfm.training.run import RunConfig


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="Write a commented config of a run, to be changed and trained.")
    parser.add_argument("file", type=path_flag, metavar="FILE", help="the YAML file to write; must not exist")
    parser.add_argument(
        "--family", metavar="KIND", default=DEFAULT_FAMILY, help=f"{', '.join(PRESETS)} (default {DEFAULT_FAMILY})"
    )
    flags = parser.parse_args()
    check_family(flags.family)
    if exists(flags.file):
        raise UserError(f"{shown(flags.file)} exists and is not overwritten; give another name, or remove it")
    if flags.file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{shown(flags.file)} should end in .yaml, as configs do; give such a name")
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", flags.file.stem).lstrip("._-") or "run"
    text = commented(name, PRESETS[flags.family][0])
    ready_folder(flags.file.parent)
    write_durably(flags.file, text.encode())
    print(f"{shown(flags.file)} is written; next: lfm train --config {shlex.quote(str(flags.file))}")


def commented(name: str, preset: str) -> str:
    """A config that is `preset` by another name, each key that it sets with what it means."""
    head = [
        f"# A run like {preset}, to be changed.  `lfm plan --config FILE` says what it would take,",
        "# `lfm train --config FILE` trains it.  Keys that are not here have their defaults: `lfm train --help`.",
        "#",
        "# For a data set of your own (`lfm prepare book.txt`), data.path is its folder, and model.vocab_size and",
        "# model.seq_length are those that `lfm prepare` said.",
    ]
    return "\n".join([*head, *RunConfig.commented_yaml(preset, [f"name={name}"])]) + "\n"
