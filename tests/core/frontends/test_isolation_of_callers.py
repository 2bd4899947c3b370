"""What one caller's code raises or waits for, inside the thread that steps, reaches nobody else."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from alphabet_model import AlphabetModel, Gate
from async_calls import params
from bad_request import MyOwn
from paged_core import LLM, AsyncEngine, Engine, EngineConfig, EngineDeadError, ReentryError, hookimpl
from toy_tokenizers import CharacterTokenizer

CONFIG = EngineConfig(num_blocks=256, attention_backend="reference")
LIMIT_S = 30.0


of_every_kind = pytest.mark.parametrize(
    "kind", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, MyOwn, ValueError]
)


def open_async(plugins: Any = (), tokenizer: Any = None, model: Any = None) -> AsyncEngine:
    return AsyncEngine(
        Engine(model or AlphabetModel(), CONFIG, plugins=plugins), tokenizer=tokenizer or CharacterTokenizer()
    )


def raising(kind: type[BaseException]) -> Callable[..., Any]:
    def processor(input_ids: Any, scores: Any) -> Any:
        if input_ids.shape[1] == 3:
            raise kind
        return scores

    return processor


class Choking(CharacterTokenizer):
    """Raises ``kind`` when it is to spell a "Z"."""

    kind: type[BaseException]

    def decode(self, ids: Any, **options: Any) -> str:
        text = super().decode(ids, **options)
        if "Z" in text:
            raise self.kind
        return text


@of_every_kind
def test_what_a_processor_raises_is_told_to_its_own_stream(kind: type[BaseException]) -> None:
    with open_async() as engine:
        bad = engine.submit("A", params(logits_processors=[raising(kind)]))
        good = engine.submit("A", params(max_tokens=50))
        assert kind.__name__ in bad.result(LIMIT_S).error
        assert len(good.result(LIMIT_S).outputs[0].token_ids) == 50
        assert engine.submit("A", params()).result(LIMIT_S).outputs[0].text == "BCDEF"


@of_every_kind
def test_what_a_look_raises_is_its_futures(kind: type[BaseException]) -> None:
    def look(engine: Engine) -> None:
        raise kind

    with open_async() as engine:
        with pytest.raises(kind):
            engine.look(look).result(LIMIT_S)
        assert engine.look(Engine.view).result(LIMIT_S).num_running == 0
        assert engine.submit("A", params()).result(LIMIT_S).outputs[0].text == "BCDEF"


@of_every_kind
def test_what_a_plugin_raises_as_a_request_is_taken_in_is_told_to_its_stream(kind: type[BaseException]) -> None:
    due = [kind]

    def create_logits_processor() -> Any:
        if due:
            raise due.pop()

    plugin = SimpleNamespace(create_logits_processor=hookimpl(create_logits_processor))
    with open_async([plugin]) as engine:
        with pytest.raises(Exception, match=f"could not be taken in: {kind.__name__}"):
            engine.submit("A", params()).result(LIMIT_S)
        assert engine.submit("A", params()).result(LIMIT_S).outputs[0].text == "BCDEF"
    due.append(kind)
    llm = LLM(Engine(AlphabetModel(), CONFIG, plugins=[plugin]), tokenizer=CharacterTokenizer())
    bad, good = llm.generate(["A", "A"], params())
    assert kind.__name__ in bad.error
    assert good.outputs[0].text == "BCDEF"


@of_every_kind
def test_what_a_tokenizer_raises_on_one_text_ends_that_request(kind: type[BaseException]) -> None:
    tokenizer = Choking()
    tokenizer.kind = kind
    with open_async(tokenizer=tokenizer) as engine:
        bad, good = engine.submit("X", params()), engine.submit("A", params())
        assert kind.__name__ in bad.result(LIMIT_S).error
        assert good.result(LIMIT_S).outputs[0].text == "BCDEF"


@pytest.mark.usefixtures("interruptible")
@of_every_kind
def test_in_the_main_thread_too_a_processor_ends_its_own_prompt_only(kind: type[BaseException]) -> None:
    llm = LLM(AlphabetModel(), tokenizer=CharacterTokenizer(), config=CONFIG)
    bad, good = llm.generate(["A", "A"], [params(logits_processors=[raising(kind)]), params()])
    assert kind.__name__ in bad.error
    assert good.outputs[0].text == "BCDEF"
    assert llm.generate("A", params())[0].outputs[0].text == "BCDEF"


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_inside_a_processor_still_interrupts() -> None:
    def impatient(input_ids: Any, scores: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return scores

    llm = LLM(AlphabetModel(), tokenizer=CharacterTokenizer(), config=CONFIG)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("A", params(logits_processors=[impatient]))
    assert llm.generate("A", params())[0].outputs[0].text == "BCDEF"


def test_a_timeout_that_a_signal_raises_ends_the_call_and_not_a_request() -> None:
    def on_alarm(number: int, frame: Any) -> None:
        raise TimeoutError("took too long")

    def slow(input_ids: Any, scores: Any) -> Any:
        signal.raise_signal(signal.SIGALRM)
        return scores

    llm = LLM(AlphabetModel(), tokenizer=CharacterTokenizer(), config=CONFIG)
    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        with pytest.raises(TimeoutError, match="took too long"):
            llm.generate("A", params(logits_processors=[slow]))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert llm.generate("A", params())[0].outputs[0].text == "BCDEF"


# ---- calls that would wait for themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["generate", "chat", "close"])
def test_an_llm_cant_be_called_by_its_own_processor(call: str) -> None:
    llm = LLM(AlphabetModel(), tokenizer=CharacterTokenizer(), config=CONFIG)
    calls = {
        "generate": lambda: llm.generate("A", params()),
        "chat": lambda: llm.chat([{"role": "user", "content": "A"}]),
        "close": llm.close,
    }

    def processor(input_ids: Any, scores: Any) -> Any:
        return calls[call]()

    bad, good = llm.generate(["A", "A"], [params(logits_processors=[processor]), params()])
    assert "this LLM was called by what one of its own calls calls" in bad.error
    assert good.outputs[0].text == "BCDEF"
    assert llm.generate("A", params())[0].outputs[0].text == "BCDEF"


def test_an_llm_is_closed_when_the_call_of_another_thread_has_ended() -> None:
    gate = Gate()
    llm = LLM(AlphabetModel(gate), tokenizer=CharacterTokenizer(), config=CONFIG)
    found: list[Any] = []
    caller = threading.Thread(target=lambda: found.extend(llm.generate("A", params())), daemon=True)
    caller.start()
    closer = threading.Thread(target=llm.close, daemon=True)
    while gate.num_steps == 0:
        pass
    closer.start()
    gate.open()
    for thread in (caller, closer):
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert found[0].outputs[0].text == "BCDEF"
    with pytest.raises(EngineDeadError):
        llm.generate("A", params())


WAITS: dict[str, Callable[[AsyncEngine], Any]] = {
    "result": lambda engine: engine.submit("A", params()).result(),
    "iterate": lambda engine: list(engine.submit("A", params())),
    "aresult": lambda engine: asyncio.run(_aresult(engine)),
    "look": lambda engine: engine.look(Engine.view).result(),
    "exception": lambda engine: engine.look(Engine.view).exception(),
}


async def _aresult(engine: AsyncEngine) -> Any:
    return await engine.submit("A", params()).aresult()


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("place", ["processor", "look"])
def test_the_stepping_thread_cant_wait_for_itself(wait: str, place: str) -> None:
    with open_async() as engine:
        if place == "look":
            with pytest.raises(ReentryError, match="wait in another thread"):
                engine.look(lambda _: WAITS[wait](engine)).result(LIMIT_S)
        else:
            processor = params(logits_processors=[lambda input_ids, scores: WAITS[wait](engine)])
            assert "can't wait for what only it can bring about" in engine.submit("A", processor).result(LIMIT_S).error
        assert engine.submit("A", params()).result(LIMIT_S).outputs[0].text == "BCDEF"


def test_what_the_stepping_thread_asks_for_without_waiting_comes() -> None:
    engine: AsyncEngine
    more: list[Any] = []

    def on_request_finished(output: Any) -> None:
        if not more:
            more.append(engine.submit("X", params(max_tokens=2)))

    with open_async([SimpleNamespace(on_request_finished=hookimpl(on_request_finished))]) as engine:
        engine.submit("A", params()).result(LIMIT_S)
        assert more[0].result(LIMIT_S).outputs[0].text == "YZ"
