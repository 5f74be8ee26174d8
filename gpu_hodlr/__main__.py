"""`python -m gpu_hodlr`: the command line."""

import sys

from gpu_hodlr.cli import main

if __name__ == "__main__":
    sys.exit(main())
