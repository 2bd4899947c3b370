"""The `paged` command: what it prints, and how it fails."""

import io
import socket
import subprocess
import sys

import pytest

import paged_core
from paged_core import ConfigError, InvalidRequestError, PluginError, cli, hookimpl
from paged_core.plugins import load_plugins


class Commands:
    """A plugin with a command for each way to end."""

    @hookimpl
    def register_commands(self, commands):
        fine = commands.add_parser("greet", help="say hello")
        fine.add_argument("name")
        fine.set_defaults(run=lambda args: print(f"hello {args.name}"))
        commands.add_parser("seven").set_defaults(run=lambda args: 7)
        for name, error in [
            ("broken", PluginError("no plugin answered; install one")),
            ("refused", InvalidRequestError("top_p is 2; it must be a number from 0 to 1")),
            ("stopped", KeyboardInterrupt()),
            ("bare", ModuleNotFoundError("No module named 'gguf'", name="gguf")),
            ("archiving", ModuleNotFoundError("No module named 'yaml'", name="yaml.nodes")),
            ("puzzled", ImportError("Please install what it takes to read this.")),
        ]:
            commands.add_parser(name).set_defaults(run=raiser(error))


def raiser(error):
    def run(args):
        raise error

    return run


@pytest.fixture
def with_commands(monkeypatch):
    monkeypatch.setattr(cli, "load_plugins", lambda **more: load_plugins([Commands()], **more))


def test_the_version_is_printed():
    result = subprocess.run(
        [sys.executable, "-m", "paged_core", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == f"paged-core {paged_core.__version__}"


def test_plugins_are_listed_with_where_they_come_from_and_what_they_answer(capsys):
    assert cli.main(["plugins"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "built in" in lines["paged_core.builtin.attention"]
    assert "create_attention_backend" in lines["paged_core.builtin.attention"]
    assert f"paged-core {paged_core.__version__}" in lines["hf"]
    assert "load_model" in lines["hf"]


def test_a_plugin_adds_a_command(with_commands, capsys):
    assert cli.main(["greet", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"
    assert cli.main(["seven"]) == 7


def test_help_names_every_command(with_commands, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("plugins", "generate", "bench", "greet"))


@pytest.mark.parametrize("command", ["plugins", "generate", "bench", "serve", "torchserve", "ray"])
def test_every_command_has_help_that_begins_with_what_it_does(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    usage, description, *rest = capsys.readouterr().out.split("\n\n")
    assert usage.startswith(f"usage: paged {command}")
    assert description.endswith(".")
    assert "--debug" in "".join(rest)


@pytest.mark.parametrize(
    ("command", "told"), [("broken", "no plugin answered; install one"), ("refused", "top_p is 2")]
)
def test_an_error_of_the_callers_is_one_line_and_status_2(with_commands, capsys, command, told):
    assert cli.main([command]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"paged: {told}")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--debug", "broken"], ["broken", "--debug"]])
def test_debug_shows_where_an_error_came_from(with_commands, argv):
    with pytest.raises(PluginError):
        cli.main(argv)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("bare", "No module named 'gguf'\npaged: this command needs what isn't installed here: "
            "pip install 'paged-core[hf]'"),
        ("archiving", "No module named 'yaml'\npaged: this command needs what isn't installed here: "
            "pip install 'paged-core[torchserve]'"),
    ],
)  # fmt: skip
def test_a_module_that_is_not_there_is_told_with_the_extra_that_brings_it(with_commands, capsys, command, told):
    assert cli.main([command]) == 2
    assert capsys.readouterr() == ("", f"paged: {told}\n")


def test_where_no_extra_brings_what_is_missing_all_extras_are_named(with_commands, capsys):
    assert cli.main(["puzzled"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("paged: Please install what it takes to read this.\n")
    assert "'paged-core[EXTRA]', where EXTRA is of bench, cpu, events, gpu, hf, otel, ray, server, torchserve;" in said
    with pytest.raises(ImportError):
        cli.main(["puzzled", "--debug"])


def test_an_interrupt_ends_quietly(with_commands, capsys):
    assert cli.main(["stopped"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "usage"),
    [
        (["generate", "smollm2", "hello", "--frobnicate"], "paged generate"),
        (["torchserve", "swap", "old.mar", "new.mar", "--frobnicate"], "paged torchserve swap"),
    ],
)
def test_an_unknown_option_shows_the_usage_of_its_own_command(argv, usage, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    told = capsys.readouterr().err
    assert told.startswith(f"usage: {usage} ")
    assert told.endswith(f"{usage}: error: unrecognized arguments: --frobnicate\n")


def test_help_and_usage_errors_import_no_torch():
    code = """if True:
        import sys
        from paged_core import cli
        for line in ("--help", "serve --help", "generate m --no", "torchserve", "bench m --n 0"):
            try:
                cli.main(line.split())
            except SystemExit:
                pass
        sys.exit("torch" in sys.modules or "numpy" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_no_command_at_all_is_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_model_that_is_not_there_is_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert cli.main([command, str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"paged: there is no folder or file {tmp_path / 'nowhere'}\n"


def test_generate_runs_where_it_is_told_to(monkeypatch, capsys):
    def engine(model, config, **where):
        raise ConfigError(f"{model} goes to {where['device']} as {where['dtype']}")

    monkeypatch.setattr("paged_core.Engine", engine)
    assert cli.main(["generate", "smollm2", "hello", "--device", "cuda:1", "--dtype", "float16"]) == 2
    assert capsys.readouterr().err == "paged: smollm2 goes to cuda:1 as float16\n"


def test_a_port_that_cannot_be_had_is_told_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "no-such-model", "--port", port]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"paged: the server can't listen on 127.0.0.1, port {port}: ")
    assert "in use" in told


@pytest.mark.parametrize("port", ["70000", "-1", "http"])
def test_a_port_that_is_none_is_a_usage_error(port, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "smollm2", f"--port={port}"])
    assert "error: argument --port: " in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["swap", "nowhere.mar", "new.mar"], ["serve", "nowhere.mar"]])
def test_an_archive_that_is_not_there_is_one_line(argv, capsys):
    assert cli.main(["torchserve", *argv]) == 2
    assert capsys.readouterr().err == "paged: nowhere.mar doesn't exist\n"


@pytest.mark.parametrize("command", ["generate", "serve"])
@pytest.mark.parametrize(
    ("option", "wanted"),
    [("--max-model-len", "a whole number from 1 on"), ("--kv-bytes", "a number of bytes, such as 1000, 300M or 20G")],
)
@pytest.mark.parametrize("value", ["4 apples", "0", "-1", "1.5", "M"])
def test_a_number_that_is_none_is_told_in_a_users_words(command, option, wanted, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, "smollm2", f"{option}={value}"])
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith(f"argument {option}: {value!r} isn't {wanted}")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second: where no locale is set
@pytest.mark.parametrize(("given", "told"), [(b"", "the prompt is empty; "), (b"\xff\xfe", "the prompt isn't text: ")])
def test_a_prompt_that_is_none_is_told_before_the_model_is_loaded(given, told, errors, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8", errors=errors))
    assert cli.main(["generate", "no-such-model"]) == 2
    assert told in capsys.readouterr().err


def test_a_plugin_whose_command_does_nothing_is_named(monkeypatch, capsys):
    class Empty:
        @hookimpl
        def register_commands(self, commands):
            commands.add_parser("idle")

    monkeypatch.setattr(cli, "load_plugins", lambda **more: load_plugins([Empty()], **more))
    assert cli.main(["plugins"]) == 2
    assert "'idle'" in capsys.readouterr().err
