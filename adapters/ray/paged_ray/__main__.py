"""``python -m paged_ray serve MODEL`` is ``paged ray serve MODEL``."""

import sys

from paged_ray.commands import main

sys.exit(main())
