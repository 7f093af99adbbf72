"""Progress: on a terminal the clock moves every second, whatever the steps do; a log gets a few whole lines."""

import io
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from harness import needs_fork, tiny
from small import small_checkpoint

from data_sources.glyphs import BLOCK, draw_glyphs
from runtime import progress
from runtime.progress import FIRST_LINE, LATER_LINES, Bar, say
from training import run as training_run
from training.budget import Budget


def on_a_terminal(root, code: str, *argv, columns: int = 120) -> tuple[int, list[tuple[float, str]]]:
    """(exit status, (seconds, what was drawn) of each drawing) of python -c code, whose stderr is a terminal."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=root, stderr=theirs,
                               stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(theirs)
    said, start = [], time.monotonic()
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += [(time.monotonic() - start, text) for text in part.decode().split("\r") if text.strip()]
    os.close(ours)
    return process.wait(), said


def clocks(said) -> list[str]:
    return [found[0] for _, text in said if (found := re.findall(r"\b\d\d:\d\d\b", text))]


@needs_fork
@pytest.mark.parametrize("columns", [120, 0])  # 0: a terminal that does not know its size
def test_on_a_terminal_the_clock_moves_within_a_slow_step(root, columns):
    code = "import time\nfrom runtime.progress import Bar\nwith Bar('slow', 2, 'steps'): time.sleep(3.4)"
    status, said = on_a_terminal(root, code, columns=columns)
    shown = clocks(said)  # a busy machine may miss a second
    assert status == 0 and shown[0] == "00:00" and len(shown) >= 3 and shown == sorted(set(shown)), said
    assert all("slow:   0%|" in text and "0/2 steps" in text for _, text in said), said


@needs_fork
def test_on_a_terminal_quick_steps_are_drawn_once_a_second_and_the_bar_is_gone_at_the_end(root):
    code = ("import time\nfrom runtime.progress import progress\nend = time.monotonic() + 2.5\n"
            "for _ in progress('quick', 'steps')(range(10**9)):\n    if time.monotonic() > end: break")
    status, said = on_a_terminal(root, code)
    assert status == 0 and 2 <= len(said) <= 4 and "left" in said[-1][1]
    shown = [int(re.search(r"([\d,]+)/1,000,000,000 steps", text)[1].replace(",", "")) for _, text in said]
    assert shown == sorted(set(shown)) and shown[0] == 0 < shown[1]


def terminal(monkeypatch) -> io.StringIO:
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_bar_that_is_left_ends_with_100_percent_and_without_a_time_left(monkeypatch):
    stream = terminal(monkeypatch)
    done = [0.996]
    with Bar(total=1.0, ask=lambda: (done[0], "{note}", 10.0), leave=True):
        done[0] = 1.0
    drawn = [text for text in stream.getvalue().split("\r") if text.strip()]
    assert " 99%|" in drawn[0] and "{note}, 00:10 left" in drawn[0]
    assert drawn[-1].startswith("100%|") and "{note}" in drawn[-1] and "left" not in drawn[-1]
    assert drawn[-1].endswith("\n")


def test_lines_that_are_said_stand_above_the_bar(monkeypatch):
    stream = terminal(monkeypatch)
    with Bar("work", 2, leave=True):
        say("a line", sys.stderr)
    lines = [line.split("\r")[-1].strip() for line in stream.getvalue().split("\n")]
    assert lines[0] == "a line" and lines[1].startswith("work:   0%|")


def lines_of(seconds: float, monkeypatch) -> list[str]:
    """What a log holds after work of so many seconds, on a clock that goes 10,000 times as fast."""
    start, stream = time.monotonic(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS", 1e-4)
    monkeypatch.setattr(progress.time, "monotonic", lambda start=start, now=time.monotonic: 1e4 * (now() - start))
    with Bar("sampling", 100, "steps") as bar:
        while progress.time.monotonic() - bar._start < seconds:
            bar.done = 100 * (progress.time.monotonic() - bar._start) / seconds
            time.sleep(1e-4)
        bar.done = 100
    monkeypatch.undo()
    return stream.getvalue().splitlines()


def test_work_of_seconds_leaves_no_line_in_a_log(monkeypatch):
    seconds, stream = [0.0], io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS", 1e-4)
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    with Bar("sampling", 9, "steps") as bar:
        for seconds[0] in range(1, 10):
            time.sleep(0.005)
            bar.update()
    assert stream.getvalue() == ""


def test_a_log_gets_a_few_whole_lines(monkeypatch):
    lines = lines_of(36_000, monkeypatch)
    assert 20 <= len(lines) <= 40
    begun = [line for line in lines[:-1] if "  0%, 0/" not in line]  # before, a busy machine may write a few
    assert len(begun) >= 10
    assert all(re.fullmatch(r"sampling: +\d+%, \d+/100 steps, [\d:]+, [\d:]+ left", line) for line in begun), lines
    assert re.fullmatch(r"sampling: 100%, 100/100 steps, 1\d:\d\d:\d\d", lines[-1])


def test_lines_of_a_log_come_every_ten_seconds_at_first_and_then_less_often():
    times, seconds = [FIRST_LINE], FIRST_LINE
    while seconds < 36_000:
        seconds += max(FIRST_LINE, LATER_LINES * seconds)
        times.append(seconds)
    assert times[:4] == [10, 20, 30, 40] and len(times) < 36


def test_hidden_bars_and_bars_whose_terminal_is_gone_disturb_nothing(monkeypatch, capsys):
    with Bar("hidden", 3, hidden=True) as bar:
        bar.update(2)
    assert bar.done == 2 and capsys.readouterr().err == ""
    stream = terminal(monkeypatch)
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    with Bar("lost", 3) as bar:
        stream.close()
        time.sleep(0.1)
        bar.update()
    assert not bar._thread.is_alive()


def test_a_bar_that_an_exception_leaves_open_is_closed_before_the_message(capsys):
    from runtime.errors import UserError
    from runtime.script import script
    kept = []

    @script
    def main(argv=None):
        kept.append(progress.progress("work")(range(3)))
        next(kept[0])
        assert len(progress._open) == 1
        raise UserError("wrong")
    assert main([]) == 2 and not progress._open and capsys.readouterr().err.endswith("wrong\n")


def test_all_bars_are_ours(root):
    """No other module has bars of tqdm, which redraw themselves hundreds of times in a log."""
    folders = ("models", "data_sources", "training", "evaluation", "runtime", "benchmarks")
    paths = [*root.glob("*.py"), *(path for folder in folders for path in (root / folder).glob("*.py"))]
    assert [path.name for path in paths if re.search(r"(import|from) tqdm", path.read_text())] == ["progress.py"]


@needs_fork
@pytest.mark.parametrize("script", ["sample", "edit"])
def test_the_bar_of_sampling_moves_while_images_are_made(root, tmp_path, script):
    checkpoint, argv = small_checkpoint(tmp_path / "model.pt"), ["--steps", 5, "--device", "cpu", "--num_images", 2]
    if script == "edit":
        small_picture(tmp_path / "digit.png")
        argv = ["vary", *argv, "--strength", 1, "--image", tmp_path / "digit.png"]
    code = SLOW_SAMPLING.replace("SCRIPT", script)
    status, said = on_a_terminal(root, code, *argv, "--checkpoint", checkpoint, "--output", tmp_path / "x.png")
    title = {"sample": "sampling", "edit": "vary"}[script]
    shown = [int(found[1]) for _, text in said if (found := re.search(rf"{title}: +\d+%\|.*\| (\d)/5 steps", text))]
    assert status == 0 and shown == sorted(shown) and len(set(shown)) >= 2, said


SLOW_SAMPLING = """
import sys, time
from diffusion import DiffusionProcess
import SCRIPT
denoiser = DiffusionProcess.denoiser
def slow(*args, **more):
    denoise = denoiser(*args, **more)
    return lambda x, t: (time.sleep(0.5), denoise(x, t))[1]
