"""`python -m crossan_fast` is `crossan-fast`."""

import sys

from crossan_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
