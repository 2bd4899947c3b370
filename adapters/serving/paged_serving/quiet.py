"""Silences messages that other libraries print on import."""

import logging
import os


def quiet_imports() -> None:
    """Silence, before transformers is imported, what torchao (where it is installed) tells at length that it couldn't
    load on a CPU, and the line that the hub's client has for each retry. Their errors are still shown."""
    for name in ("torchao", "torch.utils._pytree", "huggingface_hub.utils._http"):
        logging.getLogger(name).setLevel(logging.ERROR)


def no_progress_bars() -> None:
    """Disable other libraries' progress bars in a process whose log is lines of JSON. Before tqdm and
    huggingface_hub, whose switch transformers reads, are imported: they look at this then."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
