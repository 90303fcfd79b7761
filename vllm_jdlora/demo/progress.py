"""Numbered steps on the terminal: what is going on, for how long, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape


class Step:
    """One running step; ``update`` changes the text beside the spinner, ``result`` is printed when it ends."""

    def __init__(self, head: str, show: Callable[[str], None]):
        self._head = head
        self._show = show
        self.result = ""

    def update(self, text: str) -> None:
        self._show(f"{self._head} [dim]{escape(text)}[/dim]")


class Steps:
    """Counts steps and prints one line for each. Without a terminal (a log file), a line at the start as well."""

    def __init__(self, console: Console, total: int):
        self.console = console
        self.total = total
        self._number = 0

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        self._number += 1
        head = f"[bold]\\[{self._number}/{self.total}][/bold] {escape(title)}"
        started = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"{head} …")
        with self.console.status(head) as status:
            step = Step(head, status.update)
            try:
                yield step
            except BaseException:
                self.console.print(f"{head} [red]failed[/red] [dim]({time.monotonic() - started:.1f} s)[/dim]")
                raise
        result = f": {escape(step.result)}" if step.result else ""
        self.console.print(f"{head}{result} [dim]({time.monotonic() - started:.1f} s)[/dim]", soft_wrap=True)
