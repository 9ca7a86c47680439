"""Test whether papers' claims hold; the same as `papertrl claims`. See `python scripts/claims.py --help`."""

import sys

from papertrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["claims", *sys.argv[1:]]))
