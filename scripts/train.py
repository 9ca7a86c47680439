"""Train with one or several methods; the same as `papertrl train`. See `python scripts/train.py --help`."""

import sys

from papertrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
