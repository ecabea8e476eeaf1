"""The page's server: the same as `python -m uso serve`, with its flags. What a Hugging Face Space starts."""

import sys

from uso.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
