"""deploy/: what can be told without Docker and systemd: paths, ports, options and times that must agree."""

from __future__ import annotations

import argparse
import configparser
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from http_server import alphabet_server
from paged_openai.commands import add_options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def defaults() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return vars(parser.parse_args([]))


def dockerfile() -> str:
    return (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return found


def test_the_image_has_all_that_the_package_is_built_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    copied = [source for line in re.findall(r"(?m)^COPY (.+)$", dockerfile()) for source in line.split()[:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    needed = [*project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], project["project"]["readme"]]
    assert [path for path in needed if not any(path == whole or path.startswith(whole + "/") for whole in copied)] == []
    (extras,) = re.findall(r"/src\[([a-z,]+)\]", dockerfile())
    assert set(extras.split(",")) < set(project["project"]["optional-dependencies"])


def test_the_source_distribution_has_what_make_runs_and_the_wheel_says_that_it_is_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    used = re.findall(r"\s(?:@sh|-c) (\w[\w./-]*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {"scripts/check-python.sh", "constraints.txt"} <= set(used)
    assert [path for path in used if path.split("/")[0] not in included] == []
    assert (ROOT / "paged_core" / "py.typed").is_file()  # the packages are taken whole


def test_the_image_listens_where_it_says() -> None:
    assert f"EXPOSE {defaults()['port']}\n" in dockerfile()
    assert f"127.0.0.1:{defaults()['port']}/health" in dockerfile()
    assert 'ENTRYPOINT ["paged", "serve", "--host", "0.0.0.0"]' in dockerfile()


def test_what_is_to_be_copied_lets_only_this_machine_in() -> None:
    commands = [line for line in dockerfile().splitlines() if "docker run" in line]
    published = [found for line in commands for found in re.findall(r"-p (\S+)", line)]
    published += [port for service in compose()["services"].values() for port in service.get("ports", ())]
    assert len(published) == 4
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_every_image_has_a_version() -> None:
    bases = [service["image"] for service in compose()["services"].values() if "image" in service]
    bases += re.findall(r"(?m)BASE=(\S+)", dockerfile())
    assert len(bases) == 4
    assert [base for base in bases if not re.search(r":v?\d+\.\d+", base)] == []


@pytest.mark.parametrize("certificate", [None, ROOT / "tests" / "adapters" / "loopback.pem"])
def test_the_images_health_check_asks_where_it_is_told_to(certificate: Path | None) -> None:
    (command,) = re.findall(r"(?m)^HEALTHCHECK .*CMD (\[.*\])$", dockerfile().replace("\\\n", ""))
    program = [sys.executable, *json.loads(command)[1:]]

    def status(port: int, scheme: str) -> int:
        environment = {"HEALTH_URL": f"{scheme}://127.0.0.1:{port}/health", "NO_PROXY": "127.0.0.1"}
        return subprocess.run(program, env=environment, capture_output=True, timeout=60).returncode

    tls = {} if certificate is None else {"ssl_certfile": certificate}
    with alphabet_server(**tls) as server:
        assert status(server.port, "https" if tls else "http") == 0
        server.engine.close()
        assert status(server.port, "https" if tls else "http") != 0
    assert f"ENV HEALTH_URL=http://127.0.0.1:{defaults()['port']}/health\n" in dockerfile()


def test_the_unit_gives_requests_the_time_that_the_server_gives_them() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "paged-core.service", encoding="utf-8")
    service = unit["Service"]
    assert shlex.split(service["ExecStart"])[1:] == ["serve", "$MODEL", "$OPTIONS"]
    assert int(service["TimeoutStopSec"]) > defaults()["shutdown_timeout"]
    assert service["CacheDirectory"] == "paged-core" and service["Environment"] == "HOME=%C/paged-core"


def test_the_services_of_the_compose_file_find_each_other_and_their_files() -> None:
    services = compose()["services"]
    build = services["paged-core"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    assert int(services["paged-core"]["stop_grace_period"].removesuffix("s")) > defaults()["shutdown_timeout"]
    mounts = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    assert [name for name in mounts if name[0] == "." and not (DEPLOY / name).exists()] == []
    assert {name for name in mounts if name[0] != "."} == set(compose()["volumes"])
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    assert scraped["scrape_configs"][0]["static_configs"][0]["targets"] == [f"paged-core:{defaults()['port']}"]
    sources = yaml.safe_load((DEPLOY / "grafana.yml").read_text(encoding="utf-8"))["datasources"]
    assert [source["url"] for source in sources] == ["http://prometheus:9090"]
    assert {"paged-core", "prometheus"} < set(services)
    (provider,) = yaml.safe_load((DEPLOY / "dashboards.yml").read_text(encoding="utf-8"))["providers"]
    targets = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert [Path(target).name for target in targets if target.startswith(provider["options"]["path"])] == [
        "paged-core.json"
    ]
