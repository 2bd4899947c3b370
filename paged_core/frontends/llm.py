"""LLM: a list of prompts in, a list of texts out. It drives an Engine in the caller's own thread."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from paged_core.config import EngineConfig
from paged_core.engine.engine import Engine
from paged_core.errors import EngineDeadError, InvalidRequestError, ReentryError
from paged_core.frontends.frontend import Frontend
from paged_core.interrupts import interrupts_the_process
from paged_core.scheduling.params import SamplingParams
from paged_core.text.codec import TextCodec, prepare_params
from paged_core.text.generation import Generation, deliver
from paged_core.text.outputs import GenerationOutput, refused
from paged_core.text.prompts import as_conversations, as_prompts, encode_prompt


class LLM(Frontend):
    """A model for offline use.

    ``LLM("a/folder").generate(["Hello"], SamplingParams(n=3))[0].outputs[2].text``

    Args:
        model: an Engine, or a model as Engine takes it: a PagedModel, a path, a hub id, a transformers model.
        tokenizer: taken from the model (by the ``load_tokenizer`` hook) when None.
        config: an EngineConfig; or give its fields as keyword arguments.
        options: those fields; and ``device``, ``dtype``, ``plugins`` and ``progress``, as Engine takes them.

    Threads may share an LLM; their calls run one after another.

    Raises:
        TypeError: an option is unknown, or ``model`` is an Engine, which has its options already.
        PluginError, UnsupportedModel, ConfigError: as Engine raises them.
    """

    def __init__(
        self, model: Any, *, tokenizer: Any = None, config: EngineConfig | None = None, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, config, options)
        self._lock = threading.Lock()
        self._caller: threading.Thread | None = None  # the thread whose call is running
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[GenerationOutput]:
        """Complete each prompt; the answers come in the prompts' order.

        Args:
            prompts: one or several of: a string, token ids, a list of chat messages (dicts with role and content),
                ``{"prompt": str}`` or ``{"prompt_token_ids": ids}``; or the output of a Hugging Face tokenizer, without
                its padding.
            sampling_params: one for all, or one for each prompt.
            use_tqdm: show a progress bar.

        If a prompt can't be served, the others still are: its output's ``error`` gives the reason, and the
        ``finish_reason`` of its outputs is "error". An interrupt (Ctrl-C) cancels the whole call and leaves the LLM
        usable.

        Raises:
            InvalidRequestError: prompts has none of these forms; or sampling_params is a list of another length than
            prompts, or holds something else.
            ReentryError: it was called from inside a call of the same LLM, by a logits processor for example.
        """
        asked = as_prompts(prompts)
        each = _one_each(sampling_params, len(asked))
        self._check_no_call_of_this_thread()
        with (
            self._lock,
            self._one_call(),
            _interrupts_between_steps() as check_interrupt,
            _progress(len(asked), use_tqdm) as progress,
        ):
            call = _GenerateCall(self.engine, self.codec, progress)
            try:
                for prompt, params in zip(asked, each, strict=True):
                    call.add(f"llm-{next(self._numbers)}", prompt, params)
                    check_interrupt()
                while call.num_open:
                    call.step()
                    check_interrupt()
            except BaseException:
                call.cancel()
                raise
            return call.results()

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[GenerationOutput]:
        """As generate, for one conversation (a list of messages) or several.

        Raises:
            InvalidRequestError: messages is something else; or as for generate.
        """
        return self.generate(as_conversations(messages), sampling_params, use_tqdm=use_tqdm)

    def close(self) -> None:
        """Take no more calls. One that another thread has under way ends first.

        Raises:
            ReentryError: as for generate.
        """
        self._check_no_call_of_this_thread()
        with self._lock, self._one_call():
            self.engine.close()

    def _check_no_call_of_this_thread(self) -> None:
        if self._caller is threading.current_thread():
            raise ReentryError(
                "this LLM was called by what one of its own calls calls (a logits processor, say), and would wait for "
                "that call for ever; call it when generate() has returned, or use another LLM"
            )

    @contextmanager
    def _one_call(self) -> Iterator[None]:
        self._caller = threading.current_thread()
        try:
            yield
        finally:
            self._caller = None


class _GenerateCall:
    """The prompts of one ``generate`` call."""

    def __init__(self, engine: Engine, codec: TextCodec, progress: _Progress) -> None:
        self._engine = engine
        self._codec = codec
        self._progress = progress
        self._open: dict[str, Generation] = {}  # by request id
        self._results: list[Generation | GenerationOutput] = []  # in the prompts' order

    @property
    def num_open(self) -> int:
        return len(self._open)

    def add(self, request_id: str, prompt: Any, params: SamplingParams) -> None:
        arrival = time.perf_counter()
        try:
            generation = Generation(
                request_id,
                encode_prompt(self._codec, prompt),
                prepare_params(self._codec, params),
                self._codec,
                arrival,
            )
            self._engine.add_request(
                request_id, generation.prompt.token_ids, generation.params, eos_token_ids=self._codec.eos_token_ids
            )
        except EngineDeadError:
            raise
        except BaseException as error:  # a plugin or the tokenizer may raise anything
            if interrupts_the_process(error):
                raise
            known = isinstance(error, InvalidRequestError)
            self._refuse(request_id, prompt, params, str(error) if known else f"it could not be taken in: {error!r}")
            return
        self._open[request_id] = generation
        self._results.append(generation)

    def _refuse(self, request_id: str, prompt: Any, params: SamplingParams, told: str) -> None:
        self._engine.abort(request_id)
        self._results.append(refused(request_id, prompt, params.n, told, time.perf_counter()))
        self._progress.update(0, 1)

    def step(self) -> None:
        assert self._engine.has_work, "the engine lost a request, or somebody else steps it"
        num_tokens = num_done = 0
        for output in self._engine.step():
            generation = self._open.get(output.request.id)
            if generation is None:
                continue
            deliver(self._engine, generation, output)
            num_tokens += len(output.token_ids)
            if generation.finished:
                del self._open[output.request.id]
                num_done += 1
        self._progress.update(num_tokens, num_done)

    def cancel(self) -> None:
        """Abort open requests, and take their final outputs from the engine."""
        with suppress(Exception):  # an engine that has failed; that error is being raised already
            for request_id in self._open:
                self._engine.abort(request_id)
            if self._engine.has_work:
                self._engine.step()

    def results(self) -> list[GenerationOutput]:
        return [entry.result() if isinstance(entry, Generation) else entry for entry in self._results]


class _Progress:
    """Shows no progress."""

    def update(self, num_tokens: int, num_done: int) -> None:
        """Note that ``num_tokens`` were generated and ``num_done`` prompts ended."""


class _Bar(_Progress):
    """A tqdm bar over prompts, with output tokens per second."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._began = time.perf_counter()
        self._num_tokens = 0

    def update(self, num_tokens: int, num_done: int) -> None:
        self._num_tokens += num_tokens
        rate = self._num_tokens / max(time.perf_counter() - self._began, 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} out tok/s", refresh=False)
        self._bar.update(num_done)


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[_Progress]:
    if not wanted:
        yield _Progress()
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        print("no progress bar: pip install tqdm", file=sys.stderr)
        yield _Progress()
        return
    with tqdm(total=total, desc="prompts", unit="prompt", dynamic_ncols=True) as bar:
        yield _Bar(bar)


@contextmanager
def _interrupts_between_steps() -> Iterator[Any]:
    """Delay a Ctrl-C until the step is over, so that it can't interrupt the engine's work. A second one is raised at
    once.

    Yields a function that raises a delayed KeyboardInterrupt. Only the main thread gets signals. If the caller has its
    own signal handler, that stays in place.
    """
    default = signal.default_int_handler
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not default:
        yield lambda: None
        return
    due = threading.Event()

    def keep(number: int, frame: Any) -> None:
        if due.is_set():
            default(number, frame)
        due.set()

    def check() -> None:
        if due.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, keep)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, default)


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, num: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num
    if isinstance(params, str | Mapping) or not isinstance(params, Sequence):
        raise InvalidRequestError(f"sampling_params is of type {type(params).__name__}; give SamplingParams(...)")
    if len(params) != num:
        raise InvalidRequestError(
            f"there are {num} prompts and {len(params)} sampling_params; give one for each, or one"
        )
    for place, each in enumerate(params):
        if not isinstance(each, SamplingParams):
            raise InvalidRequestError(f"sampling_params[{place}] is of type {type(each).__name__}, no SamplingParams")
    return list(params)
