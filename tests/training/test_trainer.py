"""The trainer: exact at every step, unharmed by numbers that go wrong, and told by itself what fits in memory."""

import copy
import functools
import itertools
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import assert_identical, tiny
from PIL import Image
from torch.testing import assert_close

import sample
import train
import training.budget
import training.run
from checkpoint import load_checkpoint
from data import ImageData, load_dataset
from diffusion import DiffusionProcess
from models import create_model
from runtime import memory
from runtime.errors import RunFailed
from runtime.memory import out_of_memory
from training import autotune
from training.learning_rate import ema_decay_at, learning_rate
from training.muon import NEWTON_SCHULZ, Muon, orthogonalise
from training.tensorboard import Board
from training.trainer import Trainer, fitting_batch, memory_advice, validation_loss
from utils import generator_for, tile

KNOWN = functools.cache(load_dataset)
TOTAL = 7  # steps; three and a half epochs


@pytest.fixture(autouse=True)
def known_data(monkeypatch):
    """The data set is read from disk once for all tests."""
    monkeypatch.setattr(train, "load_dataset", KNOWN)


def make_trainer(layout="nchw", device="cpu", process=None, dropout=0.0, **more):
    """A trainer of a tiny conditional network on 16 random images, 8 in a batch."""
    torch.manual_seed(0)
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 1, 8, 8), generator=chance, dtype=torch.uint8)
    data = ImageData("noise", "train", images, torch.arange(16) % 2, ("even", "odd")).to(device)
    with torch.device(device):
        model = create_model(base_channels=8, time_emb_dim=8, channel_mults=[1], num_classes=2, dropout=dropout)
    if layout != "nchw":
        model.to(memory_format=autotune.LAYOUTS[layout])
    return Trainer(data, model, (process or DiffusionProcess(10, "cosine", prediction="v")).to(device),
                   **{"batch_size": 8, "conditional": True, "label_dropout": 0.5, **more})


def steps(trainer, count):
    return [trainer.train_step(*trainer.batch(), trainer.step / TOTAL).item() for _ in range(count)]


def as_read(trainer):
    """What a checkpoint file gives back of a trainer's state."""
    return dict(torch.load(saved(trainer), weights_only=True), history=dict(skipped=trainer.skipped.tolist()))


def saved(trainer):
    import io
    file = io.BytesIO()
    torch.save(trainer.state(), file)
    file.seek(0)
    return file


def spoil(monkeypatch, when, value=math.nan):
    """Make the loss `value` in the steps for whose number, counted from 0, `when` holds."""
    loss, count = DiffusionProcess.loss, [0]

    def spoiled(self, model, x_0, *args, **kwargs):
        result = loss(self, model, x_0, *args, **kwargs)
        if result.ndim or not result.requires_grad:  # validation
            return result
        count[0] += 1
        return result * value if when(count[0] - 1) else result
    monkeypatch.setattr(DiffusionProcess, "loss", spoiled)


def limit_memory(monkeypatch, largest, error):
    """Let every step with more than `largest` images fail as for want of memory."""
    loss = DiffusionProcess.loss

    def limited(self, model, x_0, *args, **kwargs):
        if len(x_0) > largest and torch.is_grad_enabled():
            raise error
        return loss(self, model, x_0, *args, **kwargs)
    monkeypatch.setattr(DiffusionProcess, "loss", limited)


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), MemoryError(),
                 RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate "
                              "memory: you tried to allocate 1099511627776 bytes."),
                 RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")]


# --------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("options", [dict(optimizer="muon"), dict(optimizer="adamw"), dict(dropout=0.3)], ids=str)
def test_stopped_at_any_step_and_taken_up_again_it_ends_the_same_bit_for_bit(options):
    whole = make_trainer(**options)
    losses = steps(whole, TOTAL)
    for stop in range(TOTAL + 1):
        first, second = make_trainer(**options), make_trainer(**options, seed=0)
        before = steps(first, stop)
        second.restore(as_read(first))
        torch.manual_seed(5)  # what a new process begins with is of no importance
        assert before + steps(second, TOTAL - stop) == losses
        assert_identical(second.state(), whole.state())


