"""The page as a person uses it: a real Chromium, a real server, keys and eyes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from alphabet_model import AlphabetModel, Gate
from browser import CHROMIUM, Browser
from http_server import Running, alphabet_server, until
from paged_core import EngineConfig
from paged_openai.app import AppOptions
from paged_serving import RequestLimits

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)")

CONNECTED = "document.querySelector('#state').textContent === 'connected'"
ANSWER = "document.querySelector('#log .assistant:last-child')"


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    shared_browser.open("about:blank")
    shared_browser.complaints.clear()
    yield shared_browser
    assert shared_browser.complaints == []


def visit(browser: Browser, server: Running) -> None:
    browser.open(server.url + "/")
    browser.until(CONNECTED)


def test_an_answer_streams_in_and_the_next_question_continues_the_chat(browser: Browser, gate: Gate) -> None:
    prompts: list[list[int]] = []

    def noted(token_ids: list[int]) -> None:
        if len(token_ids) > 1:
            prompts.append(token_ids)
        gate(token_ids)

    gate.shuts_at = 11
    with alphabet_server(AlphabetModel(noted)) as server:
        visit(browser, server)
        assert browser.evaluate("document.activeElement.id") == "text", "one can type at once"
        browser.type("AB")
        browser.press("Enter")
        until(lambda: gate.num_steps > 10)
        browser.until(f"{ANSWER}?.innerText.length > 3")
        assert browser.text("#log .user") == "AB"
        assert browser.text("#log .assistant").startswith(";<=>"), "what comes after the template's last character"
        assert not browser.evaluate("document.querySelector('#stop').disabled"), "it is still on its way"
        gate.open()
        browser.until(f"{ANSWER}.querySelector('small')")
        assert "tokens, the first after" in browser.text("#log .assistant small")
        browser.evaluate("document.querySelector('#tokens').value = 9")
        browser.type("next")
        browser.press("Enter")
        browser.until(f"{ANSWER}.previousSibling.innerText === 'next' && {ANSWER}.querySelector('small')")
        assert "9 tokens, the first after " in browser.text("#log .assistant:last-child small")
        second = "".join(chr(32 + token) for token in prompts[-1])
        assert "next" in second and ";<=>" in second, "the model is told what it has said"
        server.come_to_rest()


def test_escape_stops_an_answer_and_its_blocks_are_given_back(browser: Browser, gate: Gate) -> None:
    with alphabet_server(AlphabetModel(gate)) as server:
        visit(browser, server)
        gate.shut()
        browser.type("AB")
        browser.press("Enter")
        until(lambda: gate.num_steps > 0)
        browser.press("Escape")
        browser.until(f"{ANSWER}.querySelector('small')?.textContent === 'stopped'")
        server.wait_until_told_to_cancel()
        gate.open()
        server.come_to_rest()
        with server.client() as client:
            assert (
                'request_success_total{engine="0",finished_reason="abort",model_name="alphabet"} 1.0'
                in client.get("/metrics").text
            )
        assert browser.evaluate("messages.length") == 0, "a question without an answer is forgotten"


def test_what_the_server_refuses_is_told_as_it_says_it(browser: Browser) -> None:
    with alphabet_server(limits=RequestLimits(max_tokens=5)) as server:
        visit(browser, server)
        browser.type("AB")
        browser.press("Enter")
        browser.until(f"{ANSWER}?.querySelector('[role=alert]')")
        assert "max_tokens" in browser.text("#log .error")
        browser.evaluate("document.querySelector('#tokens').value = 3")
        browser.type("CD")
        browser.press("Enter")
        browser.until(f"{ANSWER}.innerText.startsWith(';<=')")
    assert browser.complaints == ["Failed to load resource: the server responded with a status of 400 (Bad Request)"]
    browser.complaints.clear()


def test_markup_in_a_chat_is_text_and_foreign_scripts_dont_run(browser: Browser) -> None:
    with alphabet_server() as server:
        visit(browser, server)
        hostile = "<img src=x onerror='window.hit = 1'><script>window.hit = 1</script>"
        browser.type(hostile)
        browser.press("Enter")
        browser.until(f"{ANSWER}?.querySelector('small')")
        assert browser.text("#log .user") == hostile
        assert browser.complaints == []
        browser.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'hit = 1'}))")
        assert browser.evaluate("typeof window.hit") == "undefined"
    assert ["Content Security Policy" in complaint for complaint in browser.complaints] == [True]
    browser.complaints.clear()


def test_a_server_with_keys_asks_for_one_and_keeps_it_for_the_tab(browser: Browser) -> None:
    with alphabet_server(options=AppOptions(api_keys=("secret",))) as server:
        browser.open(server.url + "/")
        browser.until("document.querySelector('#state').textContent === 'this server wants an API key'")
        assert browser.evaluate("document.querySelector('#running').textContent") == "–"
        for given, told in (("wrong", "this key isn't known here"), ("secret", "connected")):
            browser.evaluate("document.querySelector('#key').select()")
            browser.type(given)
            browser.press("Enter")
            browser.until(f'document.querySelector("#state").textContent === "{told}"')
        assert browser.evaluate("document.querySelector('#keyform').hidden")
        visit(browser, server)
        browser.type("AB")
        browser.press("Enter")
        browser.until(f"{ANSWER}?.querySelector('small')")
        assert browser.text("#log .assistant").startswith(";<=>")
    assert all("401" in complaint for complaint in browser.complaints)
    browser.complaints.clear()


def test_the_block_map_and_the_charts_show_what_runs_and_what_is_shared(browser: Browser) -> None:
    body = {"prompt": "A" * 20, "max_tokens": 200, "ignore_eos": True, "n": 3}
    seen = threading.Event()

    def slowly(_: list[int]) -> None:
        seen.wait(0 if seen.is_set() else 0.1)

    with alphabet_server(AlphabetModel(slowly)) as server, ThreadPoolExecutor(1) as pool, server.client() as client:
        visit(browser, server)
        answer = pool.submit(client.post, "/v1/completions", json=body)
        browser.until("document.querySelector('#shared').textContent === '2'")
        assert browser.evaluate("""(() => {
            const i = latest.blocks.shared.indexOf(1), {side, columns} = grid, scale = devicePixelRatio;
            const pixel = $("map").getContext("2d").getImageData(
                ((i % columns) + 0.3) * side * scale, (Math.floor(i / columns) + 0.3) * side * scale, 1, 1);
            return [...pixel.data.slice(0, 3)].join() === rgb("shared").join();
        })()""")
        assert browser.text("#running").startswith("3 of ")
        assert "Sharing saves 4." in browser.text("#note")
        seen.set()
        assert answer.result(30).status_code == 200
        browser.until("document.querySelector('#shared').textContent === '0'")
        assert browser.evaluate("[Math.max(...samples.running), samples.running.at(-1)]") == [3, 0]
        assert browser.evaluate("Math.max(...samples.usage) > 0 && samples.usage.at(-1) === 0")


def test_a_pool_of_very_many_blocks_is_drawn_in_cells_of_several(browser: Browser) -> None:
    config = EngineConfig(num_blocks=5000, block_size=4, attention_backend="reference")
    with alphabet_server(config=config) as server:
        visit(browser, server)
        assert browser.text("#note") == "5,000 blocks of 4 tokens, 3 in a cell."
        assert browser.text("#free") == "5,000"
        assert browser.evaluate("$('map').clientHeight") < 400


LAYOUT = """(() => {
    const tops = (selector) => [...document.querySelectorAll(selector)].map((each) => each.getBoundingClientRect().top);
    const light = (name) => rgb(name).map((value) => value / 255)
        .map((value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0.05);
    const contrast = (a, b) => Math.max(light(a), light(b)) / Math.min(light(a), light(b));
    return {
        sticks_out: document.documentElement.scrollWidth > innerWidth,
        buttons: new Set(tops(".buttons button")).size,
        parted: [...document.querySelectorAll("#ask .row label")].filter((label) => {
            const [whole, box] = [label, label.querySelector("input")].map((each) => each.getBoundingClientRect());
            return whole.height > 1.5 * box.height;
        }).length,
        free: contrast("free", "card"), cached: contrast("cached", "free"), used: contrast("used", "free"),
        back: getComputedStyle(document.body).backgroundColor,
    };
})()"""


def test_the_page_holds_together_in_both_widths_and_both_colour_schemes(browser: Browser) -> None:
    with alphabet_server() as server:
        visit(browser, server)
        backs = set()
        for width, height in ((380, 700), (1280, 900)):
            browser.resize(width, height)
            for dark in (False, True):
                browser.dark(dark)
                seen = browser.evaluate(LAYOUT)
                backs.add(seen["back"])
                assert not seen["sticks_out"], (width, dark)
                assert seen["buttons"] == 1, "no button stands alone on a line"
                assert seen["parted"] == 0, "each label stands beside its box"
                assert seen["free"] > 1.35, "free cells are seen"
                assert min(seen["cached"], seen["used"]) > 1.35, "and told from others"
        browser.dark(False)
        assert len(backs) == 2
        assert browser.evaluate("document.documentElement.scrollHeight <= 900"), "all is seen at once"
        browser.resize(1280, 800)


def test_in_a_long_chat_the_newest_and_what_is_written_next_stay_in_view(browser: Browser) -> None:
    with alphabet_server() as server:
        visit(browser, server)
        for width, height in ((380, 700), (1280, 900)):
            browser.resize(width, height)
            bottoms = browser.evaluate("""(() => {
                for (let i = 0; i < 40; i++) add("user", "A long chat.");
                return [$("log").lastChild, $("send")].map((each) => each.getBoundingClientRect().bottom);
            })()""")
            assert bottoms[0] < bottoms[1] <= height, (width, bottoms)
        browser.resize(1280, 800)


MARKDOWN = (
    "# T\n\none **two** *three* `f(<b>)`\n\n- a\n- b\n\n3. c\n\n"
    "```py\nx < y\n```\n[l](https://a.b/?c) [m](javascript:1)"
)


def test_markdown_becomes_elements_and_never_html(browser: Browser) -> None:
    with alphabet_server() as server:
        visit(browser, server)
        html = browser.evaluate(f"markdown({json.dumps(MARKDOWN)}).map((each) => each.outerHTML).join('')")
    assert html == (
        "<h3>T</h3><p>one <strong>two</strong> <em>three</em> <code>f(&lt;b&gt;)</code></p>"
        '<ul><li>a</li><li>b</li></ul><ol start="3"><li>c</li></ol><pre><code>x &lt; y</code></pre>'
        '<p><a href="https://a.b/?c" target="_blank" rel="noopener noreferrer">l</a> [m](javascript:1)</p>'
    )


def test_a_system_prompt_is_told_and_an_answer_that_is_cut_is_marked(browser: Browser) -> None:
    prompts: list[str] = []

    def noted(token_ids: list[int]) -> None:
        prompts.append("".join(chr(32 + token) for token in token_ids))

    with alphabet_server(AlphabetModel(noted)) as server:
        visit(browser, server)
        browser.evaluate("$('system').value = 'Be kind.', $('tokens').value = 3")
        browser.type("AB")
        browser.press("Enter")
        browser.until(f"{ANSWER}?.querySelector('.cut')")
        assert browser.text("#log .assistant small").startswith("cut at the limit")
        assert any("Be kind." in prompt for prompt in prompts)
        browser.until("Number($('rate-chart').dataset.top) >= 1")
        assert browser.evaluate("[percent(0), percent(0.0004), percent(0.05), percent(0.5)]") == [
            "0 %", "< 0.1 %", "5.0 %", "50 %",
        ]  # fmt: skip


def test_calls_and_thoughts_are_folded_and_what_is_written_next_is_the_tools_answer(browser: Browser) -> None:
    with alphabet_server() as server:
        visit(browser, server)
        told = browser.evaluate("""(() => {
            const said = new Said(add("assistant"));
            said.add({delta: {reasoning_content: "hm"}});
            said.add({delta: {tool_calls: [{index: 0, id: "c", function: {name: "weather", arguments: "{"}}]}});
            said.add({delta: {tool_calls: [{index: 0, function: {arguments: "}"}}]}, finish_reason: "tool_calls"});
            said.show();
            messages.push(said.message);
            return [[...document.querySelectorAll("#log details")].map((each) => [each.open, each.textContent]),
                    asked("rain"), said.message];
        })()""")
    folds, answer, message = told
    assert folds == [[False, "Thoughtshm"], [False, "Calls weather{}"]]
    assert answer == [{"role": "tool", "tool_call_id": "c", "content": "rain"}]
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    assert message == {"role": "assistant", "content": None, "tool_calls": [call]}


def test_behind_a_prefix_the_page_finds_its_server(browser: Browser) -> None:
    with alphabet_server(options=AppOptions(root_path="/llm")) as server:
        for path in ("/llm", "/llm/"):
            browser.open(server.url + path)
            browser.until(CONNECTED)
        browser.type("AB")
        browser.press("Enter")
        browser.until(f"{ANSWER}?.querySelector('small')")
        assert browser.text("#log .assistant").startswith(";<=>")


def test_everything_can_be_reached_by_keyboard_and_no_longer_answer_outlives_a_new_chat(
    browser: Browser, gate: Gate
) -> None:
    with alphabet_server(AlphabetModel(gate)) as server:
        visit(browser, server)
        browser.type("AB")
        reached = []
        for _ in range(4):
            browser.press("Tab")
            reached.append(browser.evaluate("document.activeElement.id"))
        assert reached == ["tokens", "temperature", "fresh", "send"], "Stop has nothing to stop"
        gate.shut()
        browser.press("Enter")
        until(lambda: gate.num_steps > 0)
        browser.evaluate("$('fresh').focus()")
        browser.press("Enter")
        gate.open()
        server.come_to_rest()
        assert browser.evaluate("[$('log').children.length, messages.length, $('send').disabled]") == [0, 0, False]
        assert browser.evaluate("document.activeElement.id") == "text"
