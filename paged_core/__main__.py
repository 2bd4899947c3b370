"""``python -m paged_core`` is ``paged``."""

import sys

from paged_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
