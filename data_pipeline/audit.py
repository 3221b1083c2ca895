"""Whether two runs were fed the same tokens in the same optimizer steps: `python -m data_pipeline.audit RUN_A RUN_B`.

Layouts, threads, micro-batches, interruptions and resumes make no difference; rows, their order, the number of them in
a step and the documents in them do.  Exit code 0: all steps that both runs made are the same; 1: they differ, and the
first step that does is named; 2: a record is missing or was changed.
"""

import argparse
import sys

from lfm.config import path_flag
from lfm.data.consumed import Consumed, read_record
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import shown


def first_difference(a: list[Consumed], b: list[Consumed]) -> int | None:
    """The first step of both records whose rows differ; None if there is none.  Raises UserError if they share none."""
    by_step = {entry.step: entry for entry in b}
    common = [(entry, by_step[entry.step]) for entry in a if entry.step in by_step]
    if not common:
        raise UserError(
            f"the runs share no step: one has {a[0].step} to {a[-1].step}, the other {b[0].step} to {b[-1].step}; "
            "give two runs that made the same steps"
        )
    different = [one.step for one, other in common if one.digest != other.digest]
    if different:
        return different[0]
    one, other = common[0]
    if one.chain != other.chain:
        raise UserError(f"the runs differ before step {one.step}, where the first record begins; give whole records")
    return None


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs=2, type=path_flag, metavar="RUN", help="a run folder, with its consumed.txt")
    folders = parser.parse_args().runs
    a, b = (read_record(folder) for folder in folders)
    step = first_difference(a, b)
    if step is not None:
        digests = [next(entry.digest for entry in record if entry.step == step) for record in (a, b)]
        print(f"different: step {step} is the first; its digests are {digests[0]:016x} and {digests[1]:016x}")
        sys.exit(1)
    last = min(a[-1].step, b[-1].step)
    chain = next(entry.chain for entry in a if entry.step == last)
    print(f"same: steps {max(a[0].step, b[0].step)} to {last}, chain {chain}")
    for folder, record in zip(folders, (a, b), strict=True):
        if record[-1].step > last:
            print(f"{shown(folder)} goes on to step {record[-1].step}")


if __name__ == "__main__":
    main()
