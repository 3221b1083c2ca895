"""Run `lfm/commands/serve.py` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from lfm.commands.serve import main

if __name__ == "__main__":
    main()
