"""Entry point of `python -m keras_tnt`, which is the command keras-tnt."""

import sys

from keras_tnt.cli import main

if __name__ == "__main__":
    sys.exit(main())
