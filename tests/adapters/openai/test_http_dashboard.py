"""What is scraped is what the dashboard asks for: our text format, docs/grafana.json, and a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from free_ports import free_ports
from http_server import alphabet_server, until
from places import ROOT

DASHBOARD = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))
EXPRESSIONS: list[str] = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
BODY = {"prompt": "A" * 20, "max_tokens": 5, "ignore_eos": True}
START_LIMIT_S = 120


@pytest.fixture(scope="module")
def scraped() -> str:
    """What /metrics says after a request."""
    with alphabet_server() as server, server.client() as client:
        client.post("/v1/completions", json=BODY).raise_for_status()
        server.come_to_rest()
        return client.get("/metrics").text


def types_of(text: str) -> dict[str, str]:
    """sample name -> counter, gauge or histogram"""
    return {sample.name: family.type for family in text_string_to_metric_families(text) for sample in family.samples}


def names_in(expression: str) -> list[str]:
    return re.findall(r"\b(?:vllm:|paged:|tgi_)\w+", expression)


def complaints(expression: str, types: dict[str, str]) -> list[str]:
    """What is wrong with a query, as far as names and types tell."""
    found = []
    for name in names_in(expression):
        kind = types.get(name)
        rated = f"rate({name}{{" in expression
        if kind is None:
            found.append(f"{name} isn't exported")
        elif rated != (kind in ("counter", "histogram")):
            found.append(f"{name} is a {kind}")
        elif ("histogram_quantile(" in expression) != name.endswith("_bucket"):
            found.append(f"{name} and quantiles don't go together")
    if "histogram_quantile(" in expression and not re.search(r"sum by \(le\)", expression):
        found.append("the buckets' bounds are summed away")
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_query_of_the_dashboard_names_what_is_exported_and_fits_its_type(scraped: str, expression: str) -> None:
    assert names_in(expression)
    assert complaints(expression, types_of(scraped)) == []


@pytest.mark.parametrize(
    "expression",
    [
        "sum(vllm:num_requests_runing{})",
        "rate(vllm:num_requests_running{}[1m])",
        "sum(vllm:generation_tokens_total{})",
        "histogram_quantile(0.5, sum by (le) (rate(vllm:e2e_request_latency_seconds_sum{}[1m])))",
        "histogram_quantile(0.5, sum(rate(vllm:e2e_request_latency_seconds_bucket{}[1m])))",
    ],
)
def test_a_query_that_can_not_work_would_be_found(scraped: str, expression: str) -> None:
    assert len(complaints(expression, types_of(scraped))) == 1


def test_the_dashboard_shows_every_metric_of_ours_and_of_vllms(scraped: str) -> None:
    shown = {name for expression in EXPRESSIONS for name in names_in(expression)}
    families = [family for family in text_string_to_metric_families(scraped) if not family.name.endswith("_created")]
    ours = [family.name for family in families if family.name.startswith(("vllm:", "paged:"))]
    assert len(ours) > 15
    assert [name for name in ours if not any(each.startswith(name) for each in shown)] == []


# What vLLM's published overview dashboard selects by, beside model_name, and the thresholds that it offers.
VLLMS_OVERVIEW = [
    *(("vllm:request_success_total", {"finished_reason": reason}) for reason in ("stop", "length", "abort", "error")),
    *(("vllm:num_requests_waiting_by_reason", {"reason": reason}) for reason in ("capacity", "deferred")),
    *(("vllm:prompt_tokens_by_source_total", {"source": source})
      for source in ("local_compute", "local_cache_hit", "external_kv_transfer")),
    *(("vllm:time_to_first_token_seconds_bucket", {"le": bound})
      for bound in ("0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0", "10.0")),
    *(("vllm:request_time_per_output_token_seconds_bucket", {"le": bound})
      for bound in ("0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.5")),
    ("vllm:external_prefix_cache_hits_total", {}), ("vllm:iteration_tokens_total_bucket", {"le": "+Inf"}),
    ("http_requests_total", {"handler": "/v1/completions", "method": "POST", "status": "2xx"}),
    ("http_request_duration_seconds_count", {"handler": "/v1/completions"}),
]  # fmt: skip


def test_what_vllms_own_dashboard_selects_is_there(scraped: str) -> None:
    samples = [each for family in text_string_to_metric_families(scraped) for each in family.samples]
    for name, labels in VLLMS_OVERVIEW:
        found = [each for each in samples if each.name == name and labels.items() <= each.labels.items()]
        assert len(found) == 1, (name, labels)
        assert name.startswith("http_") or found[0].labels["model_name"] == "alphabet"


def test_paths_and_methods_that_clients_make_up_are_no_series_of_their_own() -> None:
    with alphabet_server() as server, server.client() as client:
        for path in ("/v1/responses/resp_1", "/v1/responses/resp_2", "/a", "/b"):
            client.get(path)
        client.request("PROPFIND", "/c")
        client.get("/health")
        families = text_string_to_metric_families(client.get("/metrics").text)
        (requests,) = [family for family in families if family.name == "http_requests"]
    found = {(each.labels["handler"], each.labels["method"]): each.value
             for each in requests.samples if each.name == "http_requests_total"}  # fmt: skip
    assert found == {("/v1/responses/{response_id}", "GET"): 2, ("none", "GET"): 2, ("none", "other"): 1}


def test_every_query_can_be_narrowed_to_a_model_and_a_replica() -> None:
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert {"model", "replica"} <= names
    selectors = [found for expression in EXPRESSIONS for found in re.findall(r"{(.*?)}", expression)]
    assert [each for each in selectors if not ('model_name=~"$model"' in each and 'replica=~"$replica"' in each)] == []


def test_panels_have_places_and_numbers_of_their_own() -> None:
    for key in ("id", "gridPos", "title"):
        values = [json.dumps(panel[key]) for panel in DASHBOARD["panels"]]
        assert len(set(values)) == len(values)


@pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool here (Debian: apt-get install prometheus)")
def test_promtool_can_read_what_is_scraped(scraped: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=scraped, capture_output=True, text=True, timeout=60)
    assert "error while linting" not in done.stderr and done.returncode in (0, 3), done.stderr  # 3: matters of style


@pytest.mark.skipif(PROMETHEUS is None, reason="there is no Prometheus here (Debian: apt-get install prometheus)")
def test_a_real_prometheus_scrapes_the_server_and_answers_every_query_of_the_dashboard(tmp_path: Path) -> None:
    assert PROMETHEUS is not None
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    with alphabet_server() as server, server.client() as client:
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "ours", "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}]}],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML too
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [PROMETHEUS, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
                 f"--web.listen-address={address}"], stdout=log, stderr=log,
            )  # fmt: skip
        try:
            with httpx2.Client(base_url=f"http://{address}", timeout=30, trust_env=False) as prometheus:

                def asked(expression: str) -> list[Any]:
                    try:
                        answer = prometheus.get("/api/v1/query", params={"query": expression})
                    except httpx2.TransportError:
                        assert process.poll() is None, (tmp_path / "log").read_text()
                        return []
                    assert answer.status_code in (200, 503), answer.text  # 503 while it starts
                    return answer.json()["data"]["result"] if answer.status_code == 200 else []

                until(lambda: asked('up{job="ours"} == 1'), START_LIMIT_S)
                client.post("/v1/completions", json={**BODY, "n": 2}).raise_for_status()
                server.come_to_rest()
                until(lambda: asked("vllm:generation_tokens_total >= 10"), START_LIMIT_S)
                for expression in EXPRESSIONS:
                    concrete = expression.replace("$__rate_interval", "1m")
                    concrete = concrete.replace("$model", ".*").replace("$replica", ".*")
                    until(lambda query=concrete: asked(query), START_LIMIT_S)
        finally:
            process.terminate()
            process.wait(60)
