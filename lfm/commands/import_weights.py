"""Import: `lfm import DIR --out runs/NAME`: a run folder of what `lfm export` wrote, to generate, evaluate, go on."""

import argparse
import re

from lfm.commands.export import check_free, written_whole
from lfm.config import path_flag
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import expanded, read_file, shown


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="Make a run folder of weights that `lfm export` wrote.")
    parser.add_argument("place", metavar="PATH", help="what `lfm export` wrote, a folder or file, or hf://USER/NAME")
    parser.add_argument("--out", required=True, type=path_flag, metavar="RUN", help="run folder to make")
    parser.add_argument("--tokenizer", type=path_flag, metavar="FILE", help="a tokenizer.json, in place of its own")
    flags = parser.parse_args()
    check_free(flags.out, is_folder=True)
    name, run = flags.out.name, shown(flags.out)
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is None:
        raise UserError(f"--out {run}: a run's name is of letters, digits, dots and dashes; give such a one")
    from lfm.export.formats import read
    from lfm.export.hub import downloaded, parsed
    from lfm.export.incoming import write_run

    address = parsed(flags.place)
    incoming = read(downloaded(*address) if address is not None else expanded(flags.place))
    tokenizer = read_file(flags.tokenizer) if flags.tokenizer is not None else None
    with written_whole(flags.out, is_folder=True) as partial:
        written = write_run(incoming, partial, name=name, tokenizer=tokenizer)
    print(f"{run}/checkpoints/{written.name} has the {len(incoming.files)} tensors of {shown(flags.place)}")
    print(f"next: lfm generate --checkpoint {run}, or train on with checkpoint.init_from={run}")
