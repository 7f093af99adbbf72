"""What takes minutes: `make torture`. It ends with a table of what was tried, how often, and what was lost.

Two processes are killed at random for a minute; for an hour: `TORTURE_MINUTES=60 make torture`.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("FUZZ_CASES", "600")

import pytest
import test_fuzz
from harness import (
    STEPS,
    TRIED,
    LittleMemory,
    StopAt,
    assert_identical,
    assert_same_run,
    assert_steps_once,
    files,
    free_port,
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
from training import run_record
from training.run import newest_valid

KILLS = int(os.environ.get("KILLS", 40))
THOROUGH = KILLS >= 10  # else some tests try one process of two, and not every step
EVERY_STEP = ("--checkpoint_minutes", "0.000001")
LONG = ("--epochs", 6, "--sample_interval", 3, "--save_interval", 2)
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def calls():
    """Add the calls of the fuzz tests to what was tried."""
    yield
    for (script, status), count in sorted(test_fuzz.CALLS.items()):
        TRIED[f"{script}.py called with random flags, ended with {status}"] += count


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
    assert done >= min(20, KILLS // 4 * 4)


@needs_fork
def test_stopped_at_any_step_and_resumed_it_ends_the_same(data_dir, tmp_path):
    whole, log = tmp_path / "whole", tmp_path / "log"
    assert run(tiny(data_dir, whole), log) == 0
    for step in range(1, 2 * STEPS + 1) if THOROUGH else (1, STEPS, STEPS + 1, 2 * STEPS):
        folder, stop = tmp_path / str(step), (signal.SIGTERM, signal.SIGINT)[step % 2]
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
    assert_same_weights(whole, folder)
    assert_steps_once(folder)


def assert_same_weights(*folders):
    """Two runs end the same, bit for bit; the validations may have looked at different numbers of images."""
    one, two = (load_checkpoint(folder / "model_final.pt") for folder in folders)
    for name in ("model", "ema", "optimizer"):
        assert_identical(one[name], two[name])


# --------------------------------------------------------------------------------------------------- disk and memory


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_real_disk_that_fills_keeps_the_last_good_checkpoint(data_dir, tmp_path):
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        argv = tiny(data_dir, disk / "run", *LONG, *EVERY_STEP)
        for ballast in (2_900_000, 2_500_000, 2_000_000, 1_500_000):
            (disk / "ballast").unlink(missing_ok=True)
            shutil.rmtree(disk / "run", ignore_errors=True)
            (disk / "ballast").write_bytes(bytes(ballast))
            log.unlink(missing_ok=True)
            status = run(argv, log)
            assert status in (0, 1, 2)
            if status:
                assert "left" in log.read_text().splitlines()[-1]
            for path in (disk / "run").glob("**/*.pt"):
                load_checkpoint(path)
            (disk / "ballast").unlink()
            assert run([*argv, *resume_if_begun(disk / "run")], log) == 0, log.read_text()
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
    assert run(fitting, log, limit, timeout=300) == 0, log.read_text()[-2000:]
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
        os.kill(workers(agent)[which], stop)
        return agent.wait(400)


def workers(agent):
    """The process numbers of torchrun's workers."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True).stdout
    return [int(number) for number in found.split()]


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
@pytest.mark.parametrize("worker", [0, 1] if THOROUGH else [1])
def test_sigterm_to_a_worker_of_torchrun_stops_all_and_loses_nothing(root, alone, data_dir, tmp_path, worker):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert signalled(root, torchrun(data_dir, folder), folder, log, worker, signal.SIGTERM) == 1
    assert "Stopped by a signal" in log.read_text()
    assert subprocess.run([*torchrun(data_dir, folder), "--resume"], cwd=root, capture_output=True, env=ALONE,
                          timeout=300).returncode == 0
    assert_same_to_rounding(alone, folder)
    assert_steps_once(folder)
    TRIED["SIGTERM to one worker of torchrun: all stop and save, then --resume"] += 1


@needs_fork
def test_a_restart_does_not_adopt_the_run_that_lay_in_the_folder(root, alone, data_dir, tmp_path):
    """The first attempt of a new launch is killed while it starts, before it has moved the older run aside."""
    folder, log = tmp_path / "run", tmp_path / "log"
    assert run(tiny(data_dir, folder, "--seed", 77), log) == 0
    before = files(folder)
    with log.open("w") as said:
        agent = subprocess.Popen(torchrun(data_dir, folder, "--max_restarts=1"), cwd=root, stdout=said, stderr=said,
                                 env=ALONE)
        while not (started := workers(agent)):
            time.sleep(0.01)
        os.kill(started[0], signal.SIGKILL)
        assert agent.wait(200) == 0, log.read_text()[-3000:]
    assert "Resuming" not in log.read_text()
    assert_same_to_rounding(alone, folder)
    [moved] = (folder / "previous").iterdir()
    assert files(moved) == before
    TRIED["the first attempt of torchrun killed in a folder with an older run, which stays as it was"] += 1


