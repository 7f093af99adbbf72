"""What takes minutes: `make torture`. It ends with a table of what was tried, how often, and what was lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("FUZZ_CASES", "600")

import pytest
import test_fuzz
from harness import (
    STEPS,
    LittleMemory,
    StopAt,
    assert_identical,
    assert_same_run,
    assert_steps_once,
    files,
    kill_until_done,
    needs_fork,
    resume_if_begun,
    run,
    tiny,
    wait_until,
)
from small import small_checkpoint
from test_distributed import assert_same_to_rounding
from test_fuzz import (  # noqa: F401 (these run here too, with more cases)
    place,
    small,
    test_benchmark_refuses_or_begins_with_any_flags,
    test_distill_refuses_or_teaches_with_any_flags,
    test_doctor_refuses_or_examines_with_any_flags,
    test_edit_refuses_or_edits_with_any_flags,
    test_evaluate_refuses_or_makes_images_with_any_flags,
    test_sample_refuses_or_makes_images_with_any_flags,
    test_the_others_end_well_or_say_why_with_flags_that_make_sense,
    test_train_ends_well_or_says_why_with_flags_that_make_sense,
    test_train_refuses_or_runs_with_any_flags,
    test_visualize_refuses_or_draws_with_any_flags,
)
from test_hostile import loads_the_same_or_is_refused

from checkpoint import load_checkpoint
from training.run import newest_valid

KILLS = int(os.environ.get("KILLS", 40))
EVERY_STEP = ("--checkpoint_minutes", "0.000001")
LONG = ("--epochs", 6, "--sample_interval", 3, "--save_interval", 2)
TRIED = Counter()
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


class Table:
    """At the end, what was tried and how often. A loss is a failure: a table without failures says that nothing was."""

    def pytest_terminal_summary(self, terminalreporter):
        for (script, status), count in sorted(test_fuzz.CALLS.items()):
            TRIED[f"{script}.py called with random flags, ended with {status}"] = count
        terminalreporter.write_line("\n| what was tried | how often | lost |\n| --- | --- | --- |")
        for what, count in TRIED.items():
            lost = "see above" if terminalreporter.stats.get("failed") else "nothing"
            terminalreporter.write_line(f"| {what} | {count:,} | {lost} |")


@pytest.fixture(scope="module", autouse=True)
def table(request):
    request.config.pluginmanager.register(Table())


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """The folder of a run of 24 steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(tiny(data_dir, folder, *LONG), folder.parent / "log") == 0
    return folder


def script(root, name, *argv, cwd=None, timeout=300):
    """Run a script by its file, as a user does."""
    return subprocess.run([sys.executable, root / name, *map(str, argv)], cwd=cwd or root, capture_output=True,
                          timeout=timeout, env=ALONE)


# ------------------------------------------------------------------------------------------------------------ stopped


