"""Evaluate models on held-out prompts; the same as `papertrl evaluate`. See `python scripts/evaluate.py --help`."""

import sys

from papertrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
