"""``paged ray serve`` where it can't serve: a sentence that names the way out. No cluster is started for it."""

from __future__ import annotations

import socket
import sys

import pytest

from free_ports import free_ports
from paged_ray import commands

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, when it is imported


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert commands.main(["serve", "a-model", *options]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_without_ray_the_extra_is_named(capsys, monkeypatch):
    for name in [each for each in sys.modules if each.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "paged_ray.serving", raising=False)
    monkeypatch.delattr("paged_ray.serving", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refusal(capsys).endswith("Ray Serve needs more: pip install 'paged-core[ray]'")


def test_a_port_in_use_is_told_before_anything_starts(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refusal(capsys, "--port", str(port))
    assert told.startswith(f"paged_ray: the server can't listen on 127.0.0.1, port {port}: ")
    assert told.endswith("choose another")


def test_where_no_cluster_answers_the_option_is_named_at_once(capsys):
    (port,) = free_ports(1)
    told = refusal(capsys, "--address", f"127.0.0.1:{port}")
    assert told.startswith(f"paged_ray: no Ray cluster answers at 127.0.0.1:{port}: ")
    assert told.endswith("leave --address out to start one")
