"""Grammars made to harm: they are refused to who sends them, and nobody else notices."""

from __future__ import annotations

import gc
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any, NamedTuple

import llguidance
import psutil
import pytest

from calls import Alphabet
from paged_core import InvalidRequestError, SamplingParams
from paged_serving import CallError, CompletionCall, Failure, RequestLimits, compile_grammar, openai_error
from paged_serving.grammars import compiling, trial_process
from paged_serving.grammars.bounded import BoundedThread, TooSlow
from paged_serving.grammars.trials import Trials
from waiting import until

PATTERNS = [{"pattern": f".*[a-z]{{{number}}}q.*"} for number in range(20)]
BOMBS: list[dict[str, Any]] = [
    {"guided_json": {"type": "integer", "multipleOf": 99999989}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "allOf": PATTERNS}}}},
    {"guided_grammar": "start: T\nT: " + " & ".join(f"/{each['pattern']}/" for each in PATTERNS)},
    {"response_format": {"type": "regex", "value": "((a{1000}){1000}){1000}"}},
]


def call(alphabet: Alphabet, **fields: Any) -> CompletionCall:
    return CompletionCall({"prompt": "A", "max_tokens": 80, "temperature": 0, **fields}, alphabet.served, "1")


def text(alphabet: Alphabet, **fields: Any) -> str:
    told: str = alphabet.answer(call(alphabet, **fields))["choices"][0]["text"]
    return told


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_by_its_field_and_the_limit_that_it_passes(alphabet: Alphabet, bomb: dict[str, Any]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequestError, match=r"takes more than (500 ms.*--max-grammar-ms|192 MiB)") as refused:
        compile_grammar(call(alphabet, **bomb))
    status, body = openai_error(refused.value)
    assert (status, body["error"]["param"]) == (400, next(iter(bomb)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 64 * 1024, "it went off elsewhere"
    assert text(alphabet, guided_regex="abc") == "abc"


def test_one_that_takes_too_much_memory_is_refused_too() -> None:
    alphabet = Alphabet(RequestLimits(max_grammar_ms=60_000))
    with alphabet.engine, pytest.raises(InvalidRequestError, match="192 MiB"):
        compile_grammar(call(alphabet, guided_json={"type": "string", "allOf": PATTERNS}))


def test_others_get_their_grammars_while_bombs_are_tried(alphabet: Alphabet) -> None:
    refused: list[Exception] = []

    def send(number: int) -> None:
        try:
            compile_grammar(call(alphabet, guided_json={"title": str(number), **BOMBS[0]["guided_json"]}))
        except InvalidRequestError as error:
            refused.append(error)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    told = [text(alphabet, guided_regex=f"b{number}") for number in range(3)]
    early = len(refused)
    for thread in threads:
        thread.join(60)
    assert told == ["b0", "b1", "b2"]
    assert early < len(refused) == 4, "the bombs were still being tried"


def test_who_asks_for_the_same_again_waits_for_no_trial(alphabet: Alphabet, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    verdict = Trials.verdict

    def count(trials: Trials, grammar: str) -> str | None:
        tried.append(grammar)
        return verdict(trials, grammar)

    monkeypatch.setattr(Trials, "verdict", count)
    assert [text(alphabet, guided_regex="ccc") for _ in range(3)] == ["ccc"] * 3
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="unknown name"):
            compile_grammar(call(alphabet, guided_grammar="start: nothing_there"))
    assert len(tried) == 2
    for number in range(100):
        compile_grammar(call(alphabet, guided_regex=f"d{number}"))
    assert len(alphabet.served._grammars._kept) <= 64


class Tried(NamedTuple):
    alphabet: Alphabet
    process: psutil.Process  # that tries its grammars


@pytest.fixture(scope="module")
def tried() -> Iterator[Tried]:
    before, alphabet = set(psutil.Process().children()), Alphabet()
    with alphabet.engine:
        alphabet.served.prepare_grammars()
        (process,) = set(psutil.Process().children()) - before
        yield Tried(alphabet, process)


def test_a_server_makes_what_the_first_grammar_needs_before_it_serves(tried: Tried) -> None:
    alphabet, process = tried
    before = set(psutil.Process().children())
    assert text(alphabet, guided_regex="abc") == "abc"
    assert process.is_running() and set(psutil.Process().children()) <= before, "the same was used"


def bombs(alphabet: Alphabet, name: str, number: int) -> list[CompletionCall]:
    """No two the same."""
    return [
        call(alphabet, guided_json={"title": f"{name} {each}", **BOMBS[0]["guided_json"]}) for each in range(number)
    ]


def states(process: psutil.Process) -> list[str]:
    """Of the trials that it has begun."""
    found = []
    for trial in process.children():
        with suppress(psutil.NoSuchProcess):
            found.append(trial.status())
    return found


def test_trials_run_one_at_a_time_and_step_back_for_the_server(tried: Tried) -> None:
    alphabet, process = tried
    compile_grammar(call(alphabet, guided_regex="f"))
    assert process.nice() >= 10
    with ThreadPoolExecutor(3) as pool:
        sent = [pool.submit(pytest.raises, InvalidRequestError, compile_grammar, bomb)
                for bomb in bombs(alphabet, "turn", 3)]  # fmt: skip
        until(lambda: states(process).count(psutil.STATUS_STOPPED) == 2)
        for each in sent:
            each.result(60)
    assert states(process) == []


class Endless:
    """A trial that takes for ever."""

    def __init__(self, number: int, *others: Any) -> None:
        self._number, self.ends = number, time.monotonic() + 1000
        self.told, self._telling = Pipe(duplex=False)

    def busy_s(self) -> float:
        return 1.0

    def pause(self) -> None:
        pass

    def end(self) -> tuple[int, bool, None]:
        return self._number, False, None


def test_where_slow_trials_are_too_many_the_oldest_are_given_up_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_process, "Trial", Endless)
    ours, theirs = Pipe()

    def serve() -> None:
        with suppress(EOFError):
            trial_process._serve(theirs, None, 500)

    thread = threading.Thread(target=serve)
    thread.start()
    for number in range(20):
        ours.send((number, "start: /a/"))
    given_up = [ours.recv() for _ in range(4) if ours.poll(60)]
    ours.close()
    thread.join(60)
    assert given_up == [(number, False, None) for number in range(4)]


def test_what_a_busy_machine_cannot_try_is_no_fault_of_the_grammar(
    tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = call(tried.alphabet, guided_regex="gg")
    tried.process.suspend()
    try:
        with monkeypatch.context() as patched, pytest.raises(CallError, match="too busy") as busy:
            patched.setattr("paged_serving.grammars.trials._PATIENCE_S", -0.4)
            compile_grammar(asked)
    finally:
        tried.process.resume()
    assert openai_error(busy.value)[0] == 503
    assert text(tried.alphabet, guided_regex="gg") == "gg"


def test_trials_end_with_the_process_that_made_them(tried: Tried) -> None:
    alphabet, process = tried
    with ThreadPoolExecutor(2) as pool:
        sent = [pool.submit(pytest.raises, InvalidRequestError, compile_grammar, bomb)
                for bomb in bombs(alphabet, "end", 2)]  # fmt: skip
        until(lambda: psutil.STATUS_STOPPED in states(process))
        trials = process.children()
        process.kill()
        assert psutil.wait_procs(trials, 10)[1] == []
        for each in sent:  # another process tries them again
            each.result(60)


def test_a_process_that_has_died_is_started_again() -> None:
    seen, alphabet = set(psutil.Process().children()), Alphabet()
    with alphabet.engine:
        alphabet.served.prepare_grammars()
        for number in range(2):
            (process,) = set(psutil.Process().children()) - seen
            seen.add(process)
            process.kill()
            assert text(alphabet, guided_regex=f"e{number}") == f"e{number}"
        assert len(set(psutil.Process().children()) - seen) == 1


def test_a_grammar_that_begins_harmlessly_is_refused_before_anybody_follows_it(alphabet: Alphabet) -> None:
    with pytest.raises(InvalidRequestError, match="can't be used: lexer error: too many expressions"):
        compile_grammar(call(alphabet, guided_regex="[a-c][d-f]((a{1000}){1000}){1000}"))
    assert text(alphabet, guided_regex="[a-c]{30}", temperature=40, seed=1), "this one goes on harmlessly"


@pytest.mark.parametrize(("fuel", "told"), [(None, "too many expressions"), (10**9, "takes too long")])
def test_a_step_that_takes_long_ends_its_own_request_only(
    monkeypatch: pytest.MonkeyPatch, fuel: int | None, told: str
) -> None:
    """Neither compiling nor the tokens that a trial follows take long: what comes after them does."""
    if fuel is not None:
        limits = llguidance.LLParserLimits(max_lexer_states=10**9, step_lexer_fuel=fuel, verbose_errors=False)
        monkeypatch.setattr(compiling, "_LIMITS", limits)
        monkeypatch.setattr("paged_serving.grammars.grammars._STEP_S", 0.06)
    alphabet = Alphabet()
    with alphabet.engine:
        neighbour = alphabet.engine.submit("A", SamplingParams(max_tokens=150, temperature=0, ignore_eos=True))
        late = call(alphabet, guided_regex="[a-c]{40}((a{1000}){1000}){1000}", n=2, temperature=40, seed=1)
        compile_grammar(late)
        result = alphabet.engine.submit(late.prompts[0], late.params).result(30)
        assert result.error is not None
        assert told in result.error
        assert openai_error(CallError(Failure.GENERATION, result.error))[0] == 400
        assert len(neighbour.result(30).outputs[0].token_ids) == 150
        assert text(alphabet, guided_regex="abc") == "abc"


def test_rows_share_no_limit_of_the_lexers_states(alphabet: Alphabet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a matcher share their lexer: what one has used up would be missing to all who come later."""
    monkeypatch.setattr(compiling, "_LIMITS", llguidance.LLParserLimits(max_lexer_states=200, verbose_errors=False))
    asked: dict[str, Any] = {"guided_regex": "[a-z]*[a-m][a-z]{30}", "temperature": 40, "max_tokens": 20, "seed": 1}
    many = call(alphabet, n=48, **asked)
    compile_grammar(many)
    result = alphabet.engine.submit(many.prompts[0], many.params).result(60)
    assert {output.finish_reason for output in result.outputs} == {"length"}, result.error


def test_a_call_that_takes_long_is_left_behind() -> None:
    bounded, free = BoundedThread(0.05), threading.Event()

    def burn() -> None:
        while not free.is_set():
            pass

    assert bounded.call(lambda: 1) == 1
    with pytest.raises(TooSlow):
        bounded.call(burn)
    assert bounded.call(lambda: 2) == 2, "another thread takes it"
    free.set()
    with pytest.raises(KeyError):
        bounded.call(lambda: {}["nothing"])


class Row:
    """Makes calls that know of it, and it of the thread."""

    def __init__(self) -> None:
        self.bounded = BoundedThread(5.0)

    def ask(self) -> bool:
        return self.bounded.call(lambda: self.bounded is not None)


def test_the_thread_ends_with_who_has_it_though_its_last_call_knew_of_him() -> None:
    before = set(threading.enumerate())
    row = Row()
    assert row.ask()
    (thread,) = set(threading.enumerate()) - before
    del row
    until(lambda: gc.collect() >= 0 and not thread.is_alive())


def test_a_call_that_waits_for_a_busy_machine_is_waited_for() -> None:
    assert BoundedThread(0.05).call(lambda: time.sleep(0.3) or 3) == 3
