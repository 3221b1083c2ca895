"""`make golden`: write the golden runs of this machine anew, those named or all.

A golden changes only in a commit that says which numbers it changes and why.
"""

import os
import sys
from pathlib import Path

# As the tests compute: before torch starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

FOLDER = Path(__file__).parent


def main() -> None:
    sys.path.insert(0, str(FOLDER.parent.parent))
    from tests.golden.problems import GOLDENS, compute, dry_runs, environment_key

    names = sys.argv[1:] or list(GOLDENS)
    unknown = sorted(set(names) - set(GOLDENS))
    if unknown:
        sys.exit(f"error: no golden is called {', '.join(unknown)}; there are {', '.join(GOLDENS)}")
    key = environment_key()
    for number, name in enumerate(names, 1):
        text = compute(name)
        path = FOLDER / f"{name}.{key}.txt"
        before = path.read_text(encoding="utf-8") if path.exists() else None
        path.write_text(text, encoding="utf-8")
        print(f"{number}/{len(names)} {path.name}: {'as before' if text == before else 'written'}", flush=True)
    (FOLDER / "dry_runs.txt").write_text(dry_runs(), encoding="utf-8")


if __name__ == "__main__":
    main()
