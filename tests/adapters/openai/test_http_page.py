"""The page for browsers, without a browser: who gets it, what it may do, and the numbers it draws.

test_http_browser.py uses it as a person would, where there is a Chromium.
"""

from __future__ import annotations

import argparse
import re
import threading
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import paged_openai.page
from alphabet_model import AlphabetModel
from http_server import Running, alphabet_server, until
from paged_openai.app import AppOptions
from paged_openai.commands import add_options
from paged_openai.serving import _app_options

HTML = Path(paged_openai.page.__file__).with_name("page.html").read_text(encoding="utf-8")
AS_BROWSERS_ASK = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
LONG: dict[str, Any] = {"prompt": "A" * 20, "max_tokens": 200, "ignore_eos": True, "temperature": 0}


# ---- who gets it ---------------------------------------------------------------------------------------------------


def test_a_browser_gets_the_page_and_a_tgi_client_its_answer_at_the_same_path() -> None:
    with alphabet_server() as server, server.client() as client:
        page = client.get("/", headers=AS_BROWSERS_ASK)
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert page.text == HTML
        assert client.head("/", headers=AS_BROWSERS_ASK).status_code == 200
        assert client.get("/").status_code == 405, "who wants no page is told as before"
        assert client.delete("/").status_code == 405
        answer = client.post("/", json={"inputs": "A", "parameters": {"max_new_tokens": 2}})
        assert answer.json() == [{"generated_text": "BC"}]


def test_with_keys_the_page_is_open_and_everything_that_it_shows_is_not() -> None:
    with alphabet_server(options=AppOptions(api_keys=("secret",))) as server, server.client() as client:
        assert client.get("/", headers=AS_BROWSERS_ASK).text == HTML, "it has the field for the key"
        assert client.post("/", json={"inputs": "A"}).status_code == 401
        assert client.get("/live").status_code == 401
        assert client.get("/live", headers={"authorization": "Bearer secret"}).status_code == 200


def test_no_page_takes_the_page_and_its_numbers_away() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = [_app_options(parser.parse_args(given)) for given in ([], ["--no-page"])]
    assert [each.page for each in options] == [True, False]
    with alphabet_server(options=options[1]) as server, server.client() as client:
        assert client.get("/", headers=AS_BROWSERS_ASK).status_code == 405
        assert client.get("/live").status_code == 404
        assert client.post("/", json={"inputs": "A"}).status_code == 200


# ---- what it may do ------------------------------------------------------------------------------------------------


def test_only_the_pages_own_script_and_style_may_run_and_only_its_server_be_called() -> None:
    with alphabet_server() as server, server.client() as client:
        headers = client.get("/", headers=AS_BROWSERS_ASK).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_nothing_from_elsewhere_and_writes_no_markup() -> None:
    assert re.findall(r"(?:https?:)?//[a-z]", HTML) == []
    assert re.findall(r'\b(?:src|href)=(?!"data:,")', HTML) == []
    assert re.findall(r"\son[a-z]+=|\sstyle=|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", HTML) == []
    assert "\r" not in HTML, "browsers make it a line feed, and then the hash is another"


def test_the_script_and_the_markup_mean_the_same_elements() -> None:
    ids = re.findall(r'\bid="([^"]+)"', HTML)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([^"]+)"\)', HTML)) <= set(ids)
    assert set(re.findall(r'\bfor="([^"]+)"', HTML)) <= set(ids)
    assert {"cached", "used", "shared", "free"} <= set(ids), "a count for each state"


def ids_in(markup: str) -> list[str]:
    return re.findall(r'\bid="([^"]+)"', markup)


def test_everything_on_the_page_has_a_name_for_those_who_dont_see_it() -> None:
    labelled = set(re.findall(r'<label for="([^"]+)"', HTML))
    labelled |= {name for inside in re.findall(r"<label>[^<]+(<input[^>]*>)</label>", HTML) for name in ids_in(inside)}
    for tag in re.findall(r"<(?:input|textarea|canvas)[^>]*>", HTML):
        [name] = ids_in(tag)
        assert name in labelled or "aria-label" in tag, tag
    assert '<html lang="en">' in HTML


def test_every_route_that_the_page_calls_is_there() -> None:
    called = [f"/{path}" for path in re.findall(r'fetch\(BASE \+ "([^"]+)"', HTML)]
    assert len(called) == HTML.count("fetch("), "all of them where the page is"
    with alphabet_server() as server:
        paths = {route.path for route in server.server.config.app.routes}
    assert sorted(called) == ["/live", "/v1/chat/completions"]
    assert set(called) <= paths


# ---- what it draws -------------------------------------------------------------------------------------------------


def looked(server: Running) -> dict[str, Any]:
    with server.client() as client:
        response = client.get("/live")
    assert (response.status_code, response.headers["cache-control"]) == (200, "no-store")
    body: dict[str, Any] = response.json()
    return body


def test_before_anything_was_asked_all_blocks_are_free() -> None:
    with alphabet_server() as server:
        live = looked(server)
    nothing = [0] * 512
    assert live == {
        "model": "alphabet", "running": 0, "waiting": 0, "max_running": server.service.max_open - 100,
        "block_size": server.engine.engine.sizes.block_size, "saved": 0,
        "blocks": {"num": 512, "per_cell": 1, "cached": nothing, "used": nothing, "shared": nothing},
        "tiers": [], "loaded": 0, "generated": 0,
    }  # fmt: skip


def test_requests_with_a_common_prompt_are_seen_to_share_its_blocks() -> None:
    watched = threading.Event()

    def slowly(_: list[int]) -> None:
        watched.wait(0 if watched.is_set() else 0.05)

    with alphabet_server(AlphabetModel(slowly)) as server, ThreadPoolExecutor(1) as pool, server.client() as client:
        answer = pool.submit(client.post, "/v1/completions", json={**LONG, "n": 3, "temperature": 1})
        seen: list[dict[str, Any]] = []

        def together() -> bool:
            seen.append(looked(server))
            return seen[-1]["running"] == 3 and sum(seen[-1]["blocks"]["shared"]) == 2

        until(together)  # 20 tokens fill two blocks of 8; the third is shared until somebody writes to it
        watched.set()
        blocks = seen[-1]["blocks"]
        assert seen[-1]["saved"] == 4, "three have them"
        assert sum(blocks["used"]) >= 3
        assert answer.result(30).status_code == 200
        server.come_to_rest()


def test_all_who_watch_share_a_look_at_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_openai.page, "_FRESH_S", 1000.0)
    with alphabet_server() as server, ThreadPoolExecutor(8) as pool:
        looks: list[Any] = []
        look = server.engine.look
        monkeypatch.setattr(server.engine, "look", lambda function: (looks.append(function), look(function))[1])
        bodies = list(pool.map(lambda _: looked(server), range(24)))
    assert len(looks) == 1
    assert all(body == bodies[0] for body in bodies)


def test_a_later_look_is_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_openai.page, "_FRESH_S", 0.0)
    with alphabet_server() as server, server.client() as client:
        assert sum(looked(server)["blocks"]["cached"]) == 0
        client.post("/v1/completions", json={**LONG, "max_tokens": 1}).raise_for_status()
        until(lambda: sum(looked(server)["blocks"]["cached"]) > 0)


def test_a_dead_engine_is_told_to_who_looks() -> None:
    with alphabet_server() as server, server.client() as client:
        server.engine.close()
        refused = client.get("/live")
        assert refused.status_code == 503
        assert refused.json()["error"]