@needs_fork
def test_killed_again_and_again_a_run_ends_as_one_that_was_not(whole, data_dir, tmp_path):
    done, chance = 0, random.Random(1)
    for part in range(4):
        folder = tmp_path / str(part)
        met = kill_until_done(tiny(data_dir, folder, *LONG, *EVERY_STEP, "--keep_checkpoints", 1 + part),
                              tmp_path / f"log{part}", folder, KILLS // 4, chance, 0.1 * (part + 1))
        assert_same_run(whole, folder)
        done += met["kills"]
        TRIED["SIGKILL at a random moment of a run that saves after every step"] += met["kills"]
        TRIED["... of these in the middle of writing a file"] += met["while_writing"]
    assert done >= 20 or done >= KILLS


@needs_fork
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_any_step_and_resumed_it_ends_the_same(data_dir, tmp_path, stop):
    whole, log = tmp_path / "whole", tmp_path / "log"
    assert run(tiny(data_dir, whole), log) == 0
    for step in range(1, 2 * STEPS + 1):
        folder = tmp_path / str(step)
        assert run(tiny(data_dir, folder), log, StopAt(step, stop)) == 128 + stop
        assert newest_valid(folder)[1]["step"] == step
        assert run(tiny(data_dir, folder, "--resume"), log) == 0
        assert_same_run(whole, folder)
        TRIED[f"{stop.name} at every step, then --resume"] += 1


@needs_fork
def test_the_script_itself_killed_by_the_system_goes_on(root, whole, data_dir, tmp_path):
    folder = tmp_path / "run"
    argv = [sys.executable, "train.py", *tiny(data_dir, folder, *LONG, *EVERY_STEP)]
    with (tmp_path / "log").open("w") as log:
        for kill in range(3):
            known = set(folder.glob("checkpoints/*"))
            process = subprocess.Popen([*argv, *resume_if_begun(folder)], cwd=root, stdout=log, stderr=log, env=ALONE)
            while process.poll() is None and not set(folder.glob("checkpoints/*.pt")) - known:
                time.sleep(0.01)
            time.sleep(0.02 * kill)
            process.kill()
            assert process.wait(60) == -signal.SIGKILL
            TRIED["SIGKILL of python train.py started by its file"] += 1
    ended = subprocess.run([*argv, "--resume"], cwd=root, capture_output=True, env=ALONE, timeout=300)
    assert ended.returncode == 0, ended.stderr
    one, two = (load_checkpoint(each / "model_final.pt") for each in (whole, folder))
    for name in ("model", "ema", "optimizer"):
        assert_identical(one[name], two[name])
    assert_steps_once(folder)


# --------------------------------------------------------------------------------------------------- disk and memory


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_real_disk_that_fills_keeps_the_last_good_checkpoint(root, data_dir, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        argv = tiny(data_dir, disk / "run", *LONG, *EVERY_STEP)
        for ballast in (2_900_000, 2_500_000, 2_000_000, 1_500_000):
            (disk / "ballast").unlink(missing_ok=True)
            shutil.rmtree(disk / "run", ignore_errors=True)
            (disk / "ballast").write_bytes(bytes(ballast))
            ended = script(root, "train.py", *argv)
            assert ended.returncode in (0, 1, 2) and b"Traceback" not in ended.stderr
            if ended.returncode:
                assert b"left" in ended.stderr or b"No space left" in ended.stderr.splitlines()[-1]
            for path in (disk / "run").glob("**/*.pt"):
                load_checkpoint(path)
            (disk / "ballast").unlink()
            assert script(root, "train.py", *argv, *resume_if_begun(disk / "run")).returncode == 0
            TRIED["a disk of 3 MB that is full before or in the middle of a run, then --resume"] += 1
    finally:
        subprocess.run(["umount", disk], check=True)


@needs_fork
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is measured in /proc")
def test_a_real_want_of_memory_is_one_line_and_what_it_says_fits(data_dir, tmp_path):
    log, limit = tmp_path / "log", LittleMemory(800_000_000)
    argv = tiny(data_dir, tmp_path / "run", "--train_images", 32_768, "--epochs", 1, "--base_channels", 32,
                "--patch_size", 1, "--attention", 0)
    assert run([*argv, "--batch_size", "32768"], log, limit, timeout=300) == 1
    last = log.read_text().splitlines()[-1]
    assert "a batch of" in last and "fits (measured)" in last
    fits = int(last.split("a batch of ")[1].split()[0])
    assert 1 <= fits < 32_768
    fitting = [*argv, "--train_images", str(2 * fits), "--batch_size", str(fits), "--sample_interval", "0"]
    assert run(fitting, log, limit, timeout=300) == 0
    TRIED["a batch that the memory is too small for; the size that was told fits"] += 1


# --------------------------------------------------------------------------------------------------------- processes


def torchrun(data_dir, folder, *more):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *more, "train.py",
            *tiny(data_dir, folder, *LONG, *EVERY_STEP, "--optimizer", "adamw", "--keep_checkpoints", 2)]


def signalled(root, argv, folder, log, which, stop):
    """The exit status of torchrun, one of whose workers gets a signal after some steps."""
    with log.open("w") as said:
        agent = subprocess.Popen(argv, cwd=root, stdout=said, stderr=said, env=ALONE)
        while agent.poll() is None and not list(folder.glob("checkpoints/model_step_0000000[3-9].pt")):
            time.sleep(0.01)
        workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True).stdout
        os.kill(int(workers.split()[which]), stop)
        return agent.wait(400)


