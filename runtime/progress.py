"""How far some work is: on a terminal a bar that is redrawn every second, elsewhere a line now and then."""

import contextlib
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator

from tqdm import tqdm

SECONDS = 1.0  # between two drawings on a terminal
FIRST_LINE, LATER_LINES = 10.0, 0.25  # elsewhere: so many seconds between two lines, or this share of the time so far

_open: weakref.WeakSet["Bar"] = weakref.WeakSet()


class _TerminalLine(tqdm):
    """A bar of tqdm without tqdm's own thread."""

    monitor_interval = 0


class Bar:
    """The progress of some work, for a `with` block. A thread draws it on stderr, so that the clock always moves.

    title    what is done
    total    how much there is to do; None: unknown
    unit     what is counted, in the plural; "": only the share is shown
    ask      ask() -> (done, note, seconds left or None), called before each drawing; without it, call `update`
    leave    whether the finished bar stays on the terminal
    hidden   draw nothing, such as in all processes but the first

    A log (a file, a pipe, a notebook) gets a line after FIRST_LINE seconds and later ones at growing distances: about
    thirty in ten hours. Work that is done before that leaves no line.
    """

    def __init__(self, title: str = "", total: float | None = None, unit: str = "", *,
                 ask: Callable[[], tuple[float, str, float | None]] | None = None, leave: bool = False,
                 hidden: bool = False):
        self.title, self.total, self.unit, self.ask = title, total, unit, ask
        self.leave, self.hidden = leave, hidden or sys.stderr is None
        self.done, self.note = 0.0, ""
        self._terminal, self._thread, self._closed = None, None, threading.Event()

    def update(self, count: float = 1) -> None:
        """Count what was done."""
        self.done += count

    def track(self, items: Iterable) -> Iterator:
        """Yield the items and count them."""
        for item in items:
            yield item
            self.update()

    def __enter__(self) -> "Bar":
        self._start, self._next_line = time.monotonic(), FIRST_LINE
        if not self.hidden:
            if sys.stderr.isatty():
                self._terminal = _TerminalLine(total=self.total, leave=self.leave, ncols=_columns(), nrows=20,
                                               bar_format=self._text("|{bar}|"))
            self._thread = threading.Thread(target=self._draw_until_closed, daemon=True)
            self._thread.start()
            _open.add(self)
        return self

    def __exit__(self, *_) -> None:
        _open.discard(self)
        if self._thread is None or self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(OSError, ValueError):  # the terminal is closed
            if self._terminal is not None:
                self._update_terminal(last=True)
                self._terminal.close()
            elif self._next_line > FIRST_LINE:
                self._write_line(last=True)

    def _draw_until_closed(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal is closed
            while not self._closed.wait(SECONDS):
                if self._terminal is not None:
                    self._update_terminal()
                    self._terminal.refresh()
                elif (seconds := time.monotonic() - self._start) >= self._next_line:
                    self._next_line = seconds + max(FIRST_LINE, LATER_LINES * seconds)
                    self._write_line()

    def _update_terminal(self, last: bool = False) -> None:
        self._terminal.bar_format, self._terminal.ncols = self._text("|{bar}|", last), _columns()
        self._terminal.n = min(self.done, self.total or 0)

    def _write_line(self, last: bool = False) -> None:
        print(self._text(",", last).replace("{{", "{").replace("}}", "}").strip(), file=sys.stderr, flush=True)

    def _text(self, after_share: str, last: bool = False) -> str:
        """What is shown, as a bar_format of tqdm: "title:  45%|{bar}| 9/20 steps, 01:23, note, 01:40 left"."""
        seconds, left = time.monotonic() - self._start, None
        if self.ask:
            self.done, self.note, left = self.ask()
        elif self.total and self.done:
            left = max(0.0, seconds * (self.total - self.done) / self.done)
        facts = [tqdm.format_interval(seconds), self.note]
        if self.unit:
            facts.insert(0, f"{self.done:,.0f}{f'/{self.total:,.0f}' if self.total else ''} {self.unit}")
        if left is not None and math.isfinite(left) and not last:
            facts.append(f"{tqdm.format_interval(left)} left")
        share = f"{math.floor(100 * self.done / self.total):3}%{after_share} " if self.total else ""
        title, said = (text.replace("{", "{{").replace("}", "}}") for text in (
            f"{self.title}: " if self.title else "", ", ".join(filter(None, facts))))
        return title + share + said


def _columns() -> int:
    """The width that a line on the terminal may have: 79 where the terminal does not know its own."""
    try:
        return (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
    except (OSError, ValueError):
        return 79


def progress(title: str, unit: str = "") -> Callable[[Collection], Iterator]:
    """A function that shows a bar for the items of a collection that is looped over."""
    def loop(items: Collection) -> Iterator:
        with Bar(title, len(items), unit) as bar:
            yield from bar.track(items)
    return loop


def say(text: str, file=None) -> None:
    """Print a line, above the bar if there is one. file: sys.stdout if None."""
    tqdm.write(text, file=file or sys.stdout)
    (file or sys.stdout).flush()


def close_all() -> None:
    """Close the bars that an exception left open, before a message is printed."""
    for bar in list(_open):
        bar.__exit__()
