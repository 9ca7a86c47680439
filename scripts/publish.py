"""Publish a finished run on the Hub; the same as `papertrl publish`. See `python scripts/publish.py --help`."""

import sys

from papertrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
