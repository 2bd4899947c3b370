"""Plugins: who is asked, in which order, what replaces what, and what a user reads when something is amiss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from paged_core import Engine, EngineConfig, PluginError, SamplingParams, UnsupportedModel, hookimpl
from paged_core.plugins import BUILTIN, load_plugins
from plugged_engine import PROMPTS, answer_all, engine_of, run, truth
from tiny_model import VOCAB, TinyModel

# ---- order -----------------------------------------------------------------------------------------------------


class Named:
    """Answers "auto" and its own name with the reference backend, under its own name."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.name, self.asked = name, asked

    @hookimpl
    def create_attention_backend(self, name, spec):
        from paged_core.builtin.attention import ReferenceBackend

        self.asked.append(self.name)
        if name not in ("auto", self.name):
            return None
        backend = ReferenceBackend(spec)
        backend.name = self.name
        return backend


def test_the_first_answer_wins_and_later_plugins_are_asked_first():
    asked: list[str] = []
    engine = engine_of(Named("one", asked), Named("two", asked), attention_backend="auto")
    assert (engine.attention_backend, asked) == ("two", ["two"])


def test_who_passes_lets_the_next_one_answer():
    asked: list[str] = []
    engine = engine_of(Named("one", asked), Named("two", asked), attention_backend="one")
    assert (engine.attention_backend, asked) == ("one", ["two", "one"])


class Half:
    """Answers one hook with an object that has only half of what is asked of it."""

    name = "half"
    spec = None

    def plan(self, metadata): ...

    def select(self, logits, requests): ...


@pytest.mark.parametrize(
    ("hook", "lacks"),
    [
        ("create_attention_backend", "copy_blocks, run"),
        ("create_sampler", "prompt_logprobs"),
        ("load_model", "forward"),
    ],
)
def test_an_answer_that_lacks_what_is_asked_of_it_is_refused_before_a_step_needs_it(hook, lacks):
    answer = type("Plugin", (), {hook: hookimpl(lambda self: Half())})
    with pytest.raises(PluginError, match=rf"Half, which answers {hook}, lacks {lacks}; docs/plugins.md"):
        Engine("a path" if hook == "load_model" else TinyModel(), EngineConfig(num_blocks=64), plugins=[answer()])


def test_the_plugins_given_are_asked_before_the_built_in_ones():
    class Fcfs:
        def key(self, request):
            return -request.arrival  # in truth: last come, first served

    class Stranger:
        @hookimpl
        def create_scheduling_policy(self, name):
            return Fcfs() if name == "fcfs" else None

    order, tokens = answer_all(engine_of(Stranger(), max_num_seqs=1))
    assert order == ["middle", "short", "long"]
    assert tokens == truth()


def test_installed_plugins_stand_between_the_built_in_ones_and_those_given():
    extra = SimpleNamespace()
    names = [name for name, _ in load_plugins([extra]).list_name_plugin()]
    assert names[: len(BUILTIN)] == list(BUILTIN)
    assert "hf" in names[len(BUILTIN) : -1]


def test_the_reference_backend_is_asked_last():
    last = load_plugins().hook.create_attention_backend.get_hookimpls()[0]
    assert last.plugin_name == "paged_core.builtin.attention"
    assert last.function.__name__ == "create_reference_backend"


def test_each_engine_has_its_own_plugins():
    asked: list[str] = []
    first = engine_of(Named("mine", asked), attention_backend="auto")
    second = engine_of(attention_backend="auto")
    assert first.attention_backend == "mine"
    assert second.attention_backend != "mine"
    assert asked == ["mine"]


# ---- what goes wrong -------------------------------------------------------------------------------------------


def test_a_misspelt_hook_is_refused_and_the_message_says_where_the_hooks_are_listed():
    class Misspelt:
        @hookimpl
        def on_step_finnished(self, stats):
            pass

    with pytest.raises(PluginError, match=r"on_step_finnished(?s:.*)hookspecs\.py"):
        engine_of(Misspelt())


def test_an_unknown_backend_is_refused_with_its_name_and_the_plugins_that_were_asked():
    with pytest.raises(UnsupportedModel, match=r"'flash'.*paged_core\.builtin\.attention.*hf"):
        engine_of(attention_backend="flash")


def test_an_unknown_policy_is_refused_with_its_name_and_the_plugins_that_were_asked():
    with pytest.raises(PluginError, match=r"'fairest'.*paged_core\.builtin\.scheduling"):
        engine_of(scheduling_policy="fairest")


def test_a_source_that_nobody_can_load_is_refused_with_the_plugins_that_were_asked():
    with pytest.raises(PluginError, match=r"an object of type object.*hf.*paged-core\[hf\]"):
        Engine(object())


# ---- observers, processors, models -----------------------------------------------------------------------------


