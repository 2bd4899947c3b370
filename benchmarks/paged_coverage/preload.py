"""What the server of processes imports before it forks the first: slow imports that every check needs."""

from paged_serving import quiet_imports

quiet_imports()

import transformers.generation.utils  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import paged_coverage.isolated  # noqa: E402, F401
