"""`python -m uso`."""

import sys

from uso.cli import main

if __name__ == "__main__":
    sys.exit(main())
