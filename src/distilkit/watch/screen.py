"""Two lines that change: at the foot of a terminal, or below a notebook's cell."""

import html
import logging
import sys
from time import perf_counter
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

_WIDEST = 120  # columns that the bar fills at most
_EVERY = 1.0  # seconds between two changes of a notebook


class Screen:
    """Show a label, a bar and numbers in one line, and more numbers below, where there is a place that can change."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self.frame = ("", 0.0, "", "")  # label, share that is done, what stands at its right, and below
        self.console = Console()
        self.live: Live | None = None
        self.notebook: Any = None  # IPython's handle of what is displayed
        self.changed = float("-inf")
        self.handlers: list[tuple[Any, Any]] = []

    @property
    def is_open(self) -> bool:
        """Whether the lines are shown."""
        return self.live is not None or self.notebook is not None

    def open(self) -> None:
        """Begin the lines in a terminal or a notebook; what is logged then goes above them."""
        if self.is_open:
            return
        self.console = console = Console(soft_wrap=True)  # else a command that is logged cannot be copied
        if console.is_jupyter:
            from IPython.display import display

            self.notebook = display({"text/plain": ""}, raw=True, display_id=True)
        elif console.is_terminal and not console.is_dumb_terminal:
            streams = sys.stdout, sys.stderr
            self.live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)
            self.live.start()
            for handler in logging.root.handlers:  # else they would write into the lines
                if isinstance(handler, logging.StreamHandler) and (stream := handler.stream) in streams:
                    self.handlers.append((handler, stream))
                    handler.setStream(sys.stdout if stream is streams[0] else sys.stderr)

    def close(self) -> None:
        """Remove the lines from a terminal; a notebook keeps them."""
        for handler, stream in self.handlers:
            handler.setStream(stream)
        self.handlers = []
        if self.live:
            self.live.stop()
        self.live = self.notebook = None

    def show(self, *, label: str, share: float, right: str, below: str) -> None:
        """Change the lines; those of a notebook once a second at most."""
        self.frame = label, min(1.0, share), right, below
        if self.notebook is not None and perf_counter() - self.changed >= _EVERY:
            self.changed = perf_counter()
            bar = f'<progress value="{share:.4f}"></progress>'
            self._display(
                f"{label}  {right}\n{below}", f"{bar} {html.escape(f'{label}  {right}')}<br>{html.escape(below)}"
            )

    def end(self, line: str) -> bool:
        """Leave this line in a notebook; return whether there is one."""
        if self.notebook is None:
            return False
        self._display(line, html.escape(line))
        return True

    def _display(self, text: str, page: str) -> None:
        self.notebook.update({"text/plain": text, "text/html": f"<div>{page}</div>"}, raw=True)

    def render(self) -> Group:
        """Return what a terminal shows: two lines, cut at its width."""
        label, share, right, below = self.frame
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(label, Bar(total=1.0, completed=share), right)
        head.width = min(self.console.width, _WIDEST)
        return Group(head, Text(below, no_wrap=True, overflow="ellipsis"))
