"""How many threads torch uses on the processor: fixed, or chosen while a script works, by measuring.

The threads wait for each other in every operation. If another program takes one of two cores, two threads are about
half as fast as one.

The number of threads changes the weights of a training step in the last digits; the same number always gives the same
bits. So it is fixed where results must be repeatable, and by --threads.
"""

import functools
import math
import os
import re
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import torch

from runtime import distributed
from runtime.progress import say

WINDOW = 0.25  # a speed is measured over whole steps of at least so many seconds together
GAIN = 1.1  # how many times faster another number of threads must be to be taken
CLEARLY_SLOWER = 0.9  # below this share of the best speed, a search goes no further in the same direction
CHANGED = 0.8  # a fall to this share of the expected speed, or a rise to its inverse, starts a search at once
COST, HURRIED_COST = 0.04, 0.1  # share of the time that searches may lose: regular ones, and those after a change
PAUSE = 4.0  # the shortest time between two regular searches, in seconds
FIRST_LOOK, LOOK_SECONDS = 0.1, 1.0  # the first look at what the cores do, and the time between later ones
IDLE_CORES, OTHER_CORES = 0.5, 0.3  # more threads are tried if so many cores are idle, fewer if others use so many
MAX_LINES = 10  # changes that are printed
PATIENCE = 2.0  # for making and measuring images, which is often done sooner

STAT = Path("/proc/stat")  # what the cores have done; only Linux has it

_adapting = False  # like torch's number of threads, one setting for the whole process


@functools.cache
def default_number() -> int:
    """The number of threads that torch has when the program starts."""
    return torch.get_num_threads()


def set_up(number: int | None, device: torch.device, adapt: bool = True) -> None:
    """Use `number` threads. Without a number: torch's default, or where `adapt` is True as many as cores are free.

    Each ThreadTuner may change the latter. On other devices and in several processes the number stays the default.
    """
    global _adapting
    torch.set_num_threads(number or default_number())
    _adapting = (adapt and number is None and default_number() > 1 and device.type == "cpu"
                 and distributed.world_size() == 1)
    if _adapting:
        torch.set_num_threads(number_for_free_cores())


def number_for_free_cores() -> int:
    """As many threads as other programs leave cores free at this moment; the default where the system does not tell."""
    cores = Cores()
    time.sleep(FIRST_LOOK)
    cores.look(FIRST_LOOK)
    free = max(1, default_number() - round(cores.others)) if math.isfinite(cores.others) else default_number()
    return max(number for number in numbers_to_try(default_number()) if number <= free)


