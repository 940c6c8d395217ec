"""What every command shares: the application, common options, and errors turned into messages and exit codes."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from dataengine.manifest import Conflict, NotADataset
from dataengine.storage import redacted
from dataengine.work import Stopped, Unfinished
from pipelines.running import Runner, TooManyBad, console

EXIT_CODES = """
Exit codes: 0 all that was wanted is committed; 1 an unexpected error; 2 a wrong command, setting or input;
3 more failures than --max-bad-fraction; 4 verify or doctor found something; 5 a conflict with what is committed
already; 6 some shards could not be done, all others are; 7 stopped by a signal, to be run again."""

app = typer.Typer(
    name="dataengine",
    help="Label image corpora with specialist networks, tokenise the labels, train any-to-any models on the tokens.\n"
    + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Root = Annotated[str, typer.Argument(help="Dataset root: a folder or any fsspec URL.")]
Modalities = Annotated[
    list[str] | None,
    typer.Argument(help="Modalities to make, who makes one (det=dfine), settings (sam.points_per_side=16)."),
]
Settings = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe: field=value, loop.steps=100.")]
RunnerOption = Annotated[
    Runner, typer.Option(help="ray: on the Ray cluster of RAY_ADDRESS or of this machine; local: in this process.")
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="At most so many worker processes; without it, all that the cluster has room for."),
]
GpuPrice = Annotated[float | None, typer.Option(min=0.0, help="What an hour of one GPU costs, for the cost so far.")]
CpuPrice = Annotated[float | None, typer.Option(min=0.0, help="What an hour of one CPU core costs.")]
BatchSeconds = Annotated[
    float, typer.Option(min=1.0, help="A labeler that takes longer for one batch counts as hung, and is replaced.")
]
Bad = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Fail when a larger fraction is refused or cannot be labelled.")
]
Recipe = Annotated[
    str | None, typer.Option(help="A recipe of pipelines/recipes/, or a Python file with `def recipe()`.")
]
Permissive = Annotated[bool, typer.Option("--permissive", help="Refuse labelers whose weights forbid commercial use.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]


def split_settings(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Modality names, and settings (`det=dfine`, `sam.points_per_side=16`): told apart by the equals sign."""
    given = arguments or []
    return [a for a in given if "=" not in a], [a for a in given if "=" in a]


def exits(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors a user can cause into one message and an exit code that says which kind it was."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except TooManyBad as error:
            _fail(error, 3)
        except Unfinished as error:
            _fail(error, 6)
        except Stopped as error:
            _fail(error, 7)
        except Conflict as error:
            _fail(error, 5)
        except (NotADataset, ValueError, FileNotFoundError, ImportError) as error:
            _fail(error, 2)

    return wrapped


def _fail(error: Exception, code: int) -> None:
    console.print(f"error: {redacted(error)}", style="red", markup=False, highlight=False)
    raise typer.Exit(code)


def say(value: Any, as_json: bool, line: str) -> None:
    """Print a line for people, or JSON on standard output for scripts."""
    if as_json:
        sys.stdout.write(json.dumps(value, default=str) + "\n")
    else:
        console.print(line, markup=False, highlight=False)
