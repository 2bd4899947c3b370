"""docs/serving.md says what there is: every option, every route, every metric."""

from __future__ import annotations

import argparse

from prometheus_client.parser import text_string_to_metric_families

from http_server import alphabet_server
from paged_openai.commands import add_options
from places import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_every_option_is_explained() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    spelt = {option for action in parser._actions for option in action.option_strings if _is_anothers(action)}
    options = [option for action in parser._actions for option in action.option_strings if option not in spelt]
    assert {"--enforce-eager", "--revision", "--enable-auto-tool-choice"} <= spelt
    assert len(options) > 30
    assert [option for option in options if f"`{option}`" not in PAGE] == []


def _is_anothers(action: argparse.Action) -> bool:
    """Return whether it is one of vLLM's spellings. Help and the page have those that do something."""
    return action.help is argparse.SUPPRESS or (action.help or "").startswith("our ")


def test_every_route_and_every_metric_is_listed() -> None:
    with alphabet_server() as server, server.client() as client:
        text = client.get("/metrics").text
        paths = [
            route.path.replace("{name:path}", "NAME").replace("{response_id}", "ID")
            for route in server.server.config.app.routes
        ]
    assert len(paths) > 8
    assert [path for path in paths if f" {path}`" not in PAGE] == []
    names = [family.name for family in text_string_to_metric_families(text) if not family.name.endswith("_created")]
    assert [name for name in names if f"`{name}" not in PAGE] == []