DiffusionProcess.denoiser = slow
sys.exit(SCRIPT.main(sys.argv[1:]))
"""


def small_picture(path) -> None:
    from PIL import Image
    Image.new("L", (28, 28), 100).save(path)


def test_drawing_glyphs_shows_how_far_it_is():
    blocks = []
    draw_glyphs(2 * BLOCK + 1, 0, lambda items: blocks.extend(items) or items)
    assert blocks == [0, BLOCK, 2 * BLOCK]


# ------------------------------------------------------------------------------------------------------ training runs


class Unread:
    """The loss of a step on a GPU: reading it would wait for the device."""

    def __getattr__(self, name):
        raise AssertionError(f"the bar reads a loss on the device: {name}")


def small_run(device: str, **more):
    trainer = SimpleNamespace(step=430, steps_per_epoch=429, batch_size=100, device=torch.device(device))
    budget = Budget(429 * 20, None, time.perf_counter(), reserve=0.0)
    record = dict(loss=0.25, images_per_second=50.0)
    return SimpleNamespace(**dict(trainer=trainer, budget=budget, records=[record], losses=[], progress=0.05,
                                  marked_step=430, marked_time=0.0, step_time=0.0) | more)


def test_the_bar_of_a_run_never_waits_for_a_gpu():
    for device in ("cuda", "mps"):
        note = training_run.status(small_run(device, losses=[Unread()]))[1]
        assert note == "epoch 2/20, step 1/429, loss 0.250, 50 images/s"
    note = training_run.status(small_run("cpu", losses=[torch.tensor(0.5), torch.tensor(torch.nan)]))[1]
    assert "loss 0.500" in note


def test_the_speed_is_known_after_the_first_step_and_the_time_left_falls_within_a_slow_one():
    now = time.perf_counter()
    run = small_run("cpu", records=[], marked_step=429, marked_time=now - 2, step_time=now)
    _, note, left = training_run.status(run)
    assert note.endswith("50 images/s") and left == pytest.approx((429 * 20 - 430) * 2, abs=0.5)
    run.step_time, run.marked_time = now - 60, now - 62  # the step after it takes a minute
    assert training_run.status(run)[2] == pytest.approx(left - 60, abs=0.5)
    run = small_run("cpu", records=[], marked_step=430)
    assert training_run.status(run)[1:] == ("epoch 2/20, step 1/429", float("inf"))  # no step yet in this sitting


def test_the_time_left_of_a_budget_is_what_is_left_of_it():
    run = small_run("cpu", records=[])
    run.budget = Budget(float("inf"), 60.0, time.perf_counter() - 20)
    assert training_run.status(run)[2] == pytest.approx(40, abs=0.5)


SLOW_TRAINING = """
import sys, time
from training.trainer import Trainer
import train
step = Trainer.train_step
Trainer.train_step = lambda *args: (time.sleep(0.7), step(*args))[1]
train.PREVIEW_IMAGES = 4
sys.exit(train.main(sys.argv[1:]))
"""


@needs_fork
def test_the_bar_of_train_moves_after_every_step(root, data_dir, tmp_path):
    argv = tiny(data_dir, tmp_path, "--train_images", 448, "--epochs", 1, "--save_interval", 0, "--sample_interval", 0)
    status, said = on_a_terminal(root, SLOW_TRAINING, *argv, columns=80)
    assert status == 0, said
    steps = [int(re.search(r"epoch 1/1, step (\d)/7", text)[1]) for _, text in said]
    assert len(said) >= 5 and steps == sorted(steps) and len(set(steps)) >= 4
    middle = said[len(said) // 2][1]
    assert re.search(r"%\|.+\| 00:0\d, epoch 1/1, step \d/7, loss \d.\d+, \d+ images/s, 00:0\d left", middle), middle
    assert "100%|" in said[-1][1] and "left" not in said[-1][1]


def test_the_log_of_a_short_run_holds_no_bar(root, data_dir, tmp_path):
    argv = tiny(data_dir, tmp_path / "run", "--epochs", 1, "--sample_interval", 0)
    with (tmp_path / "log").open("w") as log:
        assert subprocess.run([sys.executable, "train.py", *argv], cwd=root, stdout=log, stderr=log,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
    said = (tmp_path / "log").read_text()
    assert "\r" not in said and "%" not in said and said.splitlines()[-1].startswith("Saved ")
