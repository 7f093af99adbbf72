"""How many threads torch uses on the processor: fixed, or chosen while a script works, by measuring.

The threads wait for each other in every operation. If another program takes one of two cores, two threads are about
half as fast as one.

The number of threads changes the weights of a training step in the last digits; the same number always gives the same
bits. So it is fixed where results must be repeatable, and by --threads.
"""

import functools
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import distributed

WINDOW = 0.25  # a speed is measured over whole steps of at least so many seconds together
GAIN = 1.1  # how many times faster another number of threads must be to be taken
CLEARLY_SLOWER = 0.9  # below this share of the best speed, a search goes no further in the same direction
CHANGED = 0.8  # a fall to this share of the expected speed, or a rise to its inverse, starts a search at once
COST, HURRIED_COST = 0.04, 0.1  # share of the time that searches may lose: regular ones, and those after a change
PAUSE = 4.0  # the shortest time between two regular searches, in seconds
IDLE_SECONDS, IDLE_CORES = 1.0, 0.5  # so many more idle cores, over so many seconds, start a search
MAX_LINES = 10  # changes that are printed
PATIENCE = 2.0  # for making and measuring images, which is often done sooner

_adapting = False  # like torch's number of threads, one setting for the whole process


@functools.cache
def default_number() -> int:
    """The number of threads that torch has when the program starts."""
    return torch.get_num_threads()


def set_up(number: int | None, device: torch.device, adapt: bool = True) -> None:
    """Use `number` threads. Without a number: torch's default, which each ThreadTuner may change where `adapt` is True.

    On other devices and in several processes the number stays.
    """
    global _adapting
    torch.set_num_threads(number or default_number())
    _adapting = adapt and number is None and device.type == "cpu" and distributed.world_size() == 1


def describe() -> str:
    """A line for the user: how many threads, and whether their number is fixed."""
    count = torch.get_num_threads()
    named = f"{count} thread{'s' * (count > 1)}"
    if not _adapting:
        return f"{named} from beginning to end (another number, set by --threads, changes the last digits of results)"
    return f"{named}, fewer while other programs use the processor (--threads N: always N)" if count > 1 else named


def numbers_to_try(most: int) -> list[int]:
    """Numbers of threads from `most` down to 1: one less than `most`, and halves."""
    return sorted({most, max(1, most - 1), *(most >> i for i in range(most.bit_length()))}, reverse=True)