@needs_fork
@pytest.mark.parametrize("machine", [0, 1] if THOROUGH else [0])
def test_two_machines_go_on_after_a_worker_of_one_is_killed(root, alone, data_dir, tmp_path, machine):
    """The README's command for two machines, here for two agents on one; only one of them counts a restart."""
    folder = tmp_path / "run"
    port = free_port()
    argv = torchrun(data_dir, folder, "--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
                    "--max_restarts=2")
    argv = [word.replace("--nproc_per_node=2", "--nproc_per_node=1") for word in argv if word != "--standalone"]
    with (tmp_path / "log").open("w") as said:
        agents = [subprocess.Popen(argv, cwd=root, stdout=said, stderr=said, env=ALONE) for _ in range(2)]
        while not list(folder.glob("checkpoints/model_step_0000000[3-9].pt")):
            assert all(agent.poll() is None for agent in agents), (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        os.kill(workers(agents[machine])[0], signal.SIGKILL)
        try:
            assert [agent.wait(120) for agent in agents] == [0, 0], (tmp_path / "log").read_text()[-3000:]
        finally:
            for agent in agents:
                agent.terminate()
    assert "Resuming" in (tmp_path / "log").read_text()
    assert_same_to_rounding(alone, folder)
    assert_steps_once(folder)
    TRIED["a worker on one of two machines killed: both go on by themselves"] += 1


# --------------------------------------------------------------------------------------------------- Ctrl-C, twice


@needs_fork
@pytest.mark.parametrize("several", [False, True], ids=["python", "torchrun"])
def test_ctrl_c_twice_within_a_twentieth_of_a_second_loses_nothing(root, whole, alone, data_dir, tmp_path, several):
    """To all processes of the terminal, as the key does; torchrun sends its workers another signal by itself."""
    for gap in (0.02,) if several else (0.0, 0.05):
        folder, log = tmp_path / str(gap), tmp_path / "log"
        argv = (torchrun(data_dir, folder) if several
                else [sys.executable, "train.py", *tiny(data_dir, folder, *LONG, *EVERY_STEP)])
        with log.open("w") as said:
            process = subprocess.Popen(argv, cwd=root, stdout=said, stderr=said, env=ALONE, start_new_session=True)
            while process.poll() is None and not list(folder.glob("checkpoints/model_step_0000000[3-9].pt")):
                time.sleep(0.01)
            for number in (process.pid, *workers(process)):  # torchrun's workers have left its group
                os.kill(number, signal.SIGINT)
            time.sleep(gap)
            os.kill(process.pid, signal.SIGINT)
            status = process.wait(100)
        assert status == (1 if several else 130), log.read_text()[-3000:]
        assert "Ctrl-C: saving after this step, press Ctrl-C once more" in log.read_text()
        assert not list(folder.rglob("*.tmp"))
        assert run_record.sittings(folder)[-1]["how"] == "stopped by SIGINT"
        saved = newest_valid(folder)[1]["step"]
        assert f"Stopped by a signal after {saved} steps" in log.read_text()
        if several:
            ended = subprocess.run([*argv, "--resume"], cwd=root, capture_output=True, env=ALONE, timeout=100)
            assert ended.returncode == 0, ended.stderr
            assert_same_to_rounding(alone, folder)
        else:
            assert run([*argv[2:], "--resume"], log) == 0, log.read_text()
            assert_same_weights(whole, folder)
        assert_steps_once(folder)
        TRIED[f"Ctrl-C twice within 0.05 s under {'torchrun' if several else 'python'}, then --resume"] += 1


# --------------------------------------------------------------------------------- an hour of kills, or TORTURE_MINUTES


KILLED_ONE, KILLED_ALL = (f"two processes: SIGKILL of {which} at a random moment" for which in (
    "one of them", "both and torchrun"))


class Launch:
    """A run of two processes by torchrun, of which any may be killed at any moment."""

    def __init__(self, root, argv, folder, log):
        self.folder, self.said = folder, log.open("a")
        self.agent = subprocess.Popen(argv, cwd=root, stdout=self.said, stderr=self.said, env=ALONE)

    def wait(self, seconds, condition=lambda: False):
        """Wait so long, or until the condition is true or the launch has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.agent.poll() is None and not condition():
            time.sleep(0.02)

    def wait_for_a_moment(self, chance):
        """Wait for a random moment of a start, or for one shortly after a checkpoint was written."""
        if chance.random() < 1 / 4:
            return self.wait(chance.uniform(0, 8))
        before = set(self.folder.glob("checkpoints/*.pt"))
        self.wait(20, lambda: set(self.folder.glob("checkpoints/*.pt")) - before)
        self.wait(chance.uniform(0, 0.5))

    def kill(self, which):
        """Kill one worker or, as a power cut does, all processes; returns how many were killed."""
        found = workers(self.agent)
        victims = [self.agent.pid, *found] if which == "all" else found[which:][:1]
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        if which == "all":
            self.agent.wait(30)
            for victim in found:
                while os.path.exists(f"/proc/{victim}") and "State:\tZ" not in status_of(victim):
                    time.sleep(0.01)
        return len(victims)


def status_of(number):
    with contextlib.suppress(OSError):
        return open(f"/proc/{number}/status").read()
    return "State:\tZ"


def ended_under_fire(root, data_dir, folder, log, seed, chance, end):
    """Start a run, kill its processes at random moments while there is time, and resume it until it has ended."""
    kills, resume = chance.randrange(2, 7), []
    while True:
        argv = [*torchrun(data_dir, folder, "--max_restarts=20"), "--seed", str(seed), *resume]
        launch = Launch(root, argv, folder, log)
        while kills and time.monotonic() < end:
            launch.wait_for_a_moment(chance)
            which = chance.choice([0, 1, "all"])
            if launch.agent.poll() is not None or not launch.kill(which):
                break
            kills -= 1
            TRIED[KILLED_ALL if which == "all" else KILLED_ONE] += 1
            if which == "all":
                break
        status = launch.agent.wait(200)
        launch.said.close()
        if status == 0:
            return
        assert status == -signal.SIGKILL, log.read_text()[-5000:]
        last = run_record.sittings(folder)[-1:]
        resume = ["--resume"] if last and last[0]["seed"] == seed else []  # it was killed before it wrote anything


@needs_fork
@pytest.mark.skipif(sys.platform != "linux", reason="processes that have ended are looked up in /proc")
def test_random_kills_and_restarts_lose_and_mix_no_run(root, alone, data_dir, tmp_path):
    """Runs of two seeds in turn in one folder: each ends as if it were alone, and none of the older ones is lost."""
    minutes = float(os.environ.get("TORTURE_MINUTES", 1))
    folder, chance, finals = tmp_path / "run", random.Random(4), []
    references = [alone, tmp_path / "seed 1"]
    assert script(root, "train.py", *torchrun(data_dir, references[1])[6:], "--seed", 1).returncode == 0
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end or len(finals) < 2:
        seed = len(finals) % 2
        ended_under_fire(root, data_dir, folder, tmp_path / "log", seed, chance, end)
        assert_same_to_rounding(references[seed], folder)
        assert_steps_once(folder)
        assert not list(folder.rglob("*.tmp"))
        sittings = run_record.sittings(folder)
        assert {sitting["seed"] for sitting in sittings} == {seed} and sittings[-1]["how"] == "completed"
        finals.append((folder / "model_final.pt").read_bytes())
        TRIED["two processes: restarts of a run that had begun, by torchrun or by hand"] += len(sittings) - 1
        TRIED[f"two processes: runs that ended as one without a kill, in {minutes:g} minutes"] += 1
    kept = [path.read_bytes() for path in [folder / "model_final.pt", *folder.glob("previous/*/model_final.pt")]]
    assert set(finals) <= set(kept) and TRIED[KILLED_ONE] + TRIED[KILLED_ALL] > 0


# --------------------------------------------------------------------------------------------------------------- fuzz


def test_thousands_of_changed_bytes_never_load_as_something_else(tmp_path):
    good = small_checkpoint(tmp_path / "good.pt", base_channels=4, patch_size=4)
    expected, content, chance = load_checkpoint(good), good.read_bytes(), random.Random(2)
    folder = content.index(b"PK\x01\x02")  # from here on the archive's own list of its parts
    step = max(1, 30 // test_fuzz.CASES)
    for at in [*(chance.randrange(folder) for _ in range(4 * test_fuzz.CASES)), *range(folder, len(content), step)]:
        changed = bytearray(content)
        changed[at] ^= chance.randrange(1, 256)
        same = loads_the_same_or_is_refused(bytes(changed), tmp_path / "flipped.pt", expected)
        TRIED[f"one byte of a checkpoint changed: {'loads the same' if same else 'refused'}"] += 1


BAD = ["", "-1", "0", "nan", "inf", "1e400", "x", "é", "9" * 400, "--", "/dev/null", "auto", "cuda:99", "a\nb"]
SCRIPTS = ("train.py", "sample.py", "visualize_diffusion.py", "edit.py", "evaluate.py", "doctor.py", "benchmark.py",
           "distill.py", "export.py")


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
             "export.py": ["--checkpoint", chance.choice(["model.pt", "broken.pt"])],
             "distill.py": ["--checkpoint", chance.choice(["model.pt", "broken.pt"]), "--budget", "10s", "--data_dir",
                            str(data_dir), "--teacher_steps", "2", "--batch_size", "4"]}[name]
    for _ in range(chance.randrange(4)):
        flag = chance.choice([*sorted(test_fuzz.VALID), "checkpoint", "steps", "device", "num_images", "nonsense"])
        values = test_fuzz.VALID.get(flag, BAD)
        begin += [f"--{flag}", *chance.choice([*values, *BAD]).split(" ")]
    return begin


def test_processes_with_random_flags_end_with_a_line_at_most(root, data_dir, tmp_path):
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

    count = int(os.environ.get("PROCESSES", 50))
    with ThreadPoolExecutor(int(os.environ.get("WORKERS", 2))) as pool:
        for name, argv, ended, before, after in pool.map(one, range(count)):
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