class Counter:
    def __init__(self) -> None:
        self.added: list[tuple[str, int]] = []
        self.steps: list[int] = []
        self.finished: list[tuple[str, int, str]] = []

    @hookimpl
    def on_request_added(self, request):
        self.added.append((request.id, request.index))

    @hookimpl
    def on_step_finished(self, stats):
        self.steps.append(stats.num_tokens)

    @hookimpl
    def on_request_finished(self, output):
        self.finished.append((output.request.id, output.request.index, str(output.finish_reason)))


def test_observers_hear_of_every_row_once_and_of_every_step_once():
    counter = Counter()
    engine = engine_of(counter)
    engine.add_request("pair", [1, 2, 3], SamplingParams(n=2, temperature=0, max_tokens=4, ignore_eos=True))
    engine.add_request("gone", [4, 5], SamplingParams(max_tokens=50, ignore_eos=True))
    num_steps = 0
    while engine.has_work:
        num_steps += 1
        engine.step()
        if num_steps == 2:
            engine.abort("gone")
    assert counter.added == [("pair", 0), ("pair", 1), ("gone", 0)]
    assert sorted(counter.finished) == [("gone", 0, "abort"), ("pair", 0, "length"), ("pair", 1, "length")]
    assert counter.steps == [5, 3, 2, 2]  # both prompts; three rows; then the pair alone
    assert num_steps == 4


def test_a_request_that_is_refused_is_not_announced():
    counter = Counter()
    engine = engine_of(counter)
    with pytest.raises(ValueError, match="empty"):
        engine.add_request("empty", [])
    assert counter.added == counter.finished == []


def test_a_plugins_logits_processor_changes_the_tokens_of_the_request_it_answered_for_alone():
    class OnlySeven:
        @hookimpl
        def create_logits_processor(self, request):
            def processor(input_ids, scores):
                seen.append(input_ids.tolist()[0])
                scores[:, [token for token in range(VOCAB) if token != 7]] = float("-inf")
                return scores

            return processor if request.id == "short" else None

    seen: list[list[int]] = []
    _, tokens = answer_all(engine_of(OnlySeven()), num_tokens=3)
    assert tokens == truth(3) | {"short": [7, 7, 7]}
    assert seen == [PROMPTS["short"] + [7] * num for num in range(3)]


def test_all_plugins_logits_processors_are_used_after_the_requests_own():
    class Noting:
        def __init__(self, name):
            self.name = name

        @hookimpl
        def create_logits_processor(self):
            return lambda input_ids, scores: calls.append(self.name) or scores

    calls: list[str] = []
    engine = engine_of(Noting("a"), Noting("b"))
    own = SamplingParams(max_tokens=1, logits_processors=[lambda ids, scores: calls.append("own") or scores])
    engine.add_request("r", [1, 2], own)
    run(engine)
    assert calls == ["own", "b", "a"]


def test_a_plugin_loads_what_a_user_names():
    class Zoo:
        @hookimpl
        def load_model(self, source, dtype):
            asked.append((source, dtype))
            return TinyModel() if source == "zoo/tiny" else None

        @hookimpl
        def load_tokenizer(self, source):
            return f"tokenizer of {source}"

    asked: list = []
    config = EngineConfig(num_blocks=64, block_size=4, attention_backend="reference")
    engine = Engine("zoo/tiny", config, plugins=[Zoo()], dtype="float32")
    assert answer_all(engine)[1] == truth()
    assert (asked, engine.tokenizer) == ([("zoo/tiny", "float32")], "tokenizer of zoo/tiny")


def test_hooks_are_asked_while_an_engine_is_built_and_not_in_its_steps():
    class Watching:
        @hookimpl
        def create_attention_backend(self):
            calls.append("backend")

        @hookimpl
        def create_kv_cache(self):
            calls.append("cache")

        @hookimpl
        def create_sampler(self):
            calls.append("sampler")

        @hookimpl
        def create_scheduling_policy(self):
            calls.append("policy")

    calls: list[str] = []
    engine = engine_of(Watching())
    assert sorted(calls) == ["backend", "cache", "policy", "sampler"]
    answer_all(engine)
    assert len(calls) == 4


def test_a_class_or_a_misspelt_parameter_is_refused_as_a_plugin_by_name():
    class Misspelt:
        @hookimpl
        def on_step_finished(self, statistics):
            """The hook's parameter is called stats."""

    with pytest.raises(PluginError, match="'Misspelt' is a class; give an instance"):
        load_plugins([Misspelt])
    with pytest.raises(PluginError, match=r"(?s)'Misspelt' can't be used.*statistics"):
        load_plugins([Misspelt()])


def test_two_plugins_of_one_class_are_two_plugins():
    class Quiet:
        @hookimpl
        def on_step_finished(self, stats):
            """Nothing."""

    manager = load_plugins([Quiet(), Quiet()])
    assert len(manager.hook.on_step_finished.get_hookimpls()) == 2
