"""Export: `lfm export --checkpoint runs/NAME --format hf --out DIR`: a checkpoint in a format that others read."""

import argparse
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lfm.config import path_flag
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import (
    behind_links,
    exists,
    is_free,
    partial_folder,
    ready_folder,
    refusing,
    remove_tree,
    replace_folder,
    shown,
)

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}


@command
def main() -> None:
    from lfm.export.formats import FORMATS

    parser = argparse.ArgumentParser(description="Write a checkpoint in a format that others read, and compare it.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path_flag,
        metavar="RUN_OR_STEP",
        help="run or step_* folder; hf://USER/NAME",
    )
    formats = "; ".join(f"{name}: {of.help}" for name, of in FORMATS.items())
    parser.add_argument("--format", choices=FORMATS, default="hf", help=f"{formats} (default hf)")
    parser.add_argument("--out", required=True, type=path_flag, metavar="PATH", help="new folder or file")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of trained weights (default float32)")
    parser.add_argument(
        "--licence", "--license", metavar="ID", help="of the weights, for the model card (default: none)"
    )
    parser.add_argument("--no-compare", action="store_true", help="do not load what was written and compare it")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="with --format hf: upload the folder as well")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: a new repository is private")
    flags = parser.parse_args()
    import torch

    from lfm.export import hub
    from lfm.export.formats import Settings
    from lfm.export.source import Source

    if flags.push_to_hub is not None:
        hub.check_repository(flags.push_to_hub)
        if flags.format != "hf":
            raise UserError(f"--push-to-hub is for --format hf, and this is --format {flags.format}")
    if flags.private and flags.push_to_hub is None:
        raise UserError("--private is of --push-to-hub, which is not given; give it, or leave this out")
    if flags.licence is not None and not (flags.licence.strip() and flags.licence.isprintable()):
        raise UserError(f"--licence {shown(flags.licence)} is no name of a licence; give one line, such as apache-2.0")
    chosen = FORMATS[flags.format]
    check_free(flags.out, is_folder=chosen.is_folder)
    source = Source(hub.located(flags.checkpoint))
    if behind_links(source.path) in behind_links(flags.out).parents:
        raise UserError(f"--out {shown(flags.out)} is in the checkpoint itself, and would go with it; give another")
    settings = Settings(getattr(torch, DTYPES[flags.dtype]), flags.licence)
    with written_whole(flags.out, is_folder=chosen.is_folder) as partial:
        chosen.write(source, partial, settings)
        lines = [] if flags.no_compare else chosen.compare(source, partial, settings)
    size = sum(path.stat().st_size for path in ([flags.out] if flags.out.is_file() else flags.out.iterdir()))
    print(
        f"{shown(flags.out)}: step {source.manifest['step']:,} of {source.manifest['config']['name']}, {size:,} bytes"
    )
    for line in lines:
        print(line)
    if flags.push_to_hub is not None:
        try:
            print(hub.push(flags.out, flags.push_to_hub, private=flags.private))
        except UserError as error:
            again = f"hf upload {flags.push_to_hub} {shlex.quote(shown(flags.out))}"
            raise UserError(f"{error}; the folder is whole, and `{again}` uploads it") from None


def check_free(out: Path, *, is_folder: bool) -> None:
    """Raise UserError where something would be lost."""
    if is_folder and not is_free(out):
        raise UserError(f"{shown(out)} holds something else and is not written over; give a new or empty folder")
    if not is_folder and exists(out):
        raise UserError(f"{shown(out)} exists and is not written over; give another name, or remove it")


@contextmanager
def written_whole(out: Path, *, is_folder: bool) -> Iterator[Path]:
    """Where to write what will be `out`, beside it; however that ends, `out` is whole or nothing new is there."""
    made = [folder for folder in out.absolute().parents if not exists(folder)]
    ready_folder(out.parent)
    partial = partial_folder(out) if is_folder else out.with_name(f".{out.name}.{os.getpid()}.partial")
    with refusing("make room there, or give another --out", at=out):
        try:
            remove_tree(partial)
            if is_folder:
                partial.mkdir(parents=True)
            yield partial
            if is_folder:
                replace_folder(out, by=partial)
            else:
                os.replace(partial, out)
        except BaseException:
            remove_tree(partial)
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()
            raise
