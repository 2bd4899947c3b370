"""Engine: is built through hooks; ``step`` is the loop. Token ids go in and come out; it knows nothing of text.

An engine is single-threaded: one owner calls add_request, abort, stop and step. AsyncEngine is such an owner, which
serves many threads. Code that runs inside a step (the model, selectors, logits processors) may not call them.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from paged_core.config import EngineConfig
from paged_core.engine import assembly
from paged_core.engine.assembly import Progress
from paged_core.engine.checks import check_resumed
from paged_core.engine.intake import Intake
from paged_core.engine.lifecycle import Lifecycle
from paged_core.engine.lookahead import Lookahead
from paged_core.engine.observers import Observers
from paged_core.engine.offloading import Offloading
from paged_core.engine.open_requests import OpenRequests
from paged_core.engine.step_runner import StepRunner
from paged_core.engine.view import EngineView, MemoryUse
from paged_core.errors import ReentryError
from paged_core.execution.batch import BatchBuilder
from paged_core.execution.model import TokenSelector
from paged_core.plugins import load_plugins
from paged_core.sampling.beam_search import BeamSearch
from paged_core.scheduling.params import InvalidRequestError, SamplingParams
from paged_core.scheduling.request import FinishReason, Request, RequestOutput
from paged_core.scheduling.schedule import Schedule
from paged_core.stats import StepStats

_SAVE_S = 3.0  # to store blocks when an engine is closed
_LANDING_S = 0.005  # to wait for loads, when there is nothing else to do


class Engine:
    """One model on one paged K/V cache.

    Args:
        model: a PagedModel, or a source for the ``load_model`` hook: a path, a hub id, a transformers model.
        config: the user's settings; ``sizes`` has the resulting sizes.
        plugins: more plugin modules or objects; they are asked before installed and built-in ones.
        device: where the model computes, such as "cuda:1" or a torch.device. None: where the model is.
        dtype: what it computes in, such as "bfloat16" or a torch.dtype. None or "auto": as it is, or as it is stored.
        progress: called during long work (compiling kernels) while the engine is built; None: a line on a terminal.

    Raises:
        PluginError: no plugin answered a required hook.
        UnsupportedModel: the model can't run on paged memory.
        ConfigError: the sizes contradict each other, or the model can't run on that device or in that dtype.
    """

    def __init__(
        self,
        model: Any,
        config: EngineConfig | None = None,
        *,
        plugins: Iterable[Any] = (),
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._manager = load_plugins(plugins)
        self._tokenizer_source = model
        self.config = config = config or EngineConfig()
        parts = assembly.assemble(self._manager, model, config, device, dtype, progress)
        self._model, self.sizes, sampler, self._runner = parts.computing
        self._scheduler = parts.scheduler
        self.spec = self._model.spec
        self._pool = self._scheduler.pool
        self._num_compiles = self._runner.num_compiles
        builder = BatchBuilder(self.sizes.block_size, self.spec.device)
        one = config.tensor_parallel_size == 1  # with several ranks, the host must send each step's tokens
        ahead = config.lookahead if config.lookahead is not None else one and self.spec.device.type == "cuda"
        self._offloading = Offloading(self._scheduler, self._runner, parts.tiers, parts.costs)
        self._steps = StepRunner(
            self._scheduler, builder, self._runner, sampler, self._offloading.carry_out, ahead=ahead
        )
        self._lookahead = Lookahead(self._scheduler, self._steps)
        self._intake = Intake(self._model, self._manager, config.seed)
        self._observers = Observers(self._manager)
        if self._observers.listen_to("on_prefix_cache_changed"):
            self._pool.watch()
        self._open = OpenRequests(self._observers)
        self._lifecycle = Lifecycle()
        self._refreshed = False  # whether changes of the model were looked for since the last step
        if parts.tiers:
            _TO_SAVE.add(self)
        self.last_stats: StepStats | None = None

    # ---- requests ------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self._open.has_untold or self._scheduler.has_work

    @property
    def trouble(self) -> str | None:
        """Why the engine can't compute any more, if that is known before the next step; else None. For any thread."""
        return self._runner.trouble

    @property
    def num_open(self) -> int:
        """Requests that have not ended, including waiting and held ones."""
        return len(self._open)

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer of this model from the ``load_tokenizer`` hook; None if there is none. A new one for each
        call."""
        return self.tokenizer_of(self._tokenizer_source)

    def tokenizer_of(self, source: Any) -> Any | None:
        """The tokenizer of another model: a path, a hub id, or a live object."""
        return self._manager.hook.load_tokenizer(source=source)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        selector: TokenSelector | None = None,
        eos_token_ids: Collection[int] = (),
    ) -> list[Request]:
        """Queue ``params.n`` samples of one prompt, or its beams.

        ``eos_token_ids``: further tokens that end a sequence, besides those of the model's configuration, such as the
        tokenizer's. Ids outside the vocabulary are allowed and have no effect.

        Raises:
            InvalidRequestError: the prompt is empty, holds ids outside the vocabulary, or can never fit; or the id is
            in use. Then nothing was queued.
        """
        params = params or SamplingParams()
        beams = params.use_beam_search and selector is None
        rows = [prompt_token_ids] * params.n
        chosen_by = BeamSearch() if beams else selector
        return self._add(request_id, rows, params, chosen_by, lockstep=beams, eos_token_ids=eos_token_ids)

    def add_group(
        self, request_id: str, prompts: Sequence[Sequence[int]], params: SamplingParams, *, selector: TokenSelector
    ) -> list[Request]:
        """Queue rows that advance in lockstep: each step of ``selector`` sees all of them, in order, or none.

        Raises:
            InvalidRequestError: as for add_request, the group counts as one; or it has no prompt, or asks for
                prompt_logprobs.
        """
        if not prompts:
            raise InvalidRequestError("the group is empty; give at least one prompt", "prompt")
        if params.prompt_logprobs is not None:
            raise InvalidRequestError(
                "prompt_logprobs can't be told of a group; ask with add_request, one prompt at a time",
                "prompt_logprobs",
            )
        return self._add(request_id, prompts, params, selector, lockstep=True)

    def resume(
        self, requests: Sequence[Request], token_ids: Sequence[int], parents: Sequence[int] | None = None
    ) -> None:
        """Continue rows whose selector returned None: each gets the token that was chosen for it meanwhile.

        ``parents``: row i continues from ``requests[parents[i]]``'s tokens and K/V, which it then shares (a beam step).
        """
        self._lifecycle.check_between_steps("resume()")
        check_resumed(requests, token_ids, parents, self.spec.vocab_size)
        self._scheduler.resume(requests, token_ids, parents)

    def recompute(self, requests: Iterable[Request]) -> None:
        """Compute the K/V of held rows again, if they were preempted meanwhile. Their selectors are called again."""
        self._lifecycle.check_between_steps("recompute()")
        self._scheduler.recompute(requests)

    def preempt_held(self) -> bool:
        """Preempt the last held rows in favour of waiting requests, when their owner is slow. Their tokens are computed
        again when they are resumed. False: no request waits, or no row is held."""
        self._lifecycle.check_between_steps("preempt_held()")
        return self._scheduler.preempt_held()

    def abort(self, request_id: str) -> None:
        """Cancel a request. Each of its unfinished rows gets its final output from the next step. Unknown ids are
        ignored: the request may have ended a moment ago."""
        self._lifecycle.check_between_steps("abort()")
        self._open.tell_later(self._finish(self._open.rows(request_id), FinishReason.ABORT))

    def stop(self, request: Request) -> RequestOutput | None:
        """End a row whose text has reached a stop string. Returns its final output; None if it had ended already."""
        self._lifecycle.check_between_steps("stop()")
        outputs = self._finish((request,), FinishReason.STOP)
        return outputs[0] if outputs else None

    def close(self, save_timeout_s: float = _SAVE_S) -> None:
        """Abort all requests and accept no more. Blocks of the prefix cache that tiers lack are stored, for at most
        ``save_timeout_s`` seconds."""
        self._lifecycle.check_between_steps("close()")
        for request_id in self._open:
            self.abort(request_id)
        self._offloading.close(save_timeout_s if self._lifecycle.alive else 0.0)
        self._lifecycle.end("it was closed")
        self._runner.close()

    # ---- memory --------------------------------------------------------------------------------------------------

    def read_kv(self, request: Request) -> list[tuple[Tensor, Tensor]]:
        """Copies of a request's K/V: each layer's ``(k [K,n,D], v [K,n,Dv])``, n its num_computed.

        Call it between two steps and before the request ends, because its blocks are freed then; its selector can hold
        it.
        Keys are as attention sees them (rotated, for instance). Positions behind every layer's sliding window are
        zeros.

        Raises:
            InvalidRequestError: the request has ended, or the K/V are spread over ranks.
        """
        if request.finished:
            raise InvalidRequestError(
                f"request {request.id!r} has ended, and its K/V were given back; read them before it ends: "
                "a row that its selector holds (it answers None) stays until resume() or stop()"
            )
        return self._runner.read(request.block_table, request.num_computed)

    @property
    def attention_backend(self) -> str:
        """The name of the chosen attention backend."""
        return self._runner.backend.name

    @property
    def memory(self) -> MemoryUse:
        """The present memory and contents of the K/V cache."""
        return MemoryUse.of(self._pool, self._runner.cache)

    def save_prefix_cache(self, timeout_s: float = _SAVE_S) -> int:
        """Store the blocks of the prefix cache that tiers (kv_disk_path, kv_host_bytes) lack, the most recently used
        first, for at most ``timeout_s`` seconds. Returns how many blocks were stored. ``close`` does so too."""
        self._lifecycle.check_between_steps("save_prefix_cache()")
        self._lifecycle.check_alive()
        return self._offloading.save(timeout_s)

    def save_some(self) -> bool:
        """Like ``save_prefix_cache``, but a small part: for an idle server that may be killed at any time. False:
        nothing is left."""
        self._lifecycle.check_between_steps("save_some()")
        return self._lifecycle.alive and self._offloading.save_some()

    def release_memory(self) -> bool:
        """Free all K/V memory, cached prefixes included; the next request allocates it again. False: nothing was freed,
        because running requests need it. A plugin's cache that can't grow keeps its memory."""
        self._lifecycle.check_between_steps("release_memory()")
        if self._pool.num_used:
            return False
        self._pool.shrink()
        self._runner.release()
        self._tell_of_cache()
        return True

    def view(self) -> EngineView:
        """The running and waiting requests, and the state of every block. Call it between two steps; any thread may
        read the view."""
        return EngineView.of(self._scheduler, self._offloading.stats)

    @property
    def captured_steps(self) -> frozenset[tuple[int, int]] | None:
        """The present CUDA graphs of decode steps: (rows, tokens of the longest sequence) of each. None: this engine
        captures none."""
        return self._runner.captured

    def check(self) -> None:
        """Assert that requests and blocks agree: no block is lost, wrongly shared or used twice. Call it between two
        steps."""
        self._scheduler.check()

    # ---- the loop ------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one batch. Returns the new output of each request that sampled, and ends that were not returned
        before.

        Raises:
            EngineDeadError: the device or the model has failed for good, or has no memory for a single token.
            ReentryError: it was called from inside a step.
        """
        self._lifecycle.check_between_steps("step()")
        began = time.perf_counter()
        self._refreshed = False
        with self._lifecycle.step(undo=self._lookahead.forget):  # the step begun ahead followed from this one
            self._offloading.take_up()
            now = self._lookahead.take() or self._steps.launch(self._scheduler.schedule())
            failed, outputs = dict(now.failed), []
            if now.schedule.chunks:
                self._lookahead.begin(now)
                selected = self._steps.select(now)
                failed |= selected.failed
                outputs = self._scheduler.update(now.schedule, selected.selection, selected.not_finite)
                self._open.keep(selected.prompt_logprobs)
            else:
                self._offloading.wait(_LANDING_S)
        for group, message in failed.items():
            self._open.tell_later(self._finish(group.members, FinishReason.ERROR, message))
        if now.schedule.chunks:
            self._report(now.schedule, len(now.computed.sample_requests), time.perf_counter() - began)
        return self._open.tell(outputs)

    def _finish(
        self, requests: Iterable[Request], reason: FinishReason, error: str | None = None
    ) -> list[RequestOutput]:
        outputs = self._scheduler.finish(list(requests), reason, error)
        self._open.end(outputs)
        return outputs

    def _report(self, schedule: Schedule, num_sampled: int, duration_s: float) -> None:
        self.last_stats = StepStats.of(
            self._scheduler,
            schedule,
            num_sampled=num_sampled,
            duration_s=duration_s,
            total_late_compiles=self._runner.num_compiles - self._num_compiles,
            total_steps_divided=self._steps.num_divided,
            offloading=self._offloading.stats,
        )
        self._offloading.measure(self.last_stats.num_tokens, len(schedule.chunks), duration_s)
        self._tell_of_cache()
        self._observers.tell("on_step_finished", stats=self.last_stats)

    def _tell_of_cache(self) -> None:
        if events := self._pool.take_events():
            self._observers.tell("on_prefix_cache_changed", events=events)

    # ---- taking requests in --------------------------------------------------------------------------------------

    def _add(
        self,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        selector: TokenSelector | None,
        lockstep: bool,
        eos_token_ids: Collection[int] = (),
    ) -> list[Request]:
        self._lifecycle.check_between_steps("adding a request")
        if self._runner.trouble is not None and self._lifecycle.alive:
            self._lifecycle.end(self._runner.trouble)
        self._lifecycle.check_alive()
        if request_id in self._open:
            raise InvalidRequestError(f"request id {request_id!r} is in use; choose another")
        self.refresh()  # the vocabulary may have changed
        rows = self._intake.rows(request_id, prompts, params, selector, lockstep, eos_token_ids)
        self._scheduler.add(rows)
        self._open.add(rows)
        return rows

    def refresh(self) -> None:
        """Take in changes of the user's model, because cached K/V may have become invalid. Adding a request does this
        itself.

        Raises:
            EngineDeadError: the model has another dtype, device or vocabulary now, which needs a new engine.
        """
        if self._refreshed and len(self._open):
            return
        with self._lifecycle.device_looked_after():
            changed = self._model.refresh()
        if changed:
            self._scheduler.forget_cached()
            self._offloading.forget()
            self._runner.drop_graphs()
            self._tell_of_cache()
        self._refreshed = True


_TO_SAVE: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _save_all() -> None:
    """Store the prefix cache of engines that a script has not closed, for the next process."""
    for engine in list(_TO_SAVE):
        with suppress(ReentryError):  # the process is exiting in the middle of a step
            engine.close()
