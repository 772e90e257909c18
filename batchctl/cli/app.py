"""The Typer application, the global options, and the one error boundary."""

from __future__ import annotations

import functools
import gc
import inspect
import signal
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from batchctl.cli.session import LogFormat, Session
from batchctl.cli.terminal import lost
from batchctl.errors import MEANING, BatchctlError, ExitCode, UsageError

# The mark keeps the lines as they are.
EXIT_CODES = "\b\nExit codes:\n" + "\n".join(
    f"  {'128+N' if code is ExitCode.SIGNAL else int(code):<6}{text.removeprefix('128+N: ')}"
    for code, text in MEANING.items()
)

app = typer.Typer(
    name="batchctl",
    help="Run long batches and exact rollups from cron: never twice at once, never waiting, always saying why not.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    # Plain text reads the same in a pipe, in a mail and at 80 columns, and rich stays unloaded.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="PATH", help="Configuration file.", show_default=False),
]
Verbose = Annotated[
    int, typer.Option("-v", "--verbose", count=True, help="Say more; -vv says all.", show_default=False)
]
Quiet = Annotated[int, typer.Option("-q", "--quiet", count=True, help="Say less.", show_default=False)]
Form = Annotated[LogFormat | None, typer.Option("--log-format", help="Form of log lines (text).", show_default=False)]

GLOBAL_OPTIONS: dict[str, tuple[Any, Any]] = {
    "config": (Config, None),
    "verbose": (Verbose, 0),
    "quiet": (Quiet, 0),
    "log_format": (Form, None),
}


def _print_version(value: bool) -> None:
    if value:
        import batchctl

        typer.echo(f"batchctl {batchctl.__version__}")
        raise typer.Exit


@app.callback()
def _before_command(
    context: typer.Context,
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version.", show_default=False
        ),
    ] = False,
    config: Config = None,
    verbose: Verbose = 0,
    quiet: Quiet = 0,
    log_format: Form = None,
) -> None:
    del version
    context.obj = {"config": config, "verbose": verbose, "quiet": quiet, "log_format": log_format}


def command(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a function as a command: it is handed the session and its own options, and returns the exit code.

    The global options are added to each command, so that they may stand before and after it.
    """

    def register(function: Callable[..., int]) -> Callable[..., int]:
        hints = typing.get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in list(inspect.signature(function).parameters.values())[1:]
        ]

        @functools.wraps(function)
        def call(context: typer.Context, **options: Any) -> None:
            before: dict[str, Any] = context.obj or {}
            after = {option: options.pop(option) for option in GLOBAL_OPTIONS}
            session.config = after["config"] or before["config"]
            session.verbosity = after["verbose"] + before["verbose"] - after["quiet"] - before["quiet"]
            session.log_format = after["log_format"] or before["log_format"] or "text"
            code = function(session, **options)
            if code == ExitCode.DONE and lost() and (name in PRINTING or options.get("dry_run")):
                code = ExitCode.FAILED
            raise typer.Exit(code)

        parameters = [
            inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
            *(
                inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
                for option, (annotation, default) in GLOBAL_OPTIONS.items()
            ),
        ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, epilog=EXIT_CODES)(call)
        return function

    return register


session = Session()


def main() -> NoReturn:
    """Run the command that the arguments name, and turn every error into one line and an exit code."""
    # Ctrl-C ends a command at once and silently; run-batch handles it itself once it has something to end.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Where a parent ignores it, the kernel forgets how children ended, and each step would look like a success.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        # Cron's locale is often ASCII, and a message must not fail for one character.
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _register(sys.argv[1:])
    try:
        app(prog_name="batchctl")
    except BatchctlError as error:
        said = session.explained(error.__cause__) or error
        _complain(str(said), logged=not isinstance(said, UsageError))
        sys.exit(said.exit_code)
    except Exception as error:  # the boundary: what nobody expected is a bug, said in one line
        if known := session.explained(error):
            _complain(str(known))
            sys.exit(known.exit_code)
        if session.verbosity > 1:
            raise
        _complain(f"a bug in batchctl: {type(error).__name__}: {error}; -vv shows where")
        sys.exit(ExitCode.BUG)
    finally:
        # The interpreter looks through all objects several times as it ends, to free what the kernel frees anyhow: a
        # sixth of what an idle call costs.
        gc.freeze()
    sys.exit(ExitCode.DONE)


def _complain(message: str, *, logged: bool = True) -> None:
    """Say what went wrong in one line: through the log once there is one, but wrong usage is no matter of the log."""
    line = " ".join(message.split())
    if session.log is not None and logged:
        session.log.error(line)
    elif sys.stderr is not None:
        sys.stderr.write(f"batchctl: {line}\n")


PRINTING = ("status", "history", "next", "simulate", "crontab", "orphans", "doctor", "demo")
"""Commands that exist to print, as every --dry-run does: what they could not print they have not done."""
COMMANDS = {
    "run-batch": "run_batch",
    "aggregate": "aggregate",
    "status": "inspect",
    "history": "inspect",
    "next": "schedule",
    "simulate": "simulate",
    "crontab": "crontab",
    "pause": "control",
    "unpause": "control",
    "stop": "control",
    "orphans": "recover",
    "recover": "recover",
    "doctor": "doctor",
    "init": "admin",
    "migrate": "admin",
    "demo": "admin",
}
"""In which module of this package each command is, in the order of --help."""


def _register(arguments: list[str]) -> None:
    """Import the module of the command that is called, or all of them if that cannot be told."""
    from importlib import import_module

    named = [COMMANDS[argument] for argument in arguments if argument in COMMANDS]
    everything = not named or arguments[0] in ("-h", "--help")
    for module in dict.fromkeys(COMMANDS.values() if everything else named):
        import_module(f"batchctl.cli.{module}")
