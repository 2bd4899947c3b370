"""Another rank than 0, in a process of its own: builds its shard, then does what rank 0 says until that is gone."""

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
    """``fd``: of the connection to rank 0, which has started this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for rank 0, which says when to end
    follow(Connection(fd))
    sys.stderr.flush()
    os._exit(0)  # Python would take a second to put all away that was imported, and rank 0 waits


def follow(connection: Connection) -> None:
    """Do what rank 0 says, until it says nothing more; if that fails, tell it why."""
    with suppress(EOFError, OSError):  # rank 0 is gone, or wants us no more
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
    """Whatever this process is at, it ends when the one is gone for whom it is done."""
    while os.getppid() == leader:
        time.sleep(_LOOK_S)
    os._exit(1)
