"""`python -m halo_fast` is the command `halo`."""

import sys

from halo_fast.pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
