"""Who is let in: keys, and browsers' pages by their origins."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from alphabet_model import AlphabetModel
from http_server import Running, alphabet_server
from paged_core import ConfigError
from paged_openai.app import AppOptions
from paged_openai.keys import read_keys


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer firs", "Bearer first2", "Basic first", "first"])
def test_without_a_key_nobody_is_let_in(guarded: Running, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    with guarded.client(headers=headers) as client:
        refused = client.post("/v1/completions", json={"prompt": "A"})
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["type"] == "authentication_error"
        assert client.post("/generate", json={"inputs": "A"}).json()["error_type"] == "authentication"
        assert client.get("/v1/models").status_code == client.get("/nowhere").status_code == 401


def test_each_key_lets_in_and_probes_need_none(guarded: Running) -> None:
    for key in ("first", "second"):
        with guarded.client(headers={"Authorization": f"bearer {key}"}) as client:
            assert client.get("/v1/models").status_code == 200
    with guarded.client() as client:
        assert [client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3


def test_keys_come_from_a_file(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nabc \nxyz\n")
    assert read_keys(file) == ["abc", "xyz"]
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        read_keys(file)
    with pytest.raises(ConfigError, match="can't be read"):
        read_keys(tmp_path / "missing")


def test_pages_may_call_only_from_origins_that_were_named(guarded: Running) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with guarded.client() as client:
        good = client.options("/v1/completions", headers={"Origin": "https://page.example", **asks})
        assert good.headers["access-control-allow-origin"] == "https://page.example"
        bad = client.options("/v1/completions", headers={"Origin": "https://other.example", **asks})
        assert "access-control-allow-origin" not in bad.headers
    with alphabet_server() as server, server.client() as client:
        plain = client.get("/health", headers={"Origin": "https://page.example"})
        assert "access-control-allow-origin" not in plain.headers


OWN = "http://{host}"
CALLERS = [
    ({"Origin": OWN}, 200),
    ({"Origin": "https://named.example"}, 200),
    ({"Origin": "https://named.example", "Sec-Fetch-Site": "cross-site"}, 200),
    ({"Origin": "https://public.example", "Sec-Fetch-Site": "same-origin"}, 200),  # a proxy calls us by another name
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": OWN, "Sec-Fetch-Site": "same-site"}, 403),
    ({}, 200),  # no browser
]


def test_without_keys_only_pages_of_known_origins_may_have_a_browser_call() -> None:
    steps: list[object] = []
    options = AppOptions(cors_origins=("https://named.example",))
    with alphabet_server(AlphabetModel(steps.append), options=options) as server, server.client() as client:
        for headers, status in CALLERS:
            headers = {name: value.format(host=f"127.0.0.1:{server.port}") for name, value in headers.items()}
            for path in ("/v1/completions", "/generate", "/tokenize"):
                plain = {"content-type": "text/plain", **headers}  # browsers ask nobody before they send this
                content = b'{"prompt": "A"}' if path == "/v1/completions" else b'{"inputs": "A"}'
                steps.clear()
                answer = client.post(path, content=content, headers=plain)
                assert answer.status_code == status, (headers, path)
                assert bool(steps) == (status == 200 and path != "/tokenize")
                assert status == 200 or "--cors-origin" in answer.text
            assert client.get("/v1/models", headers=headers).status_code == 200, "the browser hides the answer"


def test_with_keys_the_key_decides(friend: httpx2.Client) -> None:
    foreign = {"Origin": "app://desktop"}
    assert friend.post("/generate", json={"inputs": "A"}, headers=foreign).status_code == 200