@pytest.fixture(scope="module")
def alone(root, data_dir, tmp_path_factory):
    """The folder of what torchrun is to learn, by one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert script(root, "train.py", *torchrun(data_dir, folder)[6:]).returncode == 0
    return folder


@needs_fork
def test_torchrun_learns_what_one_process_learns_and_survives_a_killed_worker(root, alone, data_dir, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    argv = torchrun(data_dir, folder, "--max_restarts=1")
    assert signalled(root, argv, folder, log, -1, signal.SIGKILL) == 0, log.read_text()[-3000:]
    assert "Resuming" in log.read_text()
    assert_same_to_rounding(alone, folder)
    assert_steps_once(folder)
    TRIED["a worker of torchrun killed; --max_restarts=1 goes on by itself"] += 1


@needs_fork
@pytest.mark.parametrize("worker", [0, 1])
def test_sigterm_to_a_worker_of_torchrun_stops_all_and_loses_nothing(root, alone, data_dir, tmp_path, worker):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert signalled(root, torchrun(data_dir, folder), folder, log, worker, signal.SIGTERM) == 1
    assert "Stopped by a signal" in log.read_text()
    assert subprocess.run([*torchrun(data_dir, folder), "--resume"], cwd=root, capture_output=True, env=ALONE,
                          timeout=300).returncode == 0
    assert_same_to_rounding(alone, folder)
    assert_steps_once(folder)
    TRIED["SIGTERM to one worker of torchrun: all stop and save, then --resume"] += 1


# --------------------------------------------------------------------------------------------------------------- fuzz


def test_thousands_of_changed_bytes_never_load_as_something_else(tmp_path):
    good = small_checkpoint(tmp_path / "good.pt", base_channels=4, patch_size=4)
    expected, content, chance = load_checkpoint(good), good.read_bytes(), random.Random(2)
    folder = content.index(b"PK\x01\x02")  # from here on the archive's own list of its parts
    for at in [*(chance.randrange(folder) for _ in range(2000)), *range(folder, len(content))]:
        changed = bytearray(content)
        changed[at] ^= chance.randrange(1, 256)
        same = loads_the_same_or_is_refused(bytes(changed), tmp_path / "flipped.pt", expected)
        TRIED[f"one byte of a checkpoint changed: {'loads the same' if same else 'refused'}"] += 1


BAD = ["", "-1", "0", "nan", "inf", "1e400", "x", "é", "9" * 400, "--", "/dev/null", "auto", "cuda:99", "a\nb"]
SCRIPTS = ("train.py", "sample.py", "visualize_diffusion.py", "edit.py", "evaluate.py", "doctor.py", "benchmark.py",
           "distill.py")


def random_argv(chance, name, data_dir):
    """Flags of a script, some of which make no sense."""
    short = [*test_fuzz.SHORT[4:-4], "--output_dir", "outputs", "--device", "cpu"]
    begin = {"train.py": ["--dataset", "glyphs", "--data_dir", str(data_dir), *short],
             "sample.py": ["--checkpoint", "model.pt", "--num_images", "2", "--steps", "2"],
             "visualize_diffusion.py": ["--dataset", "glyphs", "--data_dir", str(data_dir), "--num_images", "1"],
             "edit.py": [chance.choice(test_fuzz.COMMANDS), "--checkpoint", "model.pt", "--steps", "1", "--data_dir",
                         str(data_dir)],
             "evaluate.py": ["--checkpoint", chance.choice(["broken.pt", "none.pt"])],
             "doctor.py": ["--checkpoint", chance.choice(["broken.pt", "none.pt"])],
             "benchmark.py": ["--budgets", chance.choice(BAD)],
             "distill.py": ["--checkpoint", chance.choice(["model.pt", "broken.pt"]), "--budget", "10s", "--data_dir",
                            str(data_dir), "--teacher_steps", "2", "--batch_size", "4"]}[name]
    for _ in range(chance.randrange(4)):
        flag = chance.choice([*sorted(test_fuzz.VALID), "checkpoint", "steps", "device", "num_images", "nonsense"])
        values = test_fuzz.VALID.get(flag, BAD)
        begin += [f"--{flag}", *chance.choice([*values, *BAD]).split(" ")]
    return begin


def test_fifty_processes_with_random_flags_end_with_a_line_at_most(root, data_dir, tmp_path):
    def one(seed):
        chance, folder = random.Random(seed), tmp_path / str(seed)
        (folder / "outputs").mkdir(parents=True)
        small_checkpoint(folder / "model.pt", conditional=True, num_timesteps=8)
        (folder / "broken.pt").write_bytes(b"broken")
        (folder / "outputs/notes.txt").write_text("mine")
        before = files(folder)
        name = SCRIPTS[seed % len(SCRIPTS)]
        argv = random_argv(chance, name, data_dir)
        ended = script(root, name, *argv, cwd=folder)
        return name, argv, ended, before, files(folder)

    with ThreadPoolExecutor(int(os.environ.get("WORKERS", 2))) as pool:
        for name, argv, ended, before, after in pool.map(one, range(50)):
            said = [line for line in ended.stderr.decode().replace("\r", "\n").splitlines()
                    if line.strip() and not test_fuzz.is_bar(line)]
            about = json.dumps([name, argv, ended.returncode, said])
            assert ended.returncode in (0, 1, 2) and not any("Traceback" in line for line in said), about
            assert ended.returncode != 2 or (len(said) == 1 and before == after), about
            assert all(after.get(path) == content for path, content in before.items()), about
            TRIED[f"{name} as a process with random flags, ended with {ended.returncode}"] += 1


def test_a_second_process_is_refused_by_the_first_ones_lock(root, data_dir, tmp_path):
    from harness import start
    first = start(tiny(data_dir, tmp_path / "run", "--epochs", 10_000, "--sample_interval", 0, "--save_interval", 0),
                  tmp_path / "log")
    wait_until((tmp_path / "run/metrics.jsonl").exists, first)
    ended = script(root, "train.py", *tiny(data_dir, tmp_path / "run"))
    first.kill()
    first.join()
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and b"another run" in ended.stderr
    TRIED["a second process in the folder of a live one"] += 1
