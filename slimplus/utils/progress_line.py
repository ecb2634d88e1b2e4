"""The line on a terminal, or in a notebook, that shows the progress of a job while it runs."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text


class _Line:
    """What is drawn: a spinner, which tells that the job is alive, and the present text, cut to the terminal."""

    def __init__(self, describe: Callable[[], str]) -> None:
        self._describe, self._spinner = describe, Spinner("dots")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self._spinner.update(text=Text(self._describe(), no_wrap=True, overflow="ellipsis"))
        yield self._spinner


def live_line(describe: Callable[[], str]) -> Live | None:
    """Return a line on the standard error output that shows what `describe` returns, or None without a terminal.

    What the process writes meanwhile appears above the line.

    Args:
        describe: function that is called four times a second.
    """
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        return None
    line = Live(_Line(describe), console=console, refresh_per_second=4, transient=True)
    line.start()
    return line
