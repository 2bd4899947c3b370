"""``python -m paged_openai --model MODEL`` is ``paged serve MODEL``."""

import sys

from paged_openai.commands import main

sys.exit(main())
