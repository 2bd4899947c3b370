"""How graphs are captured, told by a stand-in for torch.cuda: what comes of failures, and who may capture when."""

import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch

from paged_core.execution import graphs
from paged_core.execution.graphs import CudaRecorder

DEVICE = torch.device("cuda", 1)


class Cuda:
    """What of torch.cuda a recorder calls."""

    def __init__(self):
        self.streams, self.captures, self.at_once, self.most_at_once = 0, [], 0, 0
        self.fails = {}  # "capture", "synchronize" -> what it raises

    def Stream(self, device):
        self.streams += 1
        return Stream(f"side of {device}")

    def synchronize(self):
        if "synchronize" in self.fails:
            raise self.fails["synchronize"]

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.captures.append((pool, stream.name, capture_error_mode))
        threading.Event().wait(0.01)  # others have their chance
        yield
        self.at_once -= 1
        if "capture" in self.fails:
            raise self.fails["capture"]


class Stream:
    def __init__(self, name):
        self.name, self.waited_for = name, []

    def wait_stream(self, other):
        self.waited_for.append(other.name)


class Graph:
    def replay(self):
        return "replayed"


@pytest.fixture
def cuda(monkeypatch):
    fake, main, pools = Cuda(), Stream("main"), iter(range(100))
    for name, what in {
        "CUDAGraph": Graph,
        "Stream": fake.Stream,
        "current_stream": lambda: main,
        "device": lambda device: nullcontext(),
        "graph": fake.graph,
        "graph_pool_handle": lambda: next(pools),
        "stream": lambda stream: nullcontext(),
        "synchronize": fake.synchronize,
    }.items():
        monkeypatch.setattr(torch.cuda, name, what)
    fake.main = main
    graphs._capture_stream.cache_clear()
    yield fake
    graphs._capture_stream.cache_clear()


def test_work_is_done_once_then_captured_on_a_stream_that_waits_and_is_waited_for(cuda):
    done = []
    replay = CudaRecorder(DEVICE)(lambda: done.append(len(cuda.captures)))
    assert done == [0, 1]
    assert replay() == "replayed"
    assert cuda.captures == [(0, "side of cuda:1", "thread_local")]
    assert cuda.main.waited_for == ["side of cuda:1"]


def test_recorders_have_pools_of_their_own_and_one_stream_together(cuda):
    for _ in range(40):  # each time a cache has grown
        CudaRecorder(DEVICE)(lambda: None)
    assert cuda.streams == 1
    assert len({pool for pool, *_ in cuda.captures}) == 40


def test_no_two_threads_capture_at_once(cuda):
    threads = [threading.Thread(target=CudaRecorder(DEVICE), args=(lambda: None,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cuda.captures) == 6
    assert cuda.most_at_once == 1


@pytest.mark.parametrize(
    ("told", "kind"),
    [("CUDA error: out of memory", torch.OutOfMemoryError), ("CUDA error: operation not permitted", RuntimeError)],
)
def test_a_capture_that_fails_on_a_device_that_goes_on_says_whether_it_was_for_lack_of_memory(cuda, told, kind):
    recorder = CudaRecorder(DEVICE)
    cuda.fails["capture"] = torch.AcceleratorError(told)
    with pytest.raises(kind, match=told) as raised:
        recorder(lambda: None)
    assert type(raised.value) is kind
    assert cuda.main.waited_for
    del cuda.fails["capture"]
    assert recorder(lambda: None)() == "replayed"


def test_a_device_that_has_failed_is_told_as_such(cuda):
    cuda.fails = dict.fromkeys(("capture", "synchronize"), torch.AcceleratorError("CUDA error: an illegal access"))
    with pytest.raises(torch.AcceleratorError):
        CudaRecorder(DEVICE)(lambda: None)
