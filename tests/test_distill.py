"""Distillation: on Gaussian data, whose paths have a closed form, the loss knows the jump to their end; the script."""

import errno
import functools
import io
import json
import os
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import assert_refused, files, metrics
from small import small_checkpoint, small_model, with_level_code
from torch.testing import assert_close

import distill
import doctor
import edit
import sample
import train
from checkpoint import load_checkpoint, load_model
from data import code_of, load_dataset, to_uint8
from diffusion import PREDICTIONS, SCHEDULES, DiffusionProcess
from distill import Consistency
from samplers import (
    DEFAULT_GUIDANCE,
    DEFAULT_SAMPLER,
    DEFAULT_STEPS,
    SAMPLERS,
    STUDENT_SAMPLER,
    STUDENT_STEPS,
    final_image,
    guide,
    image_noise,
    uniform_timesteps,
)
from training import run_folder, run_record
from training.budget import Budget
from training.trainer import Trainer

MEAN = torch.tensor([[-0.3, 0.0, 0.2], [0.3, -0.2, 0.1]]).view(1, 1, 2, 3)
STD = torch.tensor([[0.05, 0.1, 0.15], [0.08, 0.12, 0.1]]).view(1, 1, 2, 3)  # no x_0_hat is clipped


class Teacher:
    """E[x_0 | x_t] for independent pixels N(MEAN, STD²)."""

    num_classes = None

    def __init__(self, process):
        self.process = process

    def rates(self, t):
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return alpha, (alpha * STD) ** 2 + sigma**2

    def __call__(self, x_t, t):
        alpha, variance = self.rates(t)
        return MEAN + alpha * STD**2 / variance * (x_t - alpha * MEAN)


class Jump(Teacher):
    """The end of the probability-flow ODE's path from x_t, for the same data."""

    def __call__(self, x_t, t):
        alpha, variance = self.rates(t)
        return MEAN + STD / variance.sqrt() * (x_t - alpha * MEAN)


def gaussian(steps, order=2, schedule="cosine"):
    process = DiffusionProcess(1000, schedule, prediction="x0", data_std=0.1)
    return Consistency(process, Teacher(process), steps, order=order)


def draw(process, count=2000):
    """Images, times and noise, of which the network sees x_t."""
    chance = torch.Generator().manual_seed(0)
    x_0 = MEAN + STD * torch.randn(count, 1, 2, 3, generator=chance)
    return x_0, process.sample_timesteps(count, chance), torch.randn(x_0.shape, generator=chance)


# ---------------------------------------------------------------------------------------------------- the right jump


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_exact_jump_has_nearly_no_loss_and_the_teacher_has(schedule):
    process = gaussian(80, schedule=schedule)
    x_0, t, noise = draw(process)
    exact, plain = (process.loss(model(process), x_0, t, noise).item() for model in (Jump, Teacher))
    assert 0 <= exact < plain / 100 and exact < 1e-6, (exact, plain)


