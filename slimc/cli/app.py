"""The application: its name, its global options, and what becomes of an exception."""

from __future__ import annotations

import errno
import re
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from slimc.cli.terminal import fail
from slimc.errors import SlimError
from slimc.version import __version__

_INTERRUPTED = 128 + 2
"""What a shell reports for a command ended by SIGINT."""

# What typer raises to speak for itself; it does not export the base class of its usage errors.
_TYPERS_OWN = cast("tuple[type[Exception], ...]", (typer.Exit, typer.Abort, *typer.BadParameter.__bases__))


class _Group(TyperGroup):
    """Runs a command and turns what it raises into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. With ``--debug`` every exception shows its traceback."""
        try:
            return super().invoke(ctx)
        except _TYPERS_OWN:
            raise
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            raise typer.Exit(_explain(error)) from error


class Command(TyperCommand):
    """Shows the paragraphs of its help as wide as the terminal is, whatever lines they were written in."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        """Join the lines of each paragraph; examples, which are indented, stay as they are."""
        super().__init__(name, **settings)
        self.help = self.help and re.sub(r"(?<=\S)\n(?=\S)", " ", self.help)


def _explain(error: Exception) -> int:
    """Say on standard error what went wrong, and return the exit code."""
    if isinstance(error, SlimError):
        fail(str(error))
        return error.exit_code
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        raise error  # the reader of a pipe went away, as in `slimc inspect out | head`; typer ends quietly
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        fail(f"the disk is full ({error.filename or 'while writing'}): free some space; --resume goes on from there")
        return SlimError.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        fail(f"{error.filename}: {error.strerror}")
        return SlimError.exit_code
    fail(f"slimc failed in a way that it should not ({type(error).__name__}: {error})")
    fail("Run the command again as 'slimc --debug ...' to see where, and please report it.", label="")
    return 1


app = typer.Typer(
    cls=_Group,
    name="slimc",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with:  slimc compress MODEL -o small  and then  slimc generate small --prompt 'Once upon a time'",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slimc {__version__}")
        raise typer.Exit


@app.callback()
def slimc(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SLIMC_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Compress the weights of a language model: quantised, 2:4 sparse, low-rank corrected. No retraining.

    MODEL is a Hugging Face folder or id, or a .gguf file. The result is a folder that really is that small.
    """


def main() -> None:
    """Run the command line and exit."""
    app()
