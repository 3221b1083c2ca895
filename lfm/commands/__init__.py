"""What the words of `lfm` and the scripts of launch/ do."""

import os

# Before torch is loaded: threads of OpenMP that wait for each other give the core away after microseconds and not
# milliseconds.  On an idle machine nothing is slower; where other work has a core, training was seen to take 20 times
# as long without.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
