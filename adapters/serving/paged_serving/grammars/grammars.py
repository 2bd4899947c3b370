"""Grammars: compiles the grammars of requests, first in a trial process and then here, and caches them."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from paged_core import InvalidRequestError, PluginError, Request, TextCodec
from paged_serving.grammars.bounded import BoundedThread
from paged_serving.grammars.form import JsonForm
from paged_serving.grammars.processor import CompiledGrammar, GrammarProcessor
from paged_serving.grammars.sources import Sources
from paged_serving.grammars.spelling import spell

if TYPE_CHECKING:
    from paged_serving.grammars.trials import Trials

_log = logging.getLogger("paged_serving")
_MAX_KEPT = 64  # compiled grammars, and refusals
_NUM_COMPILERS = 4
_COMPILER_NICE = 10
_STEP_S = 0.2  # most processor time of a row's step: where the fuel of ``compiling`` doesn't bound it


class Grammars:
    """Compiles grammars for one tokenizer. Callable from any thread.

    Args:
        vocab_size: columns of the logits.
        eos_token_ids: allowed where the grammar is fulfilled.
        max_ms: of processor time that compiling one may take.
    """

    def __init__(self, codec: TextCodec, vocab_size: int, eos_token_ids: Sequence[int], max_ms: int) -> None:
        self._codec, self._vocab_size, self._eos_token_ids = codec, vocab_size, list(eos_token_ids)
        self._max_ms = max_ms
        self._lock = threading.Lock()  # guards what follows
        self._parts: tuple[Any, Trials] | None = None
        self._kept: OrderedDict[str, Future[CompiledGrammar]] = OrderedDict()  # last used, last
        self._steps = BoundedThread(_STEP_S)
        self._compilers = ThreadPoolExecutor(_NUM_COMPILERS, "paged-compiler", _step_back)

    def grammar(self, field: str, kind: str, value: Any, form: JsonForm, sources: Sources | None = None) -> Grammar:
        """``field``: of the request, that asks for it; ``kind`` is "json" (a schema), "regex", "choice" (strings) or
        "grammar" (Lark or GBNF). ``sources``: of a grammar that is made of other fields than ``field``.

        Raises:
            InvalidRequestError: it isn't such a grammar.
            PluginError: llguidance isn't installed.
        """
        try:
            import llguidance  # noqa: F401
        except ImportError as error:
            raise PluginError("structured output needs llguidance: pip install 'paged-core[server]'") from error
        if not self._eos_token_ids:
            raise InvalidRequestError("structured output needs a model with an end-of-sequence token")
        return Grammar(field, spell(kind, value, form), self, sources)

    def prepare(self) -> None:
        """Make now what the first grammar needs. It takes up to a second, in most of which no other thread runs: a
        server does so before it has streams to hold up. Without llguidance or an end token there will be no grammars. A
        tokenizer that raises is logged; it costs requests with grammars only.
        """
        if not self._eos_token_ids or find_spec("llguidance") is None:
            return
        with ThreadPoolExecutor(1) as elsewhere:  # where no signal of the process strikes: what raises is the tokenizer
            error = elsewhere.submit(lambda: self._ready()[1].start()).exception()
        if error is not None:
            _log.warning("structured output is not available: %s: %s", type(error).__name__, error)

    def compiled(self, text: str) -> CompiledGrammar:
        """Compile, which may take long. Requests with the same grammar wait together.

        Raises:
            InvalidRequestError: it can't be used, or not within the limits.
            EngineBusyError: the machine is too busy to try it.
        """
        with self._lock:
            kept = self._kept.pop(text, None)
            if kept is not None and kept.done() and not _is_good(kept):
                kept = None
            mine = kept is None
            found = self._kept[text] = kept or Future()
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        if mine:
            self._settle(found, lambda: self._compile(text))
        return found.result()

    def refusal(self, text: str) -> str | None:
        """Why a grammar can't be used; None: it can. Only tries it. Raises as ``compiled``."""
        _, trials = self._ready()
        return trials.verdict(text)

    def processor(self, compiled: CompiledGrammar, num_prompt: int) -> GrammarProcessor:
        return GrammarProcessor(compiled, num_prompt, self._steps)

    def _settle(self, found: Future[CompiledGrammar], make: Callable[[], CompiledGrammar]) -> None:
        try:
            found.set_result(make())
        except BaseException as error:
            found.set_exception(error)

    def _compile(self, text: str) -> CompiledGrammar:
        from paged_serving.grammars.compiling import compile_grammar

        tokenizer, _ = self._ready()
        verdict = self.refusal(text)
        if verdict is not None:
            raise InvalidRequestError(f"the grammar can't be used: {verdict}")
        return self._compilers.submit(CompiledGrammar, lambda: compile_grammar(tokenizer, text)).result()

    def _ready(self) -> tuple[Any, Trials]:
        from paged_serving.grammars.compiling import Vocabulary, make_tokenizer
        from paged_serving.grammars.trials import Trials

        with self._lock:
            if self._parts is None:
                codec = self._codec
                vocabulary = Vocabulary(
                    [codec.token_bytes(token) for token in range(self._vocab_size)],
                    self._eos_token_ids,
                    sorted({*codec.special_token_ids, *self._eos_token_ids}),
                )
                encode = lambda text: codec.encode(text, add_special_tokens=False)  # noqa: E731
                self._parts = make_tokenizer(vocabulary, encode), Trials(vocabulary, self._max_ms)
            return self._parts


class Grammar:
    """A grammar for answers, which makes a logits processor for each row (see ``SamplingParams``)."""

    def __init__(self, field: str, text: str, grammars: Grammars, sources: Sources | None) -> None:
        self._field, self._text, self._grammars, self._sources = field, text, grammars, sources
        self._compiled: CompiledGrammar | None = None

    def compile(self) -> None:
        """Call this before a request goes to the engine, in a thread that may be blocked: it may take long.

        Raises:
            InvalidRequestError: it can't be used, or not within the limits; ``param`` is the field at fault.
            EngineBusyError: the machine is too busy to try it.
        """
        try:
            self._compiled = self._grammars.compiled(self._text)
        except (InvalidRequestError, PluginError) as error:
            field, told = self._blamed(str(error))
            raise InvalidRequestError(f"{field}: {told}", field) from error

    def _blamed(self, told: str) -> tuple[str, str]:
        """(the field at fault, what is wrong with it). An exceeded limit does not say where, so the first schemas are
        then tried one by one."""
        if self._sources is None:
            return self._field, told
        field, told = self._sources.blamed(told)
        if field is None:
            alone = ((each, spell("grammar", text, JsonForm())) for each, text in self._sources.schemas())
            field = next((each for each, text in alone if self._grammars.refusal(text) is not None), self._field)
        return field, told

    def for_request(self, request: Request) -> GrammarProcessor:
        assert self._compiled is not None, "compile() comes before the engine"
        return self._grammars.processor(self._compiled, request.num_prompt)


def _is_good(kept: Future[CompiledGrammar]) -> bool:
    """Whether later requests should use it. Refusals are cached too, but not a trial that didn't take place."""
    error = kept.exception()
    if error is not None:
        return isinstance(error, InvalidRequestError) and "can't be used" in str(error)
    return not (kept.result().too_slow or kept.result().worn)


def _step_back() -> None:
    """Lower the priority of a compiling thread: the trial has shown that it ends, and it must not delay the engine's
    steps."""
    if hasattr(os, "setpriority"):
        with suppress(OSError):  # Linux has priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _COMPILER_NICE)
