"""The number of threads: what is fastest beside other programs is found, kept, and told, and a fixed number stays."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from runtime import threads
from runtime.threads import ThreadTuner, numbers_to_try

CPU = torch.device("cpu")
# Images a second of the 48-channel network on two cores, by threads and by other busy processes; the last column is
# what two of them leave.
SPEEDS = {(2, 0): 596, (1, 0): 357, (2, 1): 168, (1, 1): 345, (2, 2): 120, (1, 2): 210}
BATCH = 128


class Machine:
    """A machine with two cores, whose clock goes on with the steps that are done on it.

    busy(seconds)   how many other processes are busy then
    size            how many times more images a second there are than in SPEEDS
    """

    def __init__(self, monkeypatch, busy=lambda seconds: 0, size=1.0, tells_idle=True, default=2):
        self.now, self.number, self.busy, self.size, self.used = 0.0, default, busy, size, []
        self.idle, self.own = 0.0, 0.0  # time of the cores
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.number)
        monkeypatch.setattr(torch, "set_num_threads", lambda number: setattr(self, "number", number))
        monkeypatch.setattr(threads, "default_number", lambda: default)
        monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=lambda: self.now,
                                                             process_time=lambda: self.own, sleep=self.sleep))
        monkeypatch.setattr(threads, "_adapting", False)
        monkeypatch.setattr(threads, "idle_and_total_time", lambda: (int(100 * self.idle), int(200 * self.now), 2)
                            if tells_idle else None)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.idle += max(0, 2 - self.busy(self.now)) * seconds

    def step(self) -> None:
        busy = self.busy(self.now)
        seconds = BATCH / SPEEDS[self.number, busy] / self.size
        self.now += seconds
        self.idle += max(0, 2 - self.number - busy) * seconds
        self.own += min(self.number, 2 * self.number / (self.number + busy)) * seconds
        self.used.append((self.now, self.number))

    def train(self, seconds: float, tuner=None) -> None:
        tuner = tuner or ThreadTuner()
        while self.now < seconds:
            with tuner:
                self.step()

    def speed(self, start: float, end: float) -> float:
        """Images a second between two moments."""
        return sum(start < when <= end for when, _ in self.used) * BATCH / self.size / (end - start)


def best(busy: int) -> int:
    return max(SPEEDS[number, busy] for number in (1, 2))


@pytest.mark.parametrize("tells_idle", [True, False])
@pytest.mark.parametrize("size", [1, 20], ids="{}x".format)
@pytest.mark.parametrize("busy", [0, 1, 2])
def test_over_20_seconds_nine_tenths_of_the_best_speed_are_reached(monkeypatch, busy, size, tells_idle):
    machine = Machine(monkeypatch, lambda _: busy, size, tells_idle)
    threads.set_up(None, CPU)
    machine.train(62)
    one_step = BATCH / size / 20  # at the ends of the 20 seconds
    for start in (0.0, 20.0, 40.0):
        assert machine.speed(start, start + 20) >= 0.9 * best(busy) - one_step


@pytest.mark.parametrize("tells_idle", [True, False])
def test_it_follows_a_machine_that_becomes_busy_and_free_again(monkeypatch, capsys, tells_idle):
    machine = Machine(monkeypatch, lambda seconds: int(30 <= seconds < 80), tells_idle=tells_idle)
    threads.set_up(None, CPU)
    machine.train(122)
    for start, busy in ((5, 0), (30, 1), (50, 1), (90, 0), (100, 0)):  # from 80 to 90 it may still find out
        assert machine.speed(start, start + 20) >= 0.9 * best(busy) - BATCH / 20
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2
    assert re.match(r"1 thread instead of 2, 2\.1 times as fast: not all cores are free$", out[0])
    assert re.match(r"2 threads instead of 1, 1\.7 times as fast: more cores are free$", out[1])


def test_cores_that_become_idle_are_noticed_soon(monkeypatch):
    machine = Machine(monkeypatch, lambda seconds: int(seconds < 60))
    threads.set_up(None, CPU)
    machine.train(75)
    assert machine.speed(64, 74) >= 0.9 * best(0) - BATCH / 10


def test_beside_other_work_it_begins_with_the_cores_that_are_free(monkeypatch, capsys):
    for busy, number in ((0, 2), (1, 1), (2, 1)):
        machine = Machine(monkeypatch, lambda _, busy=busy: busy)
        threads.set_up(None, CPU)
        assert machine.number == number
        machine.train(62)
        assert all(used == number for when, used in machine.used if when > 2)  # after a first search
        assert capsys.readouterr().out == ""


def test_a_difference_within_the_noise_changes_nothing(monkeypatch, capsys):
    machine = Machine(monkeypatch)
    monkeypatch.setitem(SPEEDS, (1, 0), 640)
    threads.set_up(None, CPU)
    machine.train(60)
    assert capsys.readouterr().out == "" and machine.number == 2


def test_a_fluctuating_machine_does_not_fill_the_screen(monkeypatch, capsys):
    machine = Machine(monkeypatch, lambda seconds: int(seconds) // 10 % 2)
    threads.set_up(None, CPU)
    machine.train(600)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == threads.MAX_LINES and out[-1].endswith("further changes are not printed")


@pytest.mark.parametrize("number, device, adapt, processes", [
    (2, "cpu", True, 1), (1, "cpu", True, 1), (None, "cpu", False, 1), (None, "cuda", True, 1), (None, "cpu", True, 2)])
def test_a_fixed_number_stays(monkeypatch, number, device, adapt, processes):
    machine = Machine(monkeypatch, lambda _: 1)
    monkeypatch.setattr(threads.distributed, "world_size", lambda: processes)
    threads.set_up(number, torch.device(device), adapt)
    machine.train(60)
    assert {used for _, used in machine.used} == {number or 2}
    said = threads.describe()
    assert "from beginning to end" in said
    assert ("--threads 1 may be faster" in said) == (number != 1 and processes == 1)  # a process is busy


def test_between_the_steps_the_number_is_the_chosen_one(monkeypatch):
    """A validation or a file in between is not a part of a trial."""
    machine, between = Machine(monkeypatch), set()
    threads.set_up(None, CPU)
    tuner = ThreadTuner()
    while machine.now < 60:
        with tuner:
            machine.step()
        between.add(machine.number)
    assert between == {2} and {number for _, number in machine.used} == {1, 2}


def test_a_loop_that_ends_in_a_trial_leaves_the_chosen_number(monkeypatch):
    machine = Machine(monkeypatch)
    threads.set_up(None, CPU)
    for _ in ThreadTuner().steps(range(1000)):
        machine.step()
        if machine.number == 1:  # a trial
            break
    else:
        pytest.fail("there was no trial")
    assert machine.number == 2


def test_short_work_is_done_without_a_search_and_long_work_is_not(monkeypatch):
    for steps, tried in ((5, {2}), (40, {1, 2})):
        machine = Machine(monkeypatch)
        threads.set_up(None, CPU)
        for _ in ThreadTuner(threads.PATIENCE).steps(range(steps)):
            machine.step()
        assert {number for _, number in machine.used} == tried


def test_a_step_that_fails_leaves_the_chosen_number(monkeypatch):
    machine = Machine(monkeypatch)
    threads.set_up(None, CPU)
    tuner = ThreadTuner()
    with pytest.raises(MemoryError):
        while True:
            with tuner:
                machine.step()
                if machine.number == 1:  # a trial
                    raise MemoryError
    assert machine.number == 2


def test_all_halves_and_one_less_are_tried():
    assert [numbers_to_try(most) for most in (1, 2, 4, 8, 12)] == [
        [1], [2, 1], [4, 3, 2, 1], [8, 7, 4, 2, 1], [12, 11, 6, 3, 1]]


def test_a_container_that_may_use_two_of_many_cores_finds_that_out(monkeypatch):
    for number in (64, 63, 32, 16, 8, 4):
        monkeypatch.setitem(SPEEDS, (number, 0), 2000 / number)
    machine = Machine(monkeypatch, default=64, tells_idle=False)
    threads.set_up(None, CPU)
    machine.train(60)
    assert machine.number == 2 and machine.speed(20, 60) > 0.85 * best(0)


def test_idle_time_is_read_where_the_system_tells_it():
    found = threads.idle_and_total_time()
    assert (found is None and sys.platform != "linux") or (0 < found[0] < found[1] and found[2] >= 1)


@pytest.mark.parametrize("mine, found", [
    ({0, 2}, (14, 40, 2)),  # two of three cores: what others do on the third does not count
    ({1}, (1, 20, 1)),
    ({5, 6, 7}, (15, 60, 3)),  # a container that numbers its cores anew
    ({5}, (15, 60, 3))])
def test_only_the_cores_count_that_this_process_may_use(tmp_path, monkeypatch, mine, found):
    rows = {"cpu": 3 * 15, "cpu0": 6, "cpu1": 0, "cpu2": 6}
    lines = [f"{name} 5 0 {14 - idle} {idle} 1 0 0 0 3 3" for name, idle in rows.items()]
    (tmp_path / "stat").write_text("\n".join([*lines, "intr 1 2", "ctxt 3"]))
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: mine, raising=False)
    assert threads.idle_and_total_time() == found