def test_what_dropout_drops_follows_from_the_step_and_the_process(monkeypatch):
    trainer, masks = make_trainer(dropout=0.3), []
    batch = trainer.batch()
    trainer.learn = lambda *inputs: masks.append(trainer.model.middle.blocks[0].dropout(torch.ones(50)).tolist())
    for rank in (0, 1, 0):
        monkeypatch.setattr("runtime.distributed.rank", lambda rank=rank: rank)
        trainer.step = 0
        for _ in range(2):
            trainer.train_step(*batch, 0.0)
    assert masks[4:] == masks[:2] and len(set(map(tuple, masks))) == 4


def test_the_average_drops_nothing_and_without_dropout_the_generator_of_torch_is_left_alone():
    trainer = make_trainer(dropout=0.3)
    x_0, t = torch.ones(8, 1, 8, 8), torch.arange(8)
    for weight in [*trainer.model.parameters(), *trainer.ema.parameters()]:
        torch.nn.init.normal_(weight)  # of zeros nothing can be dropped
    assert_identical(trainer.ema(x_0, t), trainer.ema(x_0, t))
    assert not torch.equal(trainer.model(x_0, t), trainer.model(x_0, t))
    plain = make_trainer()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    steps(plain, 2)
    assert_identical(torch.rand(3), expected)


def test_a_resumed_trainer_has_its_own_settings_and_the_checkpoints_moments():
    first, second = make_trainer(weight_decay=0.5), make_trainer(lr=0.125, weight_decay=0.25)
    steps(first, 2)
    second.restore(as_read(first))
    [group] = second.optimizers["adamw"].param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (0.125, 0.25)
    one, two = (trainer.optimizers["adamw"].state_dict()["state"] for trainer in (first, second))
    assert_identical(one, two)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    rates = [learning_rate(i / 1000, 0.1) for i in range(1001)]  # as between the steps
    assert rates[0] == 0 and rates[100] == max(rates) == 1 and rates[-1] < 1e-9
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert learning_rate(0.7, 0.1, "constant") == 1
    for share in (0.25, 0.5, 0.9):  # along half a cosine
        assert learning_rate(0.1 + 0.9 * share, 0.1) == pytest.approx((1 + math.cos(math.pi * share)) / 2)


def test_the_warm_up_of_n_steps_begins_at_1_nth_of_the_peak_and_reaches_it():
    rates = [learning_rate(step / 50, 0.1, "constant", 1 / 50) for step in range(50)]
    assert_close(rates, [0.2, 0.4, 0.6, 0.8, 1.0] + [1.0] * 45)
    assert learning_rate(0.0, 0.02, "cosine", 1.0) == 1  # the only step of a run


def test_a_run_of_one_step_learns(data_dir, tmp_path):
    assert train.main(tiny(data_dir, tmp_path, "--epochs", 1, "--batch_size", 256, "--sample_interval", 0)) == 0
    after = load_checkpoint(tmp_path / "model_final.pt")
    torch.manual_seed(0)
    before = create_model(**after["config"]["model"]).state_dict()
    assert after["step"] == 1
    assert any(not torch.equal(before[name], weight) for name, weight in after["model"].items())


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_muon_makes_singular_values_about_one_and_keeps_the_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalise(matrices)
    singular = torch.linalg.svdvals(made)
    assert made.shape == shape and made.dtype == matrices.dtype and singular.min() > 0.5 and singular.max() < 1.3
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    turned = U.mT @ made @ Vh.mT  # diagonal, if the singular vectors are the same
    assert_close(turned, torch.diag_embed(turned.diagonal(dim1=1, dim2=2)), rtol=0, atol=0.05)


def test_muon_is_exact_on_a_cpu_without_bfloat16_instructions(monkeypatch):
    matrices = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    x, (a, b, c) = (matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)).mT, NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    for has_instructions, error in ((False, 1e-5), (True, 0.05)):
        monkeypatch.setattr("training.muon.has_bf16_instructions", lambda answer=has_instructions: answer)
        off = (orthogonalise(matrices) - x.mT).abs().max()
        assert off < error and (off > 1e-4) == has_instructions


