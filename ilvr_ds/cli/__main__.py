"""`python -m ilvr_ds.cli`, as launchers call it that know no other command."""

import sys

from ilvr_ds.cli import run

if __name__ == "__main__":  # loader processes import this file too
    sys.argv[0] = "ilvr-ds"  # a run's record names its command
    run()