class ThreadTuner:
    """Choose the number of threads while steps of equal work are done; prints a line for each change.

        with tuner:                        for batch in tuner.steps(batches):
            step()                             work(batch)

    Now and then a step or two are done with other numbers of threads, and the fastest number is kept. This happens
    regularly, as often as COST allows, and at once when the speed changes or cores become idle. Does nothing where the
    number is fixed (`set_up`).

    patience   seconds before the first search: short work is done before
    """

    def __init__(self, patience: float = 0.0):
        self.active = _adapting and default_number() > 1
        self.lines, self.used = 0, set()  # numbers of threads with which a step was done
        self.count, self.seconds = 0, 0.0  # of the steps in this window
        self.number = torch.get_num_threads()
        self.plan = self._plan(numbers_to_try(default_number()), time.perf_counter() + patience)
        self.tried = next(self.plan)  # the number of threads in the next step

    def __enter__(self) -> None:
        if self.active:
            self._use(self.tried)
            self.start = time.perf_counter()

    def __exit__(self, kind, *_) -> None:
        if not self.active or kind:
            return
        if self.tried not in self.used:  # the first step with a number also prepares the operations for it
            self.used.add(self.tried)
        else:
            self.count, self.seconds = self.count + 1, self.seconds + time.perf_counter() - self.start
        if self.seconds >= WINDOW:
            rate, self.window, self.count, self.seconds = self.count / self.seconds, self.seconds, 0, 0.0
            self.tried = self.plan.send(rate)
        self._use(self.number)

    def steps(self, items: Iterable) -> Iterator:
        """The items; each passage through the loop is a step."""
        try:
            self.__enter__()
            for item in items:
                yield item
                self.__exit__(None)
                self.__enter__()
        finally:
            if self.active:
                self._use(self.number)

    def _use(self, number: int) -> None:
        if number != torch.get_num_threads():
            torch.set_num_threads(number)

    def _plan(self, numbers: list[int], start: float) -> Generator[int, float, None]:
        """Yields the number of threads for the next window, and takes the speed of that window, in steps a second.

        start: when the first search begins.
        """
        rate = yield self.number
        while time.perf_counter() < start:
            rate = yield self.number
        while True:
            before = self.number
            rates, lost = yield from self._search(numbers, before, rate)
            best = max(rates, key=rates.get)
            if rates[best] > GAIN * rates[before]:
                self._tell(before, best, rates[best] / rates[before])
                self.number = best
            rate = yield from self._work(self.number, rates[self.number], lost, self.number < max(numbers))

    def _search(self, numbers: list[int], number: int, rate: float) -> Generator[int, float, tuple[dict, float]]:
        """Try fewer and more threads than `number`, whose speed is `rate`: ({number: speed}, seconds lost by it)."""
        rates, windows, place = {number: rate}, {}, numbers.index(number)
        for side in (numbers[place + 1:], numbers[:place][::-1]):
            for other in side:
                rates[other] = yield other
                windows[other] = self.window
                if rates[other] < CLEARLY_SLOWER * max(rates.values()):
                    break
        best = max(rates.values())
        return rates, sum(seconds * (1 - rates[other] / best) for other, seconds in windows.items())

    def _work(self, number: int, expected: float, lost: float, could_be_more: bool) -> Generator[int, float, float]:
        """Use `number` threads until a search is due; returns the last speed."""
        start, idle, changed = time.perf_counter(), IdleCores(), 0
        while True:
            rate = yield number
            seconds = time.perf_counter() - start
            changed = changed + 1 if not CHANGED < rate / expected < 1 / CHANGED else 0
            hurry = changed >= 2 or (could_be_more and idle.have_grown())
            if seconds > (lost / HURRIED_COST if hurry else max(PAUSE, lost / COST)):
                return rate

    def _tell(self, before: int, now: int, gain: float) -> None:
        self.lines += 1
        if self.lines <= MAX_LINES:
            last = "; further changes are not printed" if self.lines == MAX_LINES else ""
            why = "other programs use the processor" if now < before else "the processor has become free"
            tqdm.write(f"{now} thread{'s' * (now > 1)} instead of {before}, {gain:.1f} times as fast: {why}{last}",
                       file=sys.stdout)


class IdleCores:
    """Watches how many cores are idle. Only on Linux; elsewhere none ever seem to become idle."""

    def __init__(self):
        self.before, self.at_first, self.grown = idle_and_total_time(), None, False
        self.read_at = time.perf_counter()

    def have_grown(self) -> bool:
        """Whether IDLE_CORES more cores are idle than in the first IDLE_SECONDS; looks once in that time."""
        if self.before and time.perf_counter() - self.read_at >= IDLE_SECONDS:
            self.read_at, (idle, total, cores) = time.perf_counter(), idle_and_total_time()
            share = (idle - self.before[0]) / max(1, total - self.before[1])
            self.before = idle, total, cores
            if self.at_first is None:
                self.at_first = share * cores
            self.grown = share * cores - self.at_first >= IDLE_CORES
        return self.grown


def idle_and_total_time() -> tuple[int, int, int] | None:
    """(idle time, total time, cores) of all cores together since the system started; None where it does not tell."""
    try:
        first, *lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    times = [int(text) for text in first.split()[1:9]]  # guests are counted among user
    return times[3] + times[4], sum(times), sum(line.startswith("cpu") for line in lines)
