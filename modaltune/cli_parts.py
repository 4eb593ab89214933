"""What every command shares: consoles, the JSON flag, and errors as messages."""

from __future__ import annotations

import errno
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

FAILED, INTERRUPTED = 1, 130

out_console = Console()
err_console = Console(stderr=True)

TileEncoderName = Annotated[
    str | None,
    typer.Option(help="Tile encoder: a name, timm:NAME, transformers:FOLDER. See doctor."),
]
TileEncoderWeights = Annotated[Path | None, typer.Option(help="Local weights of the tile encoder.")]
AllowDownload = Annotated[
    bool, typer.Option("--allow-download", help="Fetch missing weights from the hub.")
]
TrustedRevision = Annotated[
    str | None,
    typer.Option(help="40-hex revision whose model code may run.", metavar="REVISION"),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines, nothing else.")]
# What the system says of a path that the user gave and it won't have; all else is a fault of ours.
_REFUSED_PATH = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
Command = TypeVar("Command", bound=Callable[..., Any])


def reports_errors(command: Command) -> Command:
    """Print errors a user can act on as one message and exit 1; others are faults of ours."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from modaltune.engine.errors import DecodeError, InputError

        try:
            return command(*args, **kwargs)
        except InputError as error:
            _say_error(str(error))
            raise typer.Exit(FAILED) from error
        except DecodeError as error:
            _say_error(f"slides can't be decoded: {error}; see what `modaltune doctor` says")
            raise typer.Exit(FAILED) from error
        except OSError as error:
            if error.errno not in _REFUSED_PATH or error.filename is None:
                raise
            _say_error(
                f"{error.filename} must be a path that can be used as asked, got: "
                f"{error.strerror}; choose another, or change its permissions"
            )
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt:
            err_console.print("interrupted; finished work is kept, run the same command to go on")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped  # type: ignore[return-value]


def _say_error(message: str) -> None:
    text = f"[bold red]error:[/] {escape(message)}"
    err_console.print(text, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Write strict JSON to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