@pytest.mark.parametrize("order, low, high", [(1, 3.5, 5.5), (2, 7, 12)])
def test_a_step_of_the_teacher_misses_its_path_by_its_order(order, low, high):
    """By O(h²) or O(h³) in one step of length h: half the step is wrong by about a quarter or an eighth."""
    errors, x_t = [], torch.linspace(-0.6, 0.6, 30).view(5, 1, 2, 3)
    for steps in (16, 32, 64):
        process = gaussian(steps, order)
        t = process.times[[steps // 4]].repeat(5)  # about the same in all three
        away = process.image(Jump(process), x_t, t) - Jump(process)(x_t, t)
        errors.append(away.square().mean().sqrt().item())
    assert low < errors[0] / errors[1] < high and low < errors[1] / errors[2] < high, errors


def test_at_the_end_of_the_path_the_image_is_the_teachers_own():
    process = gaussian(10)
    x_0, _, noise = draw(process, 50)
    t = torch.linspace(0, process.times[1].item(), 50)
    x_t = process.q_sample(x_0, t, noise)
    image = process.image(lambda x, t: x * torch.nan, x_t, t)
    assert torch.equal(process.next_time(t), torch.full((50,), -1.0))
    assert_close(image, Teacher(process)(x_t, t))


def test_one_step_further_down_it_is_what_the_student_sees_there():
    process = gaussian(10)
    t, x_t = process.times[[5, 7]], torch.linspace(-1, 1, 12).view(2, 1, 2, 3)
    seen = []

    def student(x, t):
        seen.append((x, t))
        return x / 8
    image = process.image(student, x_t, t)
    [(x_s, s)] = seen
    assert torch.equal(s, process.times[[4, 6]])
    assert_close(image, x_s / 8)


def spread(sampler, network, steps):
    """How many times as wide as the data what a sampler makes with a network is, at the widest and at the narrowest."""
    process, chance = DiffusionProcess(1000, "cosine", prediction="x0"), torch.Generator().manual_seed(0)
    x_T = torch.randn(20_000, 1, 2, 3, generator=chance)
    times, randn = uniform_timesteps(1000, steps), lambda x: torch.randn(x.shape, generator=chance)
    denoise = process.denoiser(network(process))
    images = final_image(SAMPLERS[sampler].function(denoise, x_T, times, process, randn=randn))
    assert_close(images.mean(0, keepdim=True), MEAN, rtol=0, atol=0.01)
    ratio = images.std(0) / STD
    return ratio.max().item(), ratio.min().item()


@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_jumps_with_fresh_noise_between_them_keep_the_spread_of_the_data(steps):
    assert_close(torch.tensor(spread("consistency", Jump, steps)), torch.ones(2), rtol=0, atol=0.02)


def test_without_fresh_noise_they_make_it_too_wide_and_a_mean_of_images_makes_it_too_narrow():
    """ddim's noise_hat after a jump from x_T is x_T, on which the image depends: their variances do not just add up."""
    assert spread("ddim", Jump, 2)[1] > 1.04 and spread("ddim", Jump, 16)[1] > 1.3  # measured 1.05 and 1.39
    assert spread("consistency", Teacher, 16)[0] < 0.7  # measured 0.57


# ----------------------------------------------------------------------------------------------------------- the times


@pytest.mark.parametrize("T, steps", [(2, 2), (10, 2), (10, 10), (1000, 20)])
def test_times_lie_on_the_path_and_every_step_of_it_is_as_likely(T, steps):
    process = Consistency(DiffusionProcess(T, "cosine", prediction="v", data_std=0.5), None, steps)
    assert process.times[0] == -1 and process.times[-1] == T - 1 and len(process.times) == steps + 1
    t = process.sample_timesteps(100 * steps, torch.Generator().manual_seed(0))
    s = process.next_time(t)
    assert t.min() >= 0 and t.max() <= T - 1 and bool((s < t).all())
    counts = torch.stack([(s == end).sum() for end in process.times[:-1]])
    assert (counts - 100).abs().max() <= 1  # a time may round to the end of its step
    assert torch.equal(process.next_time(process.times[1:]), process.times[:-1])


# -------------------------------------------------------------------------------------------------------- the gradient


def test_the_target_has_no_gradient():
    process = DiffusionProcess(40, "cosine", prediction="edm", data_std=0.6)
    student = small_model().requires_grad_(True)
    consistency = Consistency(process, small_model(), 4)
    x_0, noise = torch.rand(6, 1, 28, 28) * 2 - 1, torch.randn(6, 1, 28, 28)
    t = consistency.sample_timesteps(6)
    consistency.loss(student, x_0, t, noise).backward()
    given = [weight.grad.clone() for weight in student.parameters()]
    student.zero_grad()
    x_t = process.q_sample(x_0, t, noise)
    image = consistency.image(student, x_t, t)
    assert not image.requires_grad
    target = process.target(image, (x_t - process.alpha(t) * image) / process.sigma(t), t)
    squares = (process.predict(student, x_t, t) - target).square().flatten(1).mean(1)
    ((squares + distill.HUBER**2).sqrt() - distill.HUBER).mean().backward()
    assert_close(given, [weight.grad for weight in student.parameters()])
    assert any(grad.abs().max() > 0 for grad in given)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("more", [{}, {"zero_terminal_snr": True}, {"learn_variance": True}], ids=str)
def test_every_kind_of_teacher_gives_a_finite_loss_and_gradient_at_every_time(prediction, schedule, more):
    if "zero_terminal_snr" in more and prediction == "eps":
        pytest.skip("these two do not go together")
    learn_variance = more.pop("learn_variance", False)
    process = DiffusionProcess(100, schedule, prediction=prediction, data_std=0.6, **more)
    student = small_model(learn_variance=learn_variance).requires_grad_(True)
    consistency = Consistency(process, small_model(learn_variance=learn_variance), 8)
    loss = consistency.loss(student, torch.rand(100, 1, 8, 8) * 2 - 1, torch.arange(100), reduction="none")
    with torch.no_grad():
        real = consistency.loss(student, torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([0.3, 50.5, 98.2, 98.9]))
    assert real.isfinite()
    loss.mean().backward()
    assert loss.shape == (100,) and bool((loss >= 0).all() & loss.isfinite().all())
    assert all(weight.grad.isfinite().all() for weight in student.parameters())


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_is_baked_in(scale):
    process, teacher = DiffusionProcess(40, "cosine", prediction="v"), small_model(num_classes=3)
    consistency = Consistency(process, teacher, 4, guidance_scale=scale)
    x_t, t, labels = torch.randn(3, 1, 8, 8), torch.zeros(3), torch.arange(3)
    assert_close(consistency.image(teacher, x_t, t, labels), guide(process, teacher, labels, scale)(x_t, t))


# ---------------------------------------------------------------------------------------------------------- the script


STEPS, PROGRESS = 4, Budget.progress
KNOWN = functools.cache(lambda *names: load_dataset(*names).first(64))


@pytest.fixture(scope="module", autouse=True)
def short():
    """Little data, and runs that are over after STEPS steps, however long these take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "load_dataset", KNOWN)
        patch.setattr(Budget, "progress", lambda budget, step, _: step / STEPS)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("teacher") / "model_final.pt", conditional=True)


def flags(checkpoint, data_dir, folder, *more):
    return list(map(str, ["--checkpoint", checkpoint, "--data_dir", data_dir, "--output_dir", folder, "--device", "cpu",
                          "--teacher_steps", 4, "--batch_size", 16, "--precision", "fp32", *more]))


@pytest.fixture(scope="module")
def student(teacher, data_dir, tmp_path_factory):
    """The folder of a student."""
    folder = tmp_path_factory.mktemp("student") / "outputs"
    assert distill.main(flags(teacher, data_dir, folder, "--guidance_scale", 2)) == 0
    return folder


def test_the_student_is_a_checkpoint_that_says_what_it_is(student, teacher):
    saved, before = (load_checkpoint(path) for path in (student / "model_final.pt", teacher))
    assert all(saved["config"][part] == before["config"][part] for part in ("model", "diffusion", "data"))
    training = saved["config"]["training"]
    assert training["student"] and (training["checkpoint"], training["teacher_steps"]) == (str(teacher), 4)
    assert training["guidance_scale"] == 2
    assert (saved["step"], saved["images_seen"], saved["history"]["skipped"]) == (STEPS, 16 * STEPS, [0, 0])
    for part in ("model", "ema"):
        changed = [name for name in saved[part] if not torch.equal(saved[part][name], before["ema"][name])]
        assert len(changed) > len(saved[part]) / 2


def test_it_writes_what_it_promises(student):
    assert sorted(files(student)) == ["metrics.jsonl", "model_final.pt", "run.json", "samples.png"]
    [sitting] = run_record.sittings(student)
    assert sitting["command"].startswith("python distill.py --checkpoint ") and sitting["how"] == "completed"
    [record] = metrics(student)
    assert record.keys() == {"step", "epoch", "images_seen", "loss", "val_loss", "lr", "images_per_second", "seconds"}
    assert record["step"] == STEPS and record["loss"] > 0 and record["val_loss"] is None


def test_the_student_draws_in_one_step_what_it_sees_in_the_noise(student, tmp_path):
    path, drawn = tmp_path / "images.npz", {}
    for sampler, steps in (("consistency", 1), ("consistency", 2), ("ddim", 2)):
        assert sample.main(["--checkpoint", str(student / "model_final.pt"), "--sampler", sampler, "--steps",
                            str(steps), "--num_images", "3", "--device", "cpu", "--precision", "fp32", "--output",
                            str(path)]) == 0
        drawn[sampler, steps] = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2).int()
    model, process, _ = load_model(student / "model_final.pt")
    noise, t = image_noise(range(3), 0, (1, 28, 28))(), torch.full((3,), float(process.num_timesteps - 1))
    seen = process.denoiser(model, torch.arange(3))(noise, t)
    assert bool(seen.isfinite().all()) and seen.std() > 0.1
    assert (drawn["consistency", 1] - to_uint8(seen)).abs().max() <= 1
    assert all((drawn["consistency", 2] - drawn[other]).abs().max() > 1 for other in (("consistency", 1), ("ddim", 2)))


def test_without_flags_a_student_jumps_and_asks_for_no_further_guidance(student, tmp_path, capsys):
    drawn = []
    for more in ([], ["--sampler", "consistency", "--steps", "2", "--guidance_scale", "1"]):
        path = tmp_path / f"{len(more)}.npz"
        assert sample.main(["--checkpoint", str(student / "model_final.pt"), "--num_images", "3", "--device", "cpu",
                            "--output", str(path), *more]) == 0
        drawn.append(np.load(path)["arr_0"])
    assert np.array_equal(*drawn)
    assert "by consistency in 2 steps" in capsys.readouterr().out


def test_a_student_is_not_edited_with(student, tmp_path, capsys):
    argv = ["interpolate", "--checkpoint", str(student / "model_final.pt"), "--output", str(tmp_path / "x.png")]
    assert edit.main(argv) == 2
    assert "teacher" in capsys.readouterr().err and not files(tmp_path)


def test_the_doctor_judges_a_students_jumps_and_does_not_measure_it_as_a_mean(student, teacher, data_dir, monkeypatch,
                                                                             capsys):
    monkeypatch.setattr(doctor, "load_dataset", KNOWN)
    monkeypatch.setattr(doctor, "check_samples", lambda *_: [])  # so that what comes after it is looked at too
    for name, count in (("SAMPLES", 16), ("REAL", 8), ("BOUND_IMAGES", 16), ("ERROR_IMAGES", 8)):
        monkeypatch.setattr(doctor, name, count)
    seen, asked, made = {}, {}, doctor.all_images
    for who, path in (("student", student / "model_final.pt"), ("teacher", teacher)):
        asked[who] = []
        monkeypatch.setattr(doctor, "all_images", lambda *args, who=who, **how: asked[who].append(
            (how["sampler"], how["steps"], how["guidance_scale"])) or made(*args, **how))
        doctor.main(["--checkpoint", str(path), "--data_dir", str(data_dir), "--device", "cpu", "--json"])
        seen[who] = {finding["check"] for finding in json.loads(capsys.readouterr().out)}
    assert asked["student"] == [(STUDENT_SAMPLER, STUDENT_STEPS, 1.0)]
    assert asked["teacher"] == [(DEFAULT_SAMPLER, steps * DEFAULT_STEPS, DEFAULT_GUIDANCE) for steps in (1, 2)]
    assert seen["teacher"] - seen["student"] == {"error against t", "labels used", "steps"}
    assert {"history of the loss", "copies", "recognisable"} <= seen["student"]


def test_learning_makes_the_student_more_consistent(teacher, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Budget, "progress", lambda budget, step, _: step / 40)
    monkeypatch.setattr(distill, "LOG_STEPS", 10)
    assert distill.main(flags(teacher, data_dir, tmp_path)) == 0
    losses = [record["loss"] for record in metrics(tmp_path)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert load_checkpoint(tmp_path / "model_final.pt")["config"]["training"]["guidance_scale"] == DEFAULT_GUIDANCE


def test_distilling_adapts_its_number_of_threads_unless_it_is_given(cores, teacher, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Budget, "progress", lambda budget, step, _: step / 8)
    assert distill.main(flags(teacher, data_dir, tmp_path / "a")) == 0 and set(cores) == {1, 2}
    cores.clear()
    assert distill.main(flags(teacher, data_dir, tmp_path / "b", "--threads", 2)) == 0 and set(cores) == {2}


def test_an_unconditional_teacher_has_a_student_too(data_dir, tmp_path):
    teacher = small_checkpoint(tmp_path / "teacher.pt", num_timesteps=4)
    assert distill.main(flags(teacher, data_dir, tmp_path / "run", "--teacher_order", 1)) == 0
    model, _, saved = load_model(tmp_path / "run/model_final.pt")
    assert model.num_classes is None and saved["config"]["training"]["guidance_scale"] == 1


def test_an_older_students_results_move_aside(student, teacher, data_dir, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    before = files(student)
    for name, content in before.items():
        (folder / name).write_bytes(content)
    assert distill.main(flags(teacher, data_dir, folder)) == 0
    [place] = (folder / "previous").iterdir()
    assert files(place) == before and {*before} <= {*files(folder)}


# ------------------------------------------------------------------------------------------------- stopped and refused


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_has_its_exit_status(teacher, data_dir, tmp_path, monkeypatch, capfd, stop):
    batch = Trainer.batch

    def stopped(trainer):
        if trainer.step == 1:
            os.kill(os.getpid(), stop)
        return batch(trainer)
    monkeypatch.setattr(Trainer, "batch", stopped)
    assert distill.main(flags(teacher, data_dir, tmp_path)) == 128 + stop
    assert sorted(files(tmp_path)) == ["checkpoints/model_step_00000002.pt", "metrics.jsonl", "run.json"]
    saved = load_checkpoint(tmp_path / "checkpoints/model_step_00000002.pt")
    assert saved["step"] == 2 and metrics(tmp_path)[-1]["step"] == 2
    assert "model_step_00000002.pt" in capfd.readouterr().out
    assert_refused(capfd, train.main(["--resume", "--output_dir", str(tmp_path)]), "student", "--output_dir")


def test_a_lost_terminal_ends_nothing(teacher, data_dir, tmp_path, monkeypatch):
    class Lost(io.StringIO):
        def isatty(self):
            return True

        def write(self, _):
            raise OSError(errno.EIO, "the terminal is gone")
    monkeypatch.setattr(sys, "stdout", Lost())
    monkeypatch.setattr(sys, "stderr", Lost())
    assert distill.main(flags(teacher, data_dir, tmp_path)) == 0
    assert load_checkpoint(tmp_path / "model_final.pt")["step"] == STEPS


def test_steps_without_a_finite_loss_change_nothing_and_too_many_stop_the_run(teacher, data_dir, tmp_path, monkeypatch,
                                                                             capfd):
    loss = Consistency.loss
    monkeypatch.setattr(Consistency, "loss", lambda *args, **more: loss(*args, **more) * torch.nan)
    monkeypatch.setattr(distill, "LOG_STEPS", 2)
    monkeypatch.setattr("training.run.MAX_BAD_STEPS", 2)
    assert distill.main(flags(teacher, data_dir, tmp_path)) == 1
    assert "--muon_lr 0.00125" in capfd.readouterr().err and files(tmp_path).keys() == {"run.json"}
    assert run_record.sittings(tmp_path)[-1]["how"].startswith("failed: the loss or its gradient was not finite")


def test_the_budget_includes_what_was_before(teacher, data_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Budget, "progress", PROGRESS)
    args = distill.parse_args(flags(teacher, data_dir, tmp_path, "--budget", "1h"))
    for used, low, high in ((0, 0, 0.1), (3599, 1, 1)):
        run = distill.make_run(args, time.perf_counter() - used)
        run.update()
        assert low <= run.progress <= high
    assert_refused(capfd, distill.main(flags(teacher, data_dir, tmp_path, "--budget", "0.001s")), "--budget")
    assert files(tmp_path) == {}


@pytest.mark.parametrize("more, words", [
    (["--checkpoint", "none.pt"], ["none.pt"]), (["--teacher_steps", 1], ["teacher_steps", "from 2 up"]),
    (["--teacher_steps", 41], ["--teacher_steps", "2..40", "41"]), (["--budget", "soon"], ["--budget", "soon"]),
    (["--guidance_scale", -1], ["--guidance_scale"]), (["--device", "tpu"], ["tpu"]),
], ids=str)
def test_what_cannot_be_is_refused_in_one_line(teacher, data_dir, tmp_path, capfd, more, words):
    assert_refused(capfd, distill.main(flags(teacher, data_dir, tmp_path / "run", *more)), *words)
    assert files(tmp_path) == {}


def test_a_student_learns_in_the_code_of_its_teacher(data_dir, tmp_path):
    images = load_dataset("glyphs", "train", data_dir).images[:500]
    path = with_level_code(small_checkpoint(tmp_path / "teacher.pt"), images)
    run = distill.make_run(distill.parse_args(flags(path, data_dir, tmp_path / "run")), time.perf_counter())
    code = code_of(load_checkpoint(path)["config"])
    assert not code.is_linear and torch.equal(run.trainer.data.code.points.cpu(), code.points)


@pytest.mark.parametrize("num_timesteps, steps", [(8, 8), (40, 20)])
def test_a_teacher_takes_twenty_steps_or_all_that_it_has(data_dir, tmp_path, num_timesteps, steps):
    path = small_checkpoint(tmp_path / "teacher.pt", num_timesteps=num_timesteps)
    words = flags(path, data_dir, tmp_path / "run")
    at = words.index("--teacher_steps")
    args = distill.parse_args(words[:at] + words[at + 2:])
    assert distill.make_run(args, time.perf_counter()).config["training"]["teacher_steps"] == steps


def test_a_teacher_of_one_timestep_is_refused(data_dir, tmp_path, capfd):
    path = small_checkpoint(tmp_path / "teacher.pt", num_timesteps=1)
    assert_refused(capfd, distill.main(flags(path, data_dir, tmp_path / "run")), "only one timestep", "--timesteps")


def test_a_student_is_no_teacher(student, data_dir, tmp_path, capfd):
    status = distill.main(flags(student / "model_final.pt", data_dir, tmp_path / "run"))
    assert_refused(capfd, status, "is a student", "its teacher", "--checkpoint")
    assert not (tmp_path / "run").exists()


def test_guidance_without_labels_is_refused(data_dir, tmp_path, capfd):
    teacher = small_checkpoint(tmp_path / "teacher.pt")
    status = distill.main(flags(teacher, data_dir, tmp_path / "run", "--guidance_scale", 2))
    assert_refused(capfd, status, "--guidance_scale", "--conditional")


def test_the_teachers_own_folder_is_refused(data_dir, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run/model_final.pt", "run/checkpoints/model_epoch_005.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        small_checkpoint(tmp_path / name)
        before = files(tmp_path)
        for folder in ("run", tmp_path / "run", "run/../run"):
            assert_refused(capfd, distill.main(flags(name, data_dir, folder)), "teacher", "--output_dir")
        assert files(tmp_path) == before


def test_a_second_run_in_the_folder_and_a_small_disk_are_refused(teacher, data_dir, tmp_path, capfd, monkeypatch):
    with run_folder.claim(tmp_path), monkeypatch.context() as patch:
        patch.setattr(distill, "load_model", lambda *_: pytest.fail("it begins before it is refused"))
        assert_refused(capfd, distill.main(flags(teacher, data_dir, tmp_path)), "another run", "--output_dir")
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert_refused(capfd, distill.main(flags(teacher, data_dir, tmp_path)), "left", "--output_dir")
    assert files(tmp_path) == {}


def test_other_images_than_the_teachers_are_refused(teacher, data_dir, tmp_path, capfd, monkeypatch):
    data = KNOWN("glyphs", "train", data_dir)
    wide = replace(data, images=data.images.expand(-1, 3, -1, -1))
    monkeypatch.setattr(distill, "load_dataset", lambda *_: wide)
    assert_refused(capfd, distill.main(flags(teacher, data_dir, tmp_path)), "--data_dir")
