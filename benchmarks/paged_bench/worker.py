"""One system in a process of its own, so that its memory is its own. SystemProcess is the parent's handle, _serve is
the child.

The child loads the model, reports its facts, then runs the commands that it gets. It answers each command with ("done",
result) or ("failed", message), and sends ("told", tokens) or ("progress", ...) meanwhile.
"""

from __future__ import annotations

import gc
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol

from paged_bench.memory import PeakMemory, resident_bytes
from paged_bench.results import Run
from paged_bench.workloads import BenchRequest
from paged_core import ConfigError, EngineConfig
from paged_serving import quiet_imports

if TYPE_CHECKING:
    from paged_bench.quality import Quality

Told = Callable[[int], None]
Report = Callable[[str, int, int], None]


class SystemFailed(Exception):
    """A system's run failed; the message says how. The other systems continue."""


class System(Protocol):
    def run(self, requests: Sequence[BenchRequest], told: Told) -> Run: ...


@dataclass(frozen=True)
class SystemSpec:
    """What a child needs to become one of the systems."""

    system: str  # paged, paged-unshared, paged-generate, hf-sequential, hf-static:SIZE, hf-continuous
    source: str
    dtype: str | None
    config: EngineConfig
    sequential_limit_s: float


@dataclass(frozen=True)
class ModelFacts:
    """What the child found in the model."""

    name: str
    dtype: str
    max_model_len: int
    num_parameters: int
    num_threads: int


class SystemProcess:
    """A running child.

    Raises (each method):
        SystemFailed: the child said so, or died.
    """

    def __init__(self, job: SystemSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()
        self._facts: ModelFacts | None = None

    def facts(self) -> ModelFacts:
        if self._facts is None:
            self._facts = self._wait(_ignore, _ignore)
        return self._facts

    def run(self, requests: Sequence[BenchRequest], told: Told, report: Report) -> Run:
        """One run over ``requests``."""
        self.facts()
        result: Run = self._ask(("run", tuple(requests)), told, report)
        return result

    def margins(self, questions: list[tuple[tuple[int, ...], int, int]]) -> list[tuple[float, float]]:
        """(margin, gap) of the stock model's logits: see agreement.Margins."""
        self.facts()
        result: list[tuple[float, float]] = self._ask(("margins", questions), _ignore, _ignore)
        return result

    def quality(self) -> Quality | None:
        """The quality cost of the weights in the job's config; None if it can't be measured."""
        self.facts()
        result: Quality | None = self._ask(("quality", None), _ignore, _ignore)
        return result

    def close(self) -> None:
        self._connection.close()  # the child's next read ends it
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, command: tuple[str, Any], told: Told, report: Report) -> Any:
        try:
            self._connection.send(command)
        except OSError:
            raise SystemFailed(self._epitaph()) from None
        return self._wait(told, report)

    def _wait(self, told: Callable[..., None], report: Callable[..., None]) -> Any:
        while True:
            try:
                kind, payload = self._connection.recv()
            except (EOFError, OSError):
                raise SystemFailed(self._epitaph()) from None
            if kind == "told":
                told(payload)
            elif kind == "progress":
                report(*payload)
            elif kind == "failed":
                raise SystemFailed(payload)
            else:
                return payload

    def _epitaph(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        return f"its process died (exit code {code}{', out of memory perhaps' if code == -9 else ''})"


def _ignore(*args: Any) -> None:
    """Ignores progress."""


# ---- the child ---------------------------------------------------------------------------------------------------


def _serve(connection: Connection, job: SystemSpec) -> None:
    warnings.simplefilter("ignore")  # warnings of stock code would break up the progress bars
    quiet_imports()
    try:
        model, facts = _load(job)
        system = _build(job, model, lambda *news: connection.send(("progress", news)))
    except Exception as error:
        connection.send(("failed", _in_a_line(error)))
        return
    resting, warm = resident_bytes(), False
    connection.send(("done", facts))
    while True:
        try:
            command, payload = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            if command == "margins":
                answer: Any = [_margin(model, *question) for question in payload]
            elif command == "quality":
                answer = _quality(model, job)
            else:
                if not warm:
                    system.run([replace(payload[0], num_output=2, n=1, arrival_s=0.0)], _ignore)
                    warm = True
                answer = _measured(system, payload, resting, lambda num: connection.send(("told", num)))
        except KeyboardInterrupt:
            return
        except Exception as error:
            connection.send(("failed", _in_a_line(error)))
            continue
        connection.send(("done", answer))


def _load(job: SystemSpec) -> tuple[Any, ModelFacts]:
    import torch
    from transformers.utils import logging

    from paged_hf.loading import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    paged = load.load_model(job.source, "cpu", job.dtype)
    if paged is None:
        raise ConfigError(f"{job.source!r} is no folder, hub id, GGUF file or embedded model")
    model = paged.model
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64))  # touches the weights: they count as the model's memory
    facts = ModelFacts(
        name=job.source,
        dtype=str(paged.spec.dtype).removeprefix("torch."),
        max_model_len=paged.spec.max_model_len,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_threads=torch.get_num_threads(),
    )
    return model, facts


def _build(job: SystemSpec, model: Any, report: Report) -> System:
    from paged_bench import stock
    from paged_bench.callers import PagedCallers
    from paged_bench.paged import Paged

    name, _, size = job.system.partition(":")
    if name == "hf-static":
        return stock.HFStatic(model, int(size))
    if name == "hf-sequential":
        return stock.HFSequential(model, job.sequential_limit_s)
    if name == "hf-continuous":
        return stock.HFContinuous(model)
    if name == "paged-generate":
        return PagedCallers(model, job.config.kv_cache_bytes)
    return Paged(model, replace(job.config, enable_prefix_caching=name == "paged"), report)


def _measured(system: System, requests: Sequence[BenchRequest], resting: int | None, told: Told) -> Run:
    gc.collect()
    with PeakMemory() as peak:
        run = system.run(requests, told)
    if peak.num_bytes is None or resting is None:
        return run
    return replace(run, peak_bytes=max(0, peak.num_bytes - resting))


def _quality(model: Any, job: SystemSpec) -> Quality | None:
    from paged_bench.quality import measure

    return measure(model, job.source, job.config)


def _margin(model: Any, prefix: Sequence[int], reference_id: int, token_id: int) -> tuple[float, float]:
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prefix])).logits[0, -1].float()  # [vocab]
    first, second = logits.topk(2).values.tolist()
    return first - second, float(logits[reference_id] - logits[token_id])


def _in_a_line(error: Exception) -> str:
    """The message of the project's own errors; of other errors the type too."""
    text = " ".join(str(error).split()) or "no message"
    return text if type(error).__module__.startswith("paged_") else f"{type(error).__name__}: {text}"