def test_muon_takes_weights_in_any_layout_alike():
    gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    moved = []
    for layout in autotune.LAYOUTS.values():
        weight = torch.zeros(8, 4, 3, 3).to(memory_format=layout).requires_grad_()
        optimizer = Muon([weight])
        for _ in range(2):
            weight.grad = gradient.to(memory_format=layout)
            optimizer.step()
        moved.append(weight.detach())
    assert_close(*moved)
    assert moved[0].any()


def test_the_average_forgets_its_beginning_by_the_decay():
    trainer, decays = make_trainer(ema_decay=0.3), []
    average = {name: weight.clone() for name, weight in trainer.ema.named_parameters()}
    for step in range(1, 6):
        steps(trainer, 1)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, weight in trainer.model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * weight.detach()
        decays.append(decay)
    assert decays[0] < decays[1] < decays[2] == decays[-1] == 0.3 and ema_decay_at(10**6, 0.999) == 0.999
    assert_close(dict(trainer.ema.named_parameters()), average)


def test_every_step_has_new_times_and_noise_and_every_epoch_each_image_once_in_a_new_order(monkeypatch):
    trainer, shown, drawn = make_trainer(process=DiffusionProcess(1000, "cosine", prediction="v")), [], []
    loss = DiffusionProcess.loss

    def record(process, model, x_0, t, noise, *more, **options):
        shown.append(x_0)
        drawn.append((t, noise))
        return loss(process, model, x_0, t, noise, *more, **options)
    monkeypatch.setattr(DiffusionProcess, "loss", record)
    steps(trainer, 4)
    epochs = [torch.cat(shown[:2]), torch.cat(shown[2:])]
    for epoch in epochs:
        assert [sum(torch.equal(image, other) for other in epoch) for image in trainer.data.x_0()] == [1] * 16
    assert not torch.equal(*epochs)
    for (t, noise), (other_t, other_noise) in itertools.combinations(drawn, 2):
        assert not torch.equal(t, other_t) and not torch.equal(noise, other_noise)


@pytest.mark.parametrize("most", [1e-3, 1e9])
def test_gradients_are_clipped_to_their_largest_norm(most):
    trainer = make_trainer(max_grad_norm=most)
    steps(trainer, 1)
    norm = torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3) if most == 1e-3 else 1e-2 < norm < 1e9


