"""The process of another rank than 0: it builds its shard, then carries out rank 0's orders until rank 0 ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from paged_core.engine import assembly
from paged_core.engine.team import RankArgs
from paged_core.execution.model_runner import ModelRunner
from paged_core.plugins import load_plugins
from paged_core.ranks.processes import LastWords
from paged_core.ranks.ranks import Ranks

_LOOK_S = 1.0


def main(fd: int) -> None:
    """Run the process. ``fd``: the file descriptor of the connection to rank 0, which has started this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches rank 0, which says when to end
    follow(Connection(fd))
    sys.stderr.flush()
    os._exit(0)  # without Python's cleanup, for which rank 0 would wait about a second


def follow(connection: Connection) -> None:
    """Carry out orders until rank 0 sends no more. If that fails, report the error to rank 0."""
    with suppress(EOFError, OSError):  # rank 0 has ended, or has closed the connection
        args: RankArgs = connection.recv()
        threading.Thread(target=_end_with, args=(args.leader,), daemon=True).start()
        ranks = Ranks(args.rank, args.asked.config.tensor_parallel_size, args.store, lambda: connection.send(None))
        try:
            _carry_out(args, ranks, connection)
        except EOFError:
            pass
        except Exception as error:
            connection.send(LastWords(type(error).__name__, str(error) or repr(error)))
        finally:
            ranks.leave()


def _carry_out(args: RankArgs, ranks: Ranks, connection: Connection) -> None:
    torch.set_num_threads(args.num_threads)
    built = assembly.build(load_plugins(), args.asked, lambda *_: None, ranks, ModelRunner)
    device = built.model.spec.device
    while True:
        connection.recv().carry_out(built.runner, device)


def _end_with(leader: int) -> None:
    """Make this process end when process ``leader`` does."""
    while os.getppid() == leader:
        time.sleep(_LOOK_S)
    os._exit(1)
