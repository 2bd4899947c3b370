"""Scenarios of what a process may do while a patched model generates. Each runs in a forked process of its own.

``python generate_scenarios.py NAME...`` prints ``{name: [exit status, output, errors]}`` as JSON.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from paged_hf import paged_generate

LIMIT_S = 150
IDS = torch.tensor([[1, 50, 7, 33]])
FREE: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}
LOCKSTEP = FREE | {"repetition_penalty": 1.3}
MODEL: Any = None


def make_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, 0, 0.05 if "embed" in name else 1.7 * weight.shape[-1] ** -0.5)
    model.generate = paged_generate(model, check=False)
    return model


def generate(**options: Any) -> list[int]:
    tokens = MODEL.generate(IDS, attention_mask=torch.ones_like(IDS), **options)[0].tolist()
    assert MODEL.generate.last_report().tier == "native", MODEL.generate.last_report()
    return tokens


def expected(**options: Any) -> list[int]:
    return MODEL.generate.stock(IDS, attention_mask=torch.ones_like(IDS), **options)[0].tolist()


class Doing(BaseStreamer):
    """A streamer, or a processor, that does something when it is called for the fifth time."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act
        self.num_calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.put(input_ids)
        return scores

    def put(self, value: Any) -> None:
        self.num_calls += 1
        if self.num_calls == 5:
            self.act()

    def end(self) -> None:
        pass


class Others:
    """Threads that generate again and again until they are told to stop, and check their results."""

    def __init__(self, daemon: bool = False) -> None:
        self.stop = threading.Event()
        self.num_right = 0
        self.wrong: list[Any] = []
        self.threads = [
            threading.Thread(target=self._run, args=(options, expected(**options)), daemon=daemon)
            for options in (FREE, LOCKSTEP, FREE | {"num_beams": 2}, FREE | {"streamer": Doing(int)})
        ]
        for thread in self.threads:
            thread.start()
        while self.num_right < 4:
            time.sleep(0.01)

    def _run(self, options: dict[str, Any], answer: list[int]) -> None:
        while not self.stop.is_set():
            got = generate(**options)
            self.num_right += got == answer
            if got != answer:
                self.wrong.append(got)

    def end(self) -> None:
        before = self.num_right
        while self.num_right < before + 2 and not self.wrong:
            time.sleep(0.01)
        self.stop.set()
        for thread in self.threads:
            thread.join()
        assert not self.wrong
        assert threading.enumerate() == [threading.main_thread()]
        assert MODEL.generate.tiers.host.engine.memory.num_blocks_used == 0


# ---- scenarios ---------------------------------------------------------------------------------------------------


def interrupt_a_free_call() -> None:
    _interrupt(FREE)


def interrupt_a_lockstep_call() -> None:
    _interrupt(LOCKSTEP)


def _interrupt(options: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    others = Others()
    for _ in range(2):
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            generate(**options | {"max_new_tokens": 2000})
        except KeyboardInterrupt:
            timer.join()
        else:
            raise AssertionError("it was not interrupted")
    others.end()
    assert generate(**options) == expected(**options)


def fork_before_between_and_during_calls() -> None:
    _fork_and_generate()
    generate(**FREE)
    _fork_and_generate()
    others = Others()
    _fork_and_generate()
    others.end()


def _fork_and_generate() -> None:
    """The child generates and exits as usual: through ``main`` below, with its exit handlers."""
    answers = expected(**FREE), expected(**LOCKSTEP)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        return
    signal.alarm(LIMIT_S // 2)
    MODEL.generate.release()
    assert (generate(**FREE), generate(**LOCKSTEP)) == answers
    assert threading.enumerate() == [threading.current_thread()]
    raise SystemExit(0)


def multiprocessing_by_fork() -> None:
    answers = [expected(**FREE)] * 2
    others = Others()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map_async(_pool_task, range(2)).get(LIMIT_S) == answers
    others.end()


def _pool_task(number: int) -> list[int]:
    return generate(**FREE)


def fork_in_a_callers_own_processor() -> None:
    _fork_inside(lambda act: LOCKSTEP | {"logits_processor": LogitsProcessorList([Doing(act)])})


def fork_in_a_callers_own_streamer() -> None:
    _fork_inside(lambda act: FREE | {"streamer": Doing(act)})


def _fork_inside(options: Callable[[Callable[[], Any]], dict[str, Any]]) -> None:
    """The child has no engine for the call that it is inside of. The call raises an error there, and new calls work."""
    children: list[int] = []
    answer = expected(**options(int))
    try:
        got = generate(**options(lambda: children.append(os.fork())))
    except Exception as error:
        assert children == [0], error
        assert "fork" in str(error), error
        assert generate(**FREE) == expected(**FREE)
        raise SystemExit(0) from None
    assert children[0] != 0, "the child's call went on without an engine"
    assert got == answer
    _, status = os.waitpid(children[0], 0)
    assert status == 0, status


def exit_while_daemon_threads_call() -> None:
    Others(daemon=True)


def exit_handlers_may_call_and_wait_for_callers() -> None:
    answer = expected(**FREE)
    others = Others(daemon=True)

    def at_exit() -> None:
        tokens = MODEL.generate(IDS, attention_mask=torch.ones_like(IDS), **FREE)[0].tolist()
        assert tokens == answer
        others.stop.set()
        for thread in others.threads:
            thread.join()

    atexit.register(at_exit)


# ---- running them ------------------------------------------------------------------------------------------------


def _in_a_child(name: str) -> list[Any]:
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            faulthandler.register(signal.SIGALRM, chain=True)  # a scenario that hangs prints where it is, and is killed
            signal.alarm(LIMIT_S)
            # torch replaces a pool of its own at the first call after a fork. Two threads whose first operations meet
            # there fail ("Invalid thread pool!"), with or without us: here nobody else runs yet.
            torch.set_num_threads(1)
            globals()[name]()
            print("well", flush=True)
            raise SystemExit(0)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        errors.seek(0)
        return [status, output.read(), errors.read()]


def main(names: list[str]) -> None:
    global MODEL
    torch.set_num_threads(1)
    make_model().generate(IDS, attention_mask=torch.ones_like(IDS), **FREE)  # compiles kernels once for all
    MODEL = make_model()
    # A child that exits looks through all objects, which copies their pages. That would take most of a scenario's time.
    gc.freeze()
    print(json.dumps({name: _in_a_child(name) for name in names}))


if __name__ == "__main__":
    main(sys.argv[1:])
