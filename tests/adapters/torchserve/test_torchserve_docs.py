"""docs/torchserve.md says what there is: every option, every setting, every metric, every route."""

from __future__ import annotations

import argparse

import yaml

from paged_torchserve import bodies, commands, metrics, settings
from places import ROOT

PAGE = (ROOT / "docs" / "torchserve.md").read_text(encoding="utf-8")


def test_every_option_of_serve_and_every_setting_is_explained() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    commands._add_serve(parser)
    options = [option for action in parser._actions for option in action.option_strings]
    assert len(options) > 8
    assert [name for name in [*options, *settings.known_keys()] if f"`{name}" not in PAGE] == []


def test_every_metric_and_every_route_is_listed() -> None:
    pairs = {name.removesuffix("_count") for name in metrics.NAMES}
    assert [name for name in pairs if f"`{name}" not in PAGE] == []
    assert [route for route in bodies._ROUTES if f"/{route}`" not in PAGE] == []


def test_the_configuration_shown_is_one_that_works() -> None:
    shown = yaml.safe_load(PAGE.split("```yaml\n")[1].split("```")[0])
    assert settings.read_settings(shown).max_new_tokens == 100
    assert shown["continuousBatching"] is True