# ------------------------------------------------------------------------------------------- the time and the previews


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by one second in each step, and by two in each look at the validation images.

    From step `busy_from` on all takes three times as long.
    """
    now = [0.0]

    def lasting(seconds, function):
        def lasts(trainer, *args):
            now[0] += seconds * (3 if trainer.step >= clock.busy_from else 1)
            return function(trainer, *args)
        return lasts
    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 0.0, busy_from=math.inf,
                            wait=lambda seconds: now.__setitem__(0, now[0] + seconds))
    for module in (train, training.budget, training.run, autotune):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(Trainer, "train_step", lasting(1, Trainer.train_step))
    monkeypatch.setattr(train, "validation_loss", lasting(2, validation_loss))
    monkeypatch.setattr("training.trainer.VALIDATION_LOSS_IMAGES", 64)
    monkeypatch.setattr("training.trainer.EPOCH_IMAGES", 1)
    return clock


def sitting(data_dir, folder, budget, *more):
    """A run of four steps an epoch that ends by its budget only."""
    args, saved = train.parse_args(tiny(data_dir, folder, "--budget", budget, "--sample_interval", 0,
                                        "--save_interval", 0, *more))
    args.epochs = None
    run, validation, settings = train.make_run(args, saved, start=train.time.perf_counter())
    run.update()
    train.train(run, validation, settings)
    return run


@pytest.mark.parametrize("budget, steps, whole", [(39, 24, True), (40, 25, False), (41, 26, False), (42, 27, False)])
def test_a_run_keeps_its_budget_and_ends_with_a_rate_near_0_and_a_validation(clock, data_dir, tmp_path, budget, steps,
                                                                            whole):
    run = sitting(data_dir, tmp_path, budget)
    last = run.records[-1]
    assert run.budget.reserve == 3.5 and run.progress == 1
    assert 0 <= budget - run.budget.seconds_used <= run.budget.reserve
    assert (run.trainer.step, last["step"], run.trainer.step % 4 == 0) == (steps, steps, whole)
    assert all(record["val_loss"] > 0 for record in run.records) and len(run.records) == math.ceil(steps / 4)
    peak = run.config["training"]["lr"]
    assert run.trainer.lr < 0.05 * peak < 0.5 * max(record["lr"] for record in run.records)


def test_by_time_small_epochs_are_reported_now_and_then_and_the_end_always(monkeypatch, clock, data_dir, tmp_path):
    """Epochs of 256 images, of which 600 are seen between two reports: at 768, 1,280 and so on."""
    monkeypatch.setattr("training.trainer.EPOCH_IMAGES", 600)
    run = sitting(data_dir, tmp_path / "a", 39)
    seen = [record["images_seen"] for record in run.records]
    assert len(seen) > 2 and seen[:-1] == [768, 1280, 2048, 2560][:len(seen) - 1]
    assert seen[-1] == run.trainer.images_seen
    assert all(record["val_loss"] > 0 for record in run.records)
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    run = sitting(data_dir, tmp_path / "b", 42)
    assert run.trainer.step % 4 and run.records[-1]["step"] == run.trainer.step  # also where one was just recorded
    assert run.records[-1]["val_loss"] > 0 and run.records[-2]["val_loss"] is None


def test_a_report_by_time_takes_its_share_of_the_budget(monkeypatch, clock, data_dir, tmp_path):
    monkeypatch.setattr(train, "REPORT_SHARE", 0.3)
    run = sitting(data_dir, tmp_path, 80)
    shares = [record["seconds"] / 76.5 for record in run.records]
    assert len(shares) == 3 and all(later - earlier > 0.25 for earlier, later in itertools.pairwise(shares))
    assert run.records[-1]["val_loss"] > 0 and run.records[-1]["step"] == run.trainer.step


@pytest.mark.parametrize("interval, epochs", [(0, []), (1, [1, 2, 4, 7]), (2, [2, 4, 7]), (3, [4, 7]), (5, [7])])
def test_what_is_due_between_two_reports_is_done_at_the_second(interval, epochs):
    reports = [0, 1, 2, 4, 7]
    assert [now for before, now in itertools.pairwise(reports) if train.is_due(interval, now, before)] == epochs


@pytest.mark.parametrize("warm_up", [0, 4])
def test_a_slow_network_keeps_its_budget_before_the_first_record(monkeypatch, clock, data_dir, tmp_path, warm_up):
    """Steps of a second, of which an epoch has a hundred; the samples take 20 s, and files 1.5 s."""
    monkeypatch.setattr(train, "preview_work", lambda *_: 20 * 32.0)
    monkeypatch.setattr(train, "VALIDATION_LOSS_IMAGES", 0)
    args, saved = train.parse_args(tiny(data_dir, tmp_path, "--budget", 31, "--batch_size", 32, "--train_images", 3200))
    args.epochs = None
    run, *_ = train.make_run(args, saved, start=train.time.perf_counter())
    while run.update() or run.progress < 1:
        clock.wait(warm_up / 2 if run.trainer.step < 2 else 0)
        run.trainer.train_step(*run.trainer.batch(), run.progress)
    assert run.trainer.step == 10 - warm_up and 31 - run.budget.seconds_used == 21


def test_epochs_that_are_not_reported_still_have_records(monkeypatch, clock, data_dir, tmp_path):
    """Four steps an epoch, one report in all, and a record after six steps."""
    monkeypatch.setattr(train, "REPORT_SHARE", 2.0)
    monkeypatch.setattr(train, "LOG_STEPS", 6)
    records = sitting(data_dir, tmp_path, 30).records
    steps = [record["step"] for record in records]
    assert len(steps) > 3 and steps[:-1] == list(range(6, steps[-1] + 1, 6))
    assert [record["val_loss"] is None for record in records] == [True] * (len(steps) - 1) + [False]


def test_by_time_every_epoch_of_own_pictures_is_reported_also_where_the_batch_does_not_divide_it():
    own = SimpleNamespace(data=SimpleNamespace(folder="x"), batch_size=128, steps_per_epoch=8000 // 128)
    for own.images_seen in (7936, 2 * 7936):
        assert Trainer.reports_now(own, by_time=True)


def test_with_epochs_every_one_is_reported(data_dir, tmp_path):
    assert train.main(tiny(data_dir, tmp_path, "--sample_interval", 0, "--save_interval", 0)) == 0
    records = load_checkpoint(tmp_path / "model_final.pt")["history"]["records"]
    assert [record["epoch"] for record in records if record["val_loss"]] == [1, 2]


def test_a_machine_that_becomes_busy_before_the_end_is_allowed_for(monkeypatch, clock, data_dir, tmp_path):
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    clock.busy_from, budget = 21, 50  # in the sixth epoch
    run = sitting(data_dir, tmp_path, budget)
    assert run.trainer.step == 24 and run.budget.reserve == 3 * 3.5
    left = budget - run.budget.seconds_used
    assert left >= 3 * training.run.CLOSING_SECONDS - 3  # for the file and the plot, but for the length of a step


def test_the_budget_counts_the_earlier_sittings(clock, data_dir, tmp_path):
    first = sitting(data_dir, tmp_path, 20)
    first.save("checkpoints/model_step_00000012.pt")
    second = sitting(data_dir, tmp_path, 41, "--resume")
    assert (first.trainer.step, second.budget.used_before) == (12, 18)
    assert (second.trainer.step, second.budget.seconds_used) == (26, 40)  # as of one that was not interrupted


def test_a_run_that_is_resumed_when_its_time_is_over_ends_without_a_step(clock, data_dir, tmp_path):
    first = sitting(data_dir, tmp_path, 9)
    first.losses = [torch.tensor(0.5)]  # of a step since the last record
    first.save("checkpoints/model_step_00000003.pt")
    second = sitting(data_dir, tmp_path, 9, "--resume")
    assert second.trainer.step == first.trainer.step
    assert (second.records[-1]["loss"], second.records[-1]["images_per_second"]) == (0.5, 0)


@pytest.mark.parametrize("flags", [[], ["--no-conditional"]], ids=str)
def test_a_preview_shows_the_images_that_sample_makes(data_dir, tmp_path, flags):
    assert train.main(tiny(data_dir, tmp_path, "--epochs", 1, "--sample_interval", 1, "--lr", 0.02, *flags)) == 0

    def drawn(*more):
        assert sample.main(["--checkpoint", str(tmp_path / "model_final.pt"), "--num_images", str(train.PREVIEW_IMAGES),
                            "--device", "cpu", "--precision", "fp32", "--output", str(tmp_path / "x.npz"), *more]) == 0
        return tile(torch.from_numpy(np.load(tmp_path / "x.npz")["arr_0"]).permute(0, 3, 1, 2), columns=8, scale=3)
    preview = np.asarray(Image.open(tmp_path / "samples/epoch_001.png"))
    assert np.array_equal(preview, drawn())
    assert flags or not np.array_equal(preview, drawn("--guidance_scale", "1"))


# ------------------------------------------------------------------------------------------------ numbers that go wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_without_a_finite_loss_changes_no_weight_and_is_counted(monkeypatch, optimizer, value):
    spoil(monkeypatch, lambda i: i in (2, 3, 5), value)
    trainer, seen = make_trainer(optimizer=optimizer), []
    for step in range(TOTAL):
        before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        steps(trainer, 1)
        same = all(torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())
        assert same == (step in (0, 2, 3, 5))  # in step 0 the rate is still 0
        seen.append(tuple(trainer.skipped.tolist()))
    assert seen == [(0, 0), (0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 0)]
    assert all(weight.isfinite().all() for weight in trainer.ema.state_dict().values())
    assert all(part.isfinite().all() for each in trainer.optimizers.values()
               for state in each.state.values() for part in state.values())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("bad", [(0,), (2, 3)], ids=str)
def test_where_the_fused_optimizer_ignores_found_inf_a_bad_step_changes_nothing_either(monkeypatch, optimizer, bad):
    """As on MPS: one gradient that is not a number would spoil every weight there."""
    update, clean = torch._fused_adamw_, make_trainer(optimizer=optimizer)
    losses = [loss for step, loss in enumerate(steps(clean, TOTAL)) if step < bad[0]]

    def ignoring(*args, found_inf, **kwargs):
        return update(*args, found_inf=None, **kwargs)
    monkeypatch.setattr(torch, "_fused_adamw_", ignoring)
    monkeypatch.setattr("training.optimizers.IGNORE_FOUND_INF", ("cpu",), raising=False)
    spoil(monkeypatch, lambda i: i in bad)
    trainer = make_trainer(optimizer=optimizer)
    for step in range(TOTAL):
        before = copy.deepcopy(dict(trainer.model.state_dict()))
        moments = copy.deepcopy({name: each.state_dict()["state"] for name, each in trainer.optimizers.items()})
        seen = steps(trainer, 1)
        if step < bad[0]:
            assert seen == [losses[step]]  # a good step is the ordinary one
        if step in bad:
            assert_identical(dict(trainer.model.state_dict()), before)
            for name, each in trainer.optimizers.items():
                after = each.state_dict()["state"]
                zeros = {i: {part: torch.zeros_like(value) for part, value in of.items()} for i, of in after.items()}
                assert_identical(after, moments[name] or zeros)
    assert trainer.skipped[0] == len(bad)


def test_a_run_survives_bad_steps_reports_them_and_writes_json(monkeypatch, data_dir, tmp_path, capfd):
    spoil(monkeypatch, lambda i: i in (1, 2, 4, 5, 6, 7))  # all of the second epoch
    assert train.main(tiny(data_dir, tmp_path)) == 0
    err = capfd.readouterr().err
    assert "2 steps so far" in err and "6 steps so far" in err
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    assert records[0]["loss"] > 0 and records[1]["loss"] is None
    assert load_checkpoint(tmp_path / "model_final.pt")["history"]["skipped"] == [6, 4]


def test_several_bad_steps_in_a_row_stop_the_run_and_say_what_to_try(monkeypatch, data_dir, tmp_path, capfd):
    monkeypatch.setattr("training.run.MAX_BAD_STEPS", 4)
    spoil(monkeypatch, lambda i: i >= 4)
    assert train.main(tiny(data_dir, tmp_path, "--epochs", 9)) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert all(word in last for word in ("not finite in 4 steps in a row", "step 8", "--lr", "--precision fp32",
                                         f"python train.py --resume --output_dir {tmp_path} "))
    assert load_checkpoint(tmp_path / "checkpoints/model_epoch_001.pt")["step"] == 4
    assert not (tmp_path / "model_final.pt").exists()


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "host", "cpu", "windows"])
def test_out_of_memory_is_one_line_with_the_batch_size_that_fits(monkeypatch, data_dir, tmp_path, capfd, error):
    limit_memory(monkeypatch, 20, error)
    assert train.main(tiny(data_dir, tmp_path)) == 1
    err = capfd.readouterr().err
    last = err.splitlines()[-1]
    assert "step of 64 images: a batch of 16 fits (measured)" in last and "--batch_size" in last
    assert "Traceback" not in err
    told = last.split("a batch of ")[1].split()[0]
    assert train.main(tiny(data_dir, tmp_path, "--batch_size", told, "--epochs", 1)) == 0


def test_a_run_that_goes_on_is_not_told_a_batch_size_that_it_cannot_have(monkeypatch, data_dir, tmp_path, capfd):
    assert train.main(tiny(data_dir, tmp_path, "--epochs", 1)) == 0
    limit_memory(monkeypatch, 20, MemoryError())
    assert train.main(["--resume", "--output_dir", str(tmp_path), "--data_dir", str(data_dir), "--epochs", "2"]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert "a batch of 16 fits (measured)" in last and "start a new run with that --batch_size" in last


def test_where_no_image_fits_that_is_said(monkeypatch, data_dir, tmp_path, capfd):
    limit_memory(monkeypatch, 0, MemoryError())
    monkeypatch.setattr("training.sizing.BATCH_SIZE", 4)  # what "auto" begins with
    for flags in (["--batch_size", 2], ["--batch_size", "auto"]):
        assert train.main(tiny(data_dir, tmp_path, *flags)) == 1
        assert "out of memory even for one image" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("largest, found", [(10**6, 128), (160, 128), (159, 64), (31, 16), (1, 1)])
def test_batch_size_auto_finds_what_fits_and_resuming_keeps_it(monkeypatch, data_dir, tmp_path, largest, found):
    limit_memory(monkeypatch, largest, MemoryError())
    args, _ = train.parse_args(tiny(data_dir, tmp_path, "--batch_size", "auto"))
    run, _, settings = train.make_run(args, None, 0.0)
    assert (run.trainer.batch_size, settings.batch_size, args.batch_size) == (found, found, "auto")
    assert run.config["training"]["batch_size"] == found and run.trainer.steps_per_epoch == 256 // found


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what fits is tried in the process itself")
@pytest.mark.parametrize("precision, tried", [("auto", {1 / 8, 1 / 2}), ("fp32", set())])
def test_batch_size_auto_does_nothing_in_this_process_before_it_has_measured_what_fits(monkeypatch, data_dir, tmp_path,
                                                                                       precision, tried):
    """A container ends a process that asks for too much: only the fork, which measures, may do so."""
    seen = []
    limit_memory(monkeypatch, 31, MemoryError())
    limited = DiffusionProcess.loss
    monkeypatch.setattr(DiffusionProcess, "loss", lambda *args, **more: seen.append(len(args[2])) or limited(
        *args, **more))
    monkeypatch.setattr("training.autotune.MIN_STEPS", 0)

    def fork(work):
        before = len(seen)
        try:
            work()
        except MemoryError:
            return memory.OUT_OF_MEMORY
        finally:
            del seen[before:]  # done in a fork, not in this process
        return memory.SUCCEEDED
    monkeypatch.setattr(memory, "_exit_status_of_fork", fork)
    args, _ = train.parse_args(tiny(data_dir, tmp_path, "--batch_size", "auto", "--precision", precision))
    run, _, _ = train.make_run(args, None, 0.0)
    assert run.trainer.batch_size == 16 and set(seen) == {16 * share for share in tried}


def test_other_errors_are_not_taken_for_want_of_memory():
    assert all(map(out_of_memory, OUT_OF_MEMORY))
    assert not any(map(out_of_memory, [RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(28, "x")]))


@pytest.mark.parametrize("largest", [10, 3])
def test_measuring_changes_nothing(monkeypatch, largest):
    whole = make_trainer()
    losses = steps(whole, 4)
    trainer = make_trainer()
    before = steps(trainer, 2)
    limit_memory(monkeypatch, largest, MemoryError())
    chance = torch.get_rng_state()
    assert fitting_batch(trainer.rehearse, 8, trainer.device) == {10: 8, 3: 2}[largest]
    assert torch.equal(chance, torch.get_rng_state())
    monkeypatch.undo()
    assert before + steps(trainer, 2) == losses
    assert_identical(trainer.state(), whole.state())


@pytest.mark.parametrize("largest, found", [(8, 8), (5, 8), (4, 2), (3, 2)])
def test_large_images_are_measured_with_a_margin_of_their_parts(monkeypatch, largest, found):
    """A step of 8, or of 4, takes 4 at a time: that needs room for 5."""
    monkeypatch.setattr(autotune, "LARGE", 10)
    monkeypatch.setattr(autotune, "PART", 4)
    trainer = make_trainer()
    limit_memory(monkeypatch, largest, MemoryError())
    assert fitting_batch(trainer.rehearse, 8, trainer.device) == found


def test_a_rehearsal_has_the_tensors_of_a_second_step(monkeypatch):
    """Between two steps a run keeps the states of its optimisers, the average and the gradients."""
    made, learn, trainer = [], autotune.loss_and_gradient, make_trainer()
    parameters = list(trainer.model.parameters())
    monkeypatch.setattr(torch, "empty_like", lambda weight, make=torch.empty_like: made.append(
        weight.grad is not None and weight.grad.shape) or make(weight))
    seen = []
    monkeypatch.setattr(autotune, "loss_and_gradient", lambda *args: seen.append(len(made)) or learn(*args))
    trainer.rehearse(4)
    assert seen == [0, 3 * len(parameters)] and made[::3] == [weight.shape for weight in parameters]
    assert all(weight.grad is None for weight in parameters)


def test_measuring_passes_other_errors_on(monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "rehearse", lambda _: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape"):
        fitting_batch(trainer.rehearse, 8, trainer.device)
    limit_memory(monkeypatch, 0, MemoryError())
    monkeypatch.setattr(trainer, "rehearse", lambda _: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(RunFailed, match=r"even for one image: train a smaller network, .*--base_channels"):
        fitting_batch(trainer.rehearse, 8, trainer.device)
    with pytest.raises(RunFailed, match="even for one image: choose a smaller teacher"):
        memory_advice(trainer, smaller="choose a smaller teacher")


def test_the_times_of_validation_stay_in_the_process_however_they_are_rounded(monkeypatch):
    trainer, losses = make_trainer(), []
    below_1 = float(np.nextafter(np.float32(1), np.float32(0)))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, below_1))
    images = trainer.data.images[:1].expand(2048, -1, -1, -1)
    monkeypatch.setattr(type(trainer.diffusion), "simple_loss", lambda _, model, x_0, t, *__, **___: (
        losses.append(t) or torch.zeros(len(t))))
    validation_loss(trainer, replace(trainer.data, images=images, labels=torch.zeros(2048, dtype=torch.long)))
    assert torch.cat(losses).max() == trainer.diffusion.num_timesteps - 1


def test_the_times_of_validation_are_even_whatever_those_of_training_are(monkeypatch):
    process = DiffusionProcess(10, "cosine", prediction="v", timestep_sampling="lognormal")
    trainer, times = make_trainer(process=process), []
    monkeypatch.setattr(type(process), "simple_loss", lambda _, model, x_0, t, *__, **___: (
        times.append(t) or torch.zeros(len(t))))
    images = trainer.data.images[:1].expand(500, -1, -1, -1)
    validation_loss(trainer, replace(trainer.data, images=images, labels=torch.zeros(500, dtype=torch.long)))
    assert ((torch.cat(times).bincount(minlength=10) - 50).abs() <= 1).all()


@pytest.mark.parametrize("conditional", [False, True])
def test_validation_and_previews_evaluate_no_more_images_at_a_time_than_a_step(tmp_path, monkeypatch, conditional):
    """What fits in a step with its gradients fits without them; guidance evaluates every image twice."""
    trainer, seen = make_trainer(conditional=conditional), []
    trainer.ema.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    validation_loss(trainer, trainer.data)
    assert sum(seen) == 16
    config = dict(model=dict(trainer.model.config, num_classes=2 if conditional else None), training={},
                  diffusion=trainer.diffusion.config, data=dict(shape=[1, 8, 8], class_names=["even", "odd"]))
    monkeypatch.setattr(train, "PREVIEW_IMAGES", 20)
    train.save_preview(SimpleNamespace(trainer=trainer, config=config, board=Board(), preview=None), tmp_path / "x.png")
    assert (tmp_path / "x.png").exists() and max(seen) <= trainer.batch_size


def test_the_validation_loss_is_that_of_the_averaged_weights_with_labels():
    trainer = make_trainer()
    for weight in trainer.ema.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    generator, data = generator_for(0), trainer.data
    t = ((torch.arange(16) + torch.rand(16, generator=generator)) / 16 * 10).long()
    noise = torch.randn(16, 1, 8, 8, generator=generator)
    with_labels, without = (trainer.diffusion.loss(trainer.ema, data.x_0(), t, noise, labels).item()
                            for labels in (data.labels, None))
    assert validation_loss(trainer, data) == pytest.approx(with_labels, rel=1e-4)
    assert without != pytest.approx(with_labels, rel=1e-3)


def test_the_recorded_loss_is_the_mean_of_the_finite_ones(tmp_path):
    run = training.run.Run(tmp_path, make_trainer(), training.budget.Budget(9, None, 0.0), {}, "", 0.0)
    run.losses = [torch.tensor(loss) for loss in (1.0, math.nan, 3.0)]
    run.record(1.0)
    assert run.records[-1]["loss"] == 2


def test_weights_that_are_not_finite_replace_no_file(tmp_path):
    config = dict(model={}, diffusion={}, data={}, training={})
    run = training.run.Run(tmp_path, make_trainer(), training.budget.Budget(9, None, 0.0), config, "advice", 0.0)
    before = run.save("model_final.pt").read_bytes()
    for network in (run.trainer.ema, run.trainer.model):
        weight = next(network.parameters()).data.view(-1)
        kept, weight[0] = weight[0].item(), math.inf
        with pytest.raises(RunFailed, match="weights are not finite"):
            run.save("model_final.pt")
        weight[0] = kept
    assert (tmp_path / "model_final.pt").read_bytes() == before
