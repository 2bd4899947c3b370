"""What other libraries tell every process that imports them, and no user of ours wants to read."""

import logging


def quiet_imports() -> None:
    """Silence, before transformers is imported, what torchao (where it is installed) tells at length that it couldn't
    load on a CPU, and the line that the hub's client has for each retry. Their errors are still shown."""
    for name in ("torchao", "torch.utils._pytree", "huggingface_hub.utils._http"):
        logging.getLogger(name).setLevel(logging.ERROR)