def describe() -> str:
    """A line for the user: how many threads, whether their number is fixed, and whether fewer may be faster."""
    count = torch.get_num_threads()
    named = f"{count} thread{'s' * (count > 1)}"
    if _adapting:
        return f"{named} now, fewer or more as other programs leave cores free (--threads N: always N)"
    free = number_for_free_cores() if count > 1 and distributed.world_size() == 1 else count
    advice = f"; other programs are busy now: --threads {free} may be faster" if free < count else ""
    return f"{named} from beginning to end: another number changes the last digits of results{advice}"


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
        self.active = _adapting
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
        if self.active:
            if not kind:
                self._count_step(time.perf_counter() - self.start)
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

    def _count_step(self, seconds: float) -> None:
        if self.tried not in self.used:  # the first step with a number also prepares the operations for it
            self.used.add(self.tried)
            return
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        if self.seconds >= WINDOW:
            rate, self.window, self.count, self.seconds = self.count / self.seconds, self.seconds, 0, 0.0
            self.tried = self.plan.send(rate)

    def _use(self, number: int) -> None:
        if number != torch.get_num_threads():
            torch.set_num_threads(number)

    def _plan(self, numbers: list[int], start: float) -> Generator[int, float, None]:
        """Yields the number of threads for the next window, and takes the speed of that window, in steps a second.

        start: when the first search begins.
        """
        rate, fewer, more = (yield self.number), True, idle_and_total_time() is None
        while time.perf_counter() < start:
            rate = yield self.number
        while True:
            before, place = self.number, numbers.index(self.number)
            sides = numbers[place + 1:] if fewer else [], numbers[:place][::-1] if more else []
            rates, lost = yield from self._search(sides, before, rate)
            best = max(rates, key=rates.get)
            if rates[best] > GAIN * rates[before]:
                self._tell(before, best, rates[best] / rates[before])
                self.number = best
            rate, fewer, more = yield from self._work(rates[self.number], lost)

    def _search(self, sides: tuple[list[int], ...], number: int, rate: float) -> Generator[int, float, tuple]:
        """Try other numbers of threads than `number`, whose speed is `rate`: ({number: speed}, seconds lost by it)."""
        rates, windows = {number: rate}, {}
        for side in sides:
            for other in side:
                rates[other] = yield other
                windows[other] = self.window
                if rates[other] < CLEARLY_SLOWER * max(rates.values()):
                    break
        best = max(rates.values())
        return rates, sum(seconds * (1 - rates[other] / best) for other, seconds in windows.items())

    def _work(self, expected: float, lost: float) -> Generator[int, float, tuple[float, bool, bool]]:
        """Keep the number until a search is due: (the last speed, whether to try fewer, whether to try more)."""
        start, cores, changed = time.perf_counter(), Cores(), 0
        while True:
            rate = yield self.number
            cores.look()
            changed = changed + 1 if not CHANGED < rate / expected < 1 / CHANGED else 0
            fewer, more = changed >= 2 or cores.others >= OTHER_CORES, cores.idle >= IDLE_CORES
            hurry = changed >= 2 or cores.idle_grows
            pause = lost / HURRIED_COST if hurry else max(PAUSE, lost / COST)
            if (fewer or more) and time.perf_counter() - start > pause:
                return rate, fewer, more

    def _tell(self, before: int, now: int, gain: float) -> None:
        self.lines += 1
        if self.lines <= MAX_LINES:
            last = "; further changes are not printed" if self.lines == MAX_LINES else ""
            why = "not all cores are free" if now < before else "more cores are free"
            say(f"{now} thread{'s' * (now > 1)} instead of {before}, {gain:.1f} times as fast: {why}{last}")


class Cores:
    """How many cores are idle and how many other programs use.

    Both are infinite, so that everything is tried, before the first look and where the system does not tell.
    """

    def __init__(self):
        self.idle = self.others = math.inf
        self.least_idle, self.before = math.inf, self._read()

    def look(self, least: float = LOOK_SECONDS) -> None:
        """Bring the numbers up to date, if the last look was at least so many seconds ago."""
        if self.before is None or time.perf_counter() - self.before[0] < least:
            return
        now = self._read()
        clock, own, idle, total, cores = (after - before for after, before in zip(now, self.before, strict=True))
        self.before, cores = now, now[-1]
        self.idle = cores * idle / max(1, total)
        self.others = cores - self.idle - own / clock
        self.least_idle = min(self.least_idle, self.idle)

    @property
    def idle_grows(self) -> bool:
        """Whether IDLE_CORES more cores are idle than at an earlier look."""
        return self.idle - self.least_idle >= IDLE_CORES

    def _read(self) -> tuple | None:
        """(clock, processor time of this process, idle time of all cores, time of all cores, cores), or None."""
        times = idle_and_total_time()
        return times and (time.perf_counter(), time.process_time(), *times)


def idle_and_total_time() -> tuple[int, int, int] | None:
    """(idle time, total time, cores) of the cores that this process may use, together, since the system started.

    None except on Linux.
    """
    try:
        lines = [line.split() for line in STAT.read_text().splitlines()]
    except OSError:
        return None
    cores, mine = [line for line in lines if re.fullmatch(r"cpu\d+", line[0])], os.sched_getaffinity(0)
    if len(cores) > len(mine):  # else they are all ours: some containers number them anew
        cores = [line for line in cores if int(line[0][3:]) in mine] or cores
    rows = [[int(text) for text in line[1:9]] for line in cores]  # after them come guests, which are counted as users
    times = [sum(column) for column in zip(*rows, strict=True)]
    return times[3] + times[4], sum(times), len(rows)
