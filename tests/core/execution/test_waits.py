"""Operations that have the host wait for its device, told before anything is captured."""

import pytest
import torch

from paged_core.execution.waits import NoWaits

X = torch.tensor([3.0, 0.0, 1.0])
MASK = X > 0.5
COUNTS = torch.tensor([1, 2, 0])

WAITING = {
    "item": lambda: X.sum().item(),
    "int": lambda: int(X.max()),
    "bool": lambda: bool(MASK.any()),
    "if": lambda: 1 if X[0] else 2,
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(MASK),
    "mask": lambda: X[MASK],
    "masked_select": lambda: X.masked_select(MASK),
    "put": lambda: X.clone().__setitem__(MASK, torch.tensor([1.0, 2.0])),
    "unique": lambda: X.unique(),
    "unique_consecutive": lambda: X.unique_consecutive(),
    "equal": lambda: torch.equal(X, X),
    "repeat_interleave": lambda: X.repeat_interleave(COUNTS),
    "other device": lambda: X.to("meta"),
}
NOT_WAITING = {
    "rows": lambda: X[COUNTS],
    "where": lambda: torch.where(MASK, X, -X),
    "fill": lambda: X.masked_fill(MASK, 0),
    "put rows": lambda: X.clone().__setitem__(COUNTS, 1.0),
    "fill by mask": lambda: X.clone().__setitem__(MASK, 1.0),
    "repeat_interleave": lambda: X.repeat_interleave(2),
    "repeat_interleave of known size": lambda: X.repeat_interleave(COUNTS, output_size=3),
    "other dtype": lambda: X.to(torch.float64),
    "other device": lambda: X.to("meta", non_blocking=True),
    "product": lambda: X @ X,
    "new": lambda: torch.arange(4).clamp(max=2),
}


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "plain"])
@pytest.mark.parametrize("name", WAITING)
def test_work_that_would_wait_is_told(name, inference):
    with torch.inference_mode(inference), NoWaits("cpu"), pytest.raises(RuntimeError, match="waits for its device, in"):
        WAITING[name]()


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "plain"])
@pytest.mark.parametrize("name", NOT_WAITING)
def test_work_that_would_not_is_done(name, inference):
    with torch.inference_mode(inference), NoWaits("cpu"):
        NOT_WAITING[name]()


@pytest.mark.parametrize("name", sorted(WAITING.keys() - {"other device"}))
def test_nobody_waits_for_a_tensor_of_the_host(name):
    with NoWaits("cuda"):
        WAITING[name]()


def test_compiled_work_is_neither_undone_nor_refused():
    calls = []

    def backend(graph, inputs):
        def run(*given):
            calls.append(len(given))
            return graph(*given)

        return run

    compiled = torch.compile(torch.nn.Linear(3, 3), backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            with NoWaits("cpu"):
                compiled(X)
            compiled(X)
    assert len(calls) == 4
