"""Run `lfm/commands/medical.py` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from lfm.commands.medical import main

if __name__ == "__main__":
    main()
