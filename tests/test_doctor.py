"""doctor.py: every planted defect is found under its name, and healthy input gives no finding."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import with_level_code
from torch.testing import assert_close

import doctor
import sample
from checkpoint import FIELDS, load_checkpoint, load_model, save_checkpoint
from data import ImageData, code_of, load_dataset, to_model, to_uint8
from diffusion import DiffusionProcess
from evaluation import gaussian, health_checks, machine_checks
from evaluation.gaussian import MOST_NUMBERS, bound_images, gaussian_bound
from evaluation.health_checks import check_history, check_samples, check_schedule, check_versions
from models import create_model
from runtime.errors import UserError
from runtime.files import write_json


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statuses(findings):
    return {finding.check: finding.status for finding in findings}


def assert_healthy(findings):
    findings = list(findings)
    assert findings and all(finding.status == "OK" and not finding.fix for finding in findings), findings


def assert_found(findings, check, status="FAIL"):
    """The defect is found under this name, with a fix."""
    found = [finding for finding in findings if finding.check == check]
    assert [finding.status for finding in found] == [status] and found[0].fix and found[0].message, findings


# ----------------------------------------------------------------------------------------------- the Gaussian bound


@pytest.fixture(scope="module")
def blobs():
    """Smooth Gaussian images (N, 1, 8, 8) in [-1, 1] as uint8, for training and for validation."""
    mixing = torch.exp(-torch.cdist(*[torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))] * 2) ** 2 / 4)
    pixels = (127.5 + 25 * normal(3000, 64) @ mixing).round().clamp(0, 255).to(torch.uint8).reshape(-1, 1, 8, 8)
    labels = torch.arange(3000) % 10
    return (ImageData("glyphs", "train", pixels[:2500], labels[:2500], tuple("0123456789")),
            ImageData("glyphs", "validation", pixels[2500:], labels[2500:], tuple("0123456789")))


@pytest.mark.parametrize("t", [0, 300, 700, 999])
def test_the_bound_is_the_error_of_a_linear_regression(t):
    mixing = normal(8, 8, seed=1).double()
    x_0 = (normal(20_000, 8, seed=2).double() @ mixing + 1).reshape(-1, 2, 2, 2)
    process = DiffusionProcess()
    x_t = process.q_sample(x_0, t, normal(*x_0.shape, seed=3).double()).flatten(1)
    known = torch.cat([x_t, torch.ones(len(x_t), 1)], 1)
    error = known @ torch.linalg.lstsq(known, x_0.flatten(1)).solution - x_0.flatten(1)
    assert_close(gaussian_bound(x_0, process, [t])[0], error.square().mean(), rtol=0.02, atol=0)


def test_the_bound_of_few_images_lets_no_sound_network_seem_broken():
    """Sixty images have at most 59 directions; the principal axes of 192 values cannot be learned from them."""
    noise = normal(60, 3, 8, 8)
    alone = 1 / (1 + math.exp(4))                                       # of independent values of variance 1, log-SNR 4
    bound = gaussian_bound(noise, process := DiffusionProcess(), [process.time_of(4.0)])[0]
    assert 0.9 * alone < bound < alone


def test_the_bound_rises_from_0_to_the_variance():
    x_0 = normal(500, 1, 4, 4) * 0.5
    bound = gaussian_bound(x_0, DiffusionProcess(100, "cosine", prediction="v", zero_terminal_snr=True),
                           torch.arange(-1, 100))
    assert bound[0] == 0 and bool((bound.diff() > 0).all())
    assert_close(bound[-1], x_0.double().var(0).mean())


def wiener(train, process):
    """The best linear denoiser of a data set as a network that predicts x_0."""
    x = to_model(train.images).flatten(1)
    mean, covariance = x.mean(0), torch.cov(x.T)

    def model(x_t, t, labels=None):
        alpha, sigma = process.alpha(int(t[0])).float(), process.sigma(int(t[0])).float()
        gain = torch.linalg.solve(alpha**2 * covariance + sigma**2 * torch.eye(len(mean)), alpha * covariance)
        return (mean + (x_t.flatten(1) - alpha * mean) @ gain).reshape(x_t.shape)
    model.num_classes = None
    return model


def test_the_error_of_the_best_linear_denoiser_is_the_bound(blobs):
    process = DiffusionProcess(prediction="x0")
    (finding,) = doctor.examine_error(wiener(blobs[0], process), process, *blobs, "train.py")
    ratios = [float(part.split(" at ")[0]) for part in finding.message.split(": ")[1].split(", ")]
    assert finding.status == "OK" and len(ratios) == 5 and all(0.9 < ratio < 1.1 for ratio in ratios)


def test_large_images_are_bounded_by_the_best_filter_that_treats_every_place_alike(monkeypatch):
    """On images that look the same at every place, here with coupled colours, it is the best linear filter."""
    waves = torch.fft.rfft2(normal(20_000, 2, 6, 6).double()) / (1 + torch.arange(4.0))
    x_0 = torch.einsum("dc,nchw->ndhw", normal(2, 2, seed=1).double(), torch.fft.irfft2(waves, s=(6, 6)))
    exact = gaussian_bound(x_0, DiffusionProcess(), [300, 600])
    monkeypatch.setattr(gaussian, "MOST_VALUES", 71)
    assert_close(gaussian_bound(x_0, DiffusionProcess(), [300, 600]), exact, rtol=0.01, atol=0)
    somewhere = x_0 * torch.linspace(0, 2, 6)
    waves = gaussian_bound(somewhere, DiffusionProcess(), [300, 600])
    monkeypatch.undo()
    assert bool((waves > gaussian_bound(somewhere, DiffusionProcess(), [300, 600])).all())


@pytest.mark.parametrize("values, count", [(784, 5 * 784), (3 * 64 * 64, 1000), (3 * 512 * 512, 341)])
def test_the_bound_takes_as_many_images_as_it_needs_and_the_memory_allows(values, count):
    assert bound_images(1000, values) == count and count * values <= MOST_NUMBERS


@pytest.mark.parametrize("shape, count", [((1, 28, 28), 5000), ((3, 32, 32), 15_360), ((3, 64, 64), 5000)], ids=str)
def test_the_bound_is_of_several_times_as_many_images_as_pixels(monkeypatch, shape, count):
    images, given = torch.zeros(1, dtype=torch.uint8).expand(20_000, *shape), []

    def bound(x_0, _, times):
        given.append(len(x_0))
        return torch.ones(len(times))
    monkeypatch.setattr(doctor, "gaussian_bound", bound)
    monkeypatch.setattr(doctor, "to_model", lambda x: x[:, :1, :1, :1].float() if len(x) <= 256 else x)
    data = ImageData("zeros", "train", images, torch.zeros(20_000, dtype=torch.long), ("nothing",))

    def model(x_t, t):
        return torch.zeros_like(x_t)
    model.num_classes = None
    list(doctor.examine_error(model, DiffusionProcess(prediction="x0"), data, data, "train.py"))
    assert given == [count]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "edm"])
def test_an_untrained_network_is_worse_than_the_bound(blobs, prediction):
    def model(x_t, t):
        return torch.zeros_like(x_t)
    model.num_classes = None
    process = DiffusionProcess(prediction=prediction, data_std=0.4)
    assert_found(doctor.examine_error(model, process, *blobs, "train.py"), "error against t")


def test_an_error_that_is_no_number_is_a_failure():
    assert health_checks.check_error(torch.tensor([math.nan, 1.0]), torch.ones(2), [0, 1], "train.py").status == "FAIL"


# ------------------------------------------------------------------------------------------------------ the machine


@pytest.mark.parametrize("python, torch_version, vision, wanted, status", [
    ((3, 11), "2.5.1+cu124", "0.20.1+cu124", ["numpy", "torch==2.5.1"], "OK"),
    ((3, 11), "2.15.0", "0.29.2", ["torch (>=2.14.0)"], "OK"),
    ((3, 11), "2.5.1", "0.21.0", ["torch==2.6.0"], "FAIL"),
    ((3, 11), "2.5.1+cu124", "0.20.1+cpu", ["torch==2.5.1"], "FAIL"),
    ((3, 9), "2.5.1", "0.20.1", ["torch==2.5.1"], "FAIL"),
])
def test_versions_that_do_not_belong_together(python, torch_version, vision, wanted, status):
    assert check_versions(python, torch_version, vision, wanted).status == status


def test_full_disks_and_little_memory(tmp_path, monkeypatch):
    assert machine_checks.check_disk("output_dir", tmp_path / "not" / "there").status != "FAIL"
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert_found([machine_checks.check_disk("output_dir", tmp_path)], "disk of output_dir")
    (tmp_path / "file").touch()
    assert_found([machine_checks.check_disk("data_dir", tmp_path / "file")], "disk of data_dir")
    for free, status in ((8e9, "OK"), (1e9, "WARN"), (1e8, "FAIL")):
        monkeypatch.setattr(machine_checks, "main_memory", lambda free=free: (free, 16e9))
        assert machine_checks.check_memory(torch.device("cpu")).status == status
    monkeypatch.setattr(machine_checks, "main_memory", lambda: (math.inf, 16e9))
    assert machine_checks.check_memory(torch.device("cpu")).message.startswith("16.0 GB, of which the system does not")


def test_the_slower_precision_is_named(monkeypatch):
    monkeypatch.setattr(machine_checks, "convolution_seconds", lambda _, dtype: 1.0 if dtype == torch.bfloat16 else 0.1)
    for chosen, status in (("bf16", "WARN"), ("fp32", "OK")):
        monkeypatch.setattr(machine_checks, "pick_precision", lambda *_, chosen=chosen: chosen)
        finding = machine_checks.check_precision(torch.device("cpu"))
        assert finding.status == status and (status == "OK" or "--precision fp32" in finding.fix)


def test_this_machine_is_looked_at_without_a_failure_of_its_versions(tmp_path):
    found = statuses(machine_checks.examine_machine("cpu", dict(output_dir=tmp_path, data_dir=tmp_path / "data")))
    assert found["versions"] == "OK"
    assert {"device", "precision", "memory", "disk of output_dir", "disk of data_dir"} < found.keys()


# --------------------------------------------------------------------------------------------------------- the data


@pytest.fixture(scope="module")
def glyphs(data_dir):
    """(train, validation, test) of a size that tests have time for."""
    return [load_dataset("glyphs", split, data_dir).first(2000) for split in ("train", "validation", "test")]


def examine_data(images, labels):
    return health_checks.check_data(images, labels, tuple("0123456789"))


def test_healthy_data(glyphs):
    for data in glyphs:
        assert_healthy(examine_data(data.images, data.labels))


def doubled(images, labels):
    return torch.cat([images[:1900], images[:100]]), labels


def blanked(images, labels):
    return torch.cat([images[:1900], torch.zeros_like(images[:100])]), labels


DATA_DEFECTS = {
    "floats": (lambda x, y: (x.float() / 255, y), "value range", "FAIL"),
    "0 to 1": (lambda x, y: (x // 255, y), "value range", "FAIL"),
    "dark": (lambda x, y: (x // 4, y), "value range", "WARN"),
    "grey in colour": (lambda x, y: (x.expand(-1, 3, -1, -1), y), "channels", "WARN"),
    "two channels": (lambda x, y: (x.expand(-1, 2, -1, -1), y), "channels", "FAIL"),
    "labels from 1": (lambda x, y: (x, y + 1), "classes", "FAIL"),
    "a class is missing": (lambda x, y: (x, y.masked_fill(y == 3, 4)), "classes", "WARN"),
    "copies": (doubled, "duplicates", "WARN"),
    "all the same": (lambda x, y: (x[:1].expand(2000, -1, -1, -1), y), "duplicates", "FAIL"),
    "blanks": (blanked, "blank images", "FAIL"),
}


@pytest.mark.parametrize("defect", DATA_DEFECTS)
def test_defects_of_the_data(glyphs, defect):
    plant, check, status = DATA_DEFECTS[defect]
    assert_found(examine_data(*plant(glyphs[0].images, glyphs[0].labels)), check, status)


# ----------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("settings", [
    dict(), dict(schedule="cosine", prediction="edm"), dict(schedule="cosine", prediction="x0"),
    dict(prediction="v", zero_terminal_snr=True), dict(num_timesteps=100)])
def test_healthy_schedules(settings):
    assert_healthy(check_schedule(DiffusionProcess(**settings)))


@pytest.mark.parametrize("settings, check, status", [
    (dict(beta_end=0.002), "terminal SNR", "FAIL"), (dict(beta_end=0.008), "terminal SNR", "WARN"),
    (dict(schedule="cosine"), "first step", "WARN"),
    (dict(num_timesteps=5), "timesteps", "WARN")])
def test_defects_of_the_schedule(settings, check, status):
    assert_found(check_schedule(DiffusionProcess(**settings)), check, status)


# --------------------------------------------------------------------------------------------------- the checkpoint


def make_checkpoint(num_classes=10, **changes):
    """A checkpoint, conditional by default, of a long run: all tensors differ from the initial ones, the loss falls."""
    torch.manual_seed(5)
    model = create_model(base_channels=8, time_emb_dim=16, patch_size=4, num_classes=num_classes)
    trained = {name: weight + 0.01 * normal(*weight.shape, seed=i + 1)
              for i, (name, weight) in enumerate(model.state_dict().items())}
    average = {name: weight + 0.0001 * normal(*weight.shape, seed=99) for name, weight in trained.items()}
    config = dict(model=model.config, diffusion=DiffusionProcess(prediction="edm", data_std=0.6).config,
                  data=dict(dataset="glyphs", shape=[1, 28, 28], class_names=list("0123456789")),
                  training=dict(ema_decay=0.999))
    losses = (0.2 + torch.exp(-torch.arange(50) / 10) + 0.01 * normal(50)).tolist()
    history = dict(records=[dict(step=100 * i, loss=loss, val_loss=loss + 0.01, seconds=float(i))
                            for i, loss in enumerate(losses)])
    fields = {name: kind() for name, kind in FIELDS.items()}
    return fields | dict(config=config, model=trained, ema=average, history=history, step=5000, seed=5) | changes


def test_a_healthy_checkpoint():
    assert_healthy(doctor.examine_checkpoint(make_checkpoint()))
    assert_healthy(doctor.examine_checkpoint(make_checkpoint(num_classes=None)))


def changed_tensors(part, change):
    """The healthy checkpoint with change(name, tensor, its beginning) in one part."""
    checkpoint = make_checkpoint()
    first = doctor.initial_weights(checkpoint)
    checkpoint[part] = {name: change(name, weight, first[name]) for name, weight in checkpoint[part].items()}
    return checkpoint


def head_at_zero(name, weight, _):
    return torch.zeros_like(weight) if name == "head.2.weight" else weight


def one_untrained(name, weight, first):
    return first if name == "stem.1.weight" else weight


def class_3_unseen(name, weight, first):
    return torch.cat([weight[:3], first[3:4], weight[4:]]) if name == "label_embedding.weight" else weight


def no_label_unseen(name, weight, first):
    return torch.cat([weight[:10], first[10:]]) if name == "label_embedding.weight" else weight


@pytest.mark.parametrize("part, change, check, status", [
    ("model", head_at_zero, "tensors of model", "FAIL"), ("ema", head_at_zero, "tensors of ema", "FAIL"),
    ("model", one_untrained, "tensors of model", "FAIL"), ("ema", lambda *three: three[2], "tensors of ema", "FAIL"),
    ("model", lambda _, weight, __: torch.full_like(weight, 0.3), "tensors of model", "FAIL"),
    ("ema", class_3_unseen, "labels shown", "FAIL"), ("ema", no_label_unseen, "labels shown", "WARN")])
def test_dead_tensors(part, change, check, status):
    assert_found(doctor.examine_checkpoint(changed_tensors(part, change)), check, status)


def test_losses_that_rise_or_are_no_numbers():
    calm = [1.0, *[0.3 + 0.01 * (i % 3) for i in range(60)]]
    assert_healthy(check_history(calm, calm[-10:]))
    assert_found(check_history([*calm, math.nan], []), "history of the loss")
    assert_found(check_history(calm + [0.45] * 10, []), "history of the loss", "WARN")
    assert_found(check_history(calm + [5.0] * 10, []), "history of the loss")
    assert_found(check_history(calm, [1.0, 0.5, 0.4, 0.5, 0.6]), "validation loss", "WARN")


def test_a_record_without_a_finite_loss_is_a_failure():
    checkpoint = make_checkpoint()
    checkpoint["history"]["records"][20]["loss"] = None
    assert_found(doctor.examine_checkpoint(checkpoint), "history of the loss")


@pytest.mark.parametrize("epochs", ["many", None, -1, math.inf, 10**400])
def test_flags_that_are_no_numbers_are_taken_for_the_default(epochs):
    assert doctor.training_flag(dict(config=dict(training=dict(epochs=epochs))), "epochs", 7) == 7


# ------------------------------------------------------------------------------------------------------ the samples


@pytest.fixture(scope="module")
def pictures(glyphs):
    """(64 images, 500 others) in [-1, 1]."""
    return to_model(glyphs[2].images[:64]), to_model(glyphs[1].images[:500])


def test_healthy_samples(pictures, glyphs):
    assert_healthy(check_samples(*pictures))
    assert_healthy(check_samples(to_model(glyphs[0].images[64:128]), pictures[1]))


def checkerboard(period):
    sign = (torch.arange(28) % period < period / 2).float() * 2 - 1
    return sign[:, None] * sign


SAMPLE_DEFECTS = {
    "not finite": (lambda x: x.masked_fill(x > 0.9, math.nan), "samples", "FAIL"),
    "all black": (lambda x: torch.full_like(x, -1), "blank samples", "FAIL"),
    "all white": (lambda x: torch.full_like(x, 1.3), "blank samples", "FAIL"),
    "a few black": (lambda x: torch.cat([x[:60], torch.full_like(x[:4], -1)]), "blank samples", "WARN"),
    "in 0 to 1": (lambda x: (x + 1) / 2, "brightness", "FAIL"),
    "inverted": (lambda x: -x, "brightness", "FAIL"),
    "saturated": (lambda x: x.sign(), "saturation", "FAIL"),
    "one image": (lambda x: x[:1].expand(64, -1, -1, -1), "diversity", "FAIL"),
    "nearly one image": (lambda x: x[:1] + 0.05 * (x - x[:1]), "diversity", "FAIL"),
    "eight images": (lambda x: x[:8].repeat(8, 1, 1, 1), "diversity", "FAIL"),
    "noise left": (lambda x: x + 0.3 * normal(*x.shape), "noise left", "FAIL"),
    "some noise left": (lambda x: x + 0.1 * normal(*x.shape), "noise left", "WARN"),
    "pure noise": (lambda x: normal(*x.shape), "noise left", "FAIL"),
    "a checkerboard": (lambda x: x + 0.1 * checkerboard(2), "grid pattern", "FAIL"),
    "patches of 4": (lambda x: x + 0.1 * checkerboard(4), "grid pattern", "FAIL"),
}


@pytest.mark.parametrize("defect", SAMPLE_DEFECTS)
def test_defects_of_samples(pictures, defect):
    plant, check, status = SAMPLE_DEFECTS[defect]
    assert_found(check_samples(plant(pictures[0]), pictures[1]), check, status)


def test_blank_images_are_no_defect_where_real_ones_are_blank(pictures):
    some = [torch.cat([x, torch.full_like(x[:len(x) // 8], -1)]) for x in pictures]
    assert statuses(check_samples(*some))["blank samples"] == "OK"


def test_the_advice_of_more_steps_keeps_to_the_number_of_timesteps(pictures):
    x, real = pictures
    found = {finding.check: finding.fix for finding in check_samples(x + 0.1 * normal(*x.shape), real, 30)}
    assert "--steps 30," in found["noise left"]
    assert "--steps 30," in health_checks.check_steps(x, x + 0.5 * normal(*x.shape), 10, 30).fix


def test_one_striped_image_is_no_pattern(pictures):
    x = pictures[0].clone()
    x[0] += checkerboard(2)
    assert statuses(check_samples(x, pictures[1]))["grid pattern"] == "OK"


def test_too_few_steps(pictures):
    x = pictures[0]
    assert_healthy([health_checks.check_steps(x, x + 0.01 * normal(*x.shape), 20)])
    assert_found([health_checks.check_steps(x, x + 0.5 * normal(*x.shape), 20)], "steps", "WARN")


class Memory:
    """The best denoiser of a finite set of images, as a network that predicts x_0: samples are images of the set.

    heed: of those with the label that it is given, 10 for all.
    """

    def __init__(self, data, process, num_classes=None, heed=True):
        self.images, self.labels = to_model(data.images), data.labels
        self.process, self.num_classes, self.heed = process, num_classes, heed

    def __call__(self, x_t, t, labels=None):
        alpha, sigma = self.process.alpha(t[:1].long()), self.process.sigma(t[:1].long())
        points = alpha.flatten() * self.images.flatten(1)
        nearness = -torch.cdist(x_t.flatten(1), points).square() / (2 * sigma.flatten() ** 2)     # (B, N)
        if labels is not None and self.heed:
            nearness = nearness.masked_fill((labels[:, None] != self.labels) & (labels[:, None] < 10), -math.inf)
        return (nearness.softmax(1) @ self.images.flatten(1)).reshape(x_t.shape)


@pytest.fixture(scope="module")
def process():
    return DiffusionProcess(prediction="x0")


def examine_samples(memory, process, train, unseen, **settings):
    model = Memory(memory, process, **settings)
    return list(doctor.examine_samples(model, process, train, unseen, checkpoint_of(model)))


def checkpoint_of(model):
    """As much of a checkpoint as the examination of samples reads."""
    return dict(config=dict(training={}, diffusion=dict(num_timesteps=1000), data={},
                            model=dict(num_classes=model.num_classes)))


def only(data, images, labels=None):
    return ImageData(data.name, data.split, images, data.labels if labels is None else labels, data.class_names)


def test_a_healthy_generator(glyphs, process):
    train, unseen, others = glyphs
    found = examine_samples(others, process, train, unseen)
    assert_healthy(finding for finding in found if finding.check != "steps")  # a finite set leaves jumps between them
    assert {"copies", "recognisable", "classes made", "mirrored", "diversity"} < statuses(found).keys()


def test_a_generator_that_copies(glyphs, process):
    assert_found(examine_samples(glyphs[0], process, *glyphs[:2]), "copies")


def test_a_generator_trained_on_flipped_digits(glyphs, process):
    train, unseen, others = glyphs
    flipped = only(others, torch.cat([others.images[:1000], others.images[1000:].flip(-1)]))
    found = statuses(examine_samples(flipped, process, train, unseen))
    assert found["mirrored"] != "OK"
    mirrored = only(others, others.images.flip(-1))
    assert_found(examine_samples(mirrored, process, train, unseen), "mirrored")


def test_large_images_go_through_the_network_in_parts_each_with_its_labels(process, monkeypatch):
    seen = []

    def denoiser(model, labels, clip):
        return lambda x_t, t: seen.append(len(x_t)) or torch.zeros_like(x_t) + labels.view(-1, 1, 1, 1)
    monkeypatch.setattr(process, "denoiser", denoiser)
    monkeypatch.setattr(doctor, "in_parts", lambda x, most: x.split(3))
    found = doctor.denoise_at(None, process, torch.zeros(8, 1, 4, 4), torch.arange(8), 500)
    assert seen == [3, 3, 2] and torch.equal(found[:, 0, 0, 0], torch.arange(8.0))


def test_fewer_large_images_are_examined(glyphs, process, monkeypatch):
    train, unseen, others = glyphs
    monkeypatch.setattr(doctor, "ERROR_VALUES", 5 * 28 * 28)
    counts, denoise = [], doctor.denoise_at
    monkeypatch.setattr(doctor, "denoise_at", lambda model, diffusion, x_0, *more: counts.append(len(x_0)) or denoise(
        model, diffusion, x_0, *more))
    list(doctor.examine_error(Memory(others, process), process, train, unseen, "train.py"))
    assert set(counts) == {5}


def test_a_generator_of_one_class(glyphs, process):
    others = glyphs[2]
    ones = only(others, others.images[others.labels == 1], others.labels[others.labels == 1])
    assert_found(examine_samples(ones, process, *glyphs[:2]), "classes made")


def certain(classes, count):
    """Probabilities of a classifier that is sure of these classes."""
    return torch.nn.functional.one_hot(torch.as_tensor(classes), count).float()


def test_classes_are_judged_by_those_of_real_images_and_by_how_well_the_classifier_knows_them():
    halves, uneven = torch.arange(500) % 2, (torch.arange(500) % 20 == 0).long()
    asked = torch.arange(64) % 2
    almost = asked.clone()
    almost[0] = 1  # 33 of 64
    assert_healthy(health_checks.check_recognised(certain(almost, 2), certain(halves, 2), asked, halves))
    all_zeros = 0 * asked
    assert_healthy(health_checks.check_recognised(certain(all_zeros, 2), certain(uneven, 2), None, uneven))
    found = health_checks.check_recognised(certain(all_zeros, 2), certain(halves, 2), None, halves)
    assert_found(found, "classes made")
    seen = torch.where(torch.arange(500) % 5 < 3, halves, 1 - halves)  # right in 60 %, so also of a perfect generator
    found = health_checks.check_recognised(certain(seen[:64], 2), certain(seen, 2), asked, halves)
    assert statuses(found)["labels obeyed"] == "OK"
    of_ten = torch.arange(500) % 10
    seen = torch.where(of_ten < 6, 0, of_ten)  # a classifier that calls six of ten classes the first
    for labels in (None, of_ten[:64]):
        found = statuses(health_checks.check_recognised(certain(seen[:64], 10), certain(seen, 10), labels, of_ten))
        assert found["classes made"] == "OK" and found.get("labels obeyed", "OK") == "OK"
    none_of_nine = of_ten.where(of_ten < 9, 0)  # a class of which no real image is at hand
    assert_healthy(health_checks.check_recognised(certain(of_ten, 10), certain(none_of_nine, 10), of_ten, none_of_nine))


def test_labels_that_are_obeyed_ignored_or_wrong(glyphs, process):
    train, unseen, others = glyphs
    results = {}
    for name, settings in dict(heeds=dict(), ignores=dict(heed=False)).items():
        model = Memory(others, process, num_classes=10, **settings)
        results[name] = {f.check: f for f in (*doctor.examine_error(model, process, train, unseen, "train.py"),
                                              *doctor.examine_samples(model, process, train, unseen,
                                                                       checkpoint_of(model)))}
    for check in ("labels used", "labels obeyed"):
        assert_healthy([results["heeds"][check]])
        assert_found([results["ignores"][check]], check)
    wrong = Memory(only(others, others.images, (others.labels + 1) % 10), process, num_classes=10)
    assert_found(doctor.examine_error(wrong, process, train, unseen, "train.py"), "labels used")


@pytest.mark.parametrize("student", [False, True])
def test_it_judges_the_images_that_sample_makes(glyphs, monkeypatch, tmp_path, student):
    checkpoint = make_checkpoint()
    checkpoint["config"]["training"]["student"] = student
    save_checkpoint(tmp_path / "model.pt", **checkpoint)
    assert sample.main(["--checkpoint", str(tmp_path / "model.pt"), "--output", str(tmp_path / "x.npz"), "--device",
                        "cpu", "--precision", "fp32", "--num_images", str(doctor.SAMPLES)]) == 0
    checked = []
    monkeypatch.setattr(doctor, "check_samples", lambda images, *_: checked.append(images) or [])
    found = doctor.examine_samples(*load_model(tmp_path / "model.pt")[:2], *glyphs[:2], checkpoint)
    assert ("steps" in statuses(found)) != student
    made = torch.from_numpy(np.load(tmp_path / "x.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert (to_uint8(checked[0]).int() - made.int()).abs().max() <= 1 and made.float().std() > 10


# ------------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def run(monkeypatch, data_dir, tmp_path, capsys):
    """run(*flags) -> (exit status, findings), on short splits."""
    monkeypatch.setattr(doctor, "load_dataset", lambda *args: load_dataset(*args).first(2000))
    monkeypatch.setattr(doctor, "examine_machine", lambda *_: iter(()))

    def call(*flags):
        status = doctor.main([*map(str, flags), "--json", "--data_dir", str(data_dir), "--device", "cpu"])
        out = capsys.readouterr()
        return status, json.loads(out.out) if status < 2 else out.err
    return call


def test_a_healthy_data_set_ends_with_0(run):
    status, findings = run("--dataset", "glyphs")
    assert status == 0 and len(findings) == 5 and {f["status"] for f in findings} == {"OK"}
    assert all(f.keys() == {"check", "status", "message", "fix"} for f in findings)


def test_json_is_all_that_is_printed(run, monkeypatch):
    def chatty(*_):
        print("Drawing glyphs ...")
        return iter(())
    monkeypatch.setattr(doctor, "examine_machine", chatty)
    assert run("--dataset", "glyphs")[0] == 0  # which reads the JSON


def test_a_checkpoint_that_draws_badly_ends_with_1(run, tmp_path):
    checkpoint = make_checkpoint(epoch=30)
    checkpoint["config"]["training"]["epochs"] = 25
    save_checkpoint(tmp_path / "checkpoints/model_step_00000003.pt", **checkpoint)
    status, findings = run("--checkpoint", tmp_path / "checkpoints/model_step_00000003.pt")
    found = {f["check"]: f["status"] for f in findings}
    assert status == 1 and found["error against t"] == "FAIL"
    [fix] = [f["fix"] for f in findings if f["check"] == "error against t"]
    assert f"python train.py --resume --output_dir {tmp_path} --data_dir" in fix and "--epochs 60)" in fix
    assert found["tensors of ema"] == found["terminal SNR"] == found["value range"] == "OK"


def test_a_checkpoint_with_nan_or_of_another_data_set_is_a_finding(run, tmp_path):
    broken = make_checkpoint()
    broken["ema"]["stem.1.bias"][0] = math.nan
    save_checkpoint(tmp_path / "model_final.pt", **broken)
    status, findings = run("--checkpoint", tmp_path / "model_final.pt")
    assert status == 1 and findings[-1]["check"] == "checkpoint" and "not finite" in findings[-1]["message"]
    assert f"train.py --resume --output_dir {tmp_path}" in findings[-1]["fix"]
    write_json(dict(sittings=[dict(command="python distill.py --budget 1m")]), tmp_path / "run.json")
    assert run("--checkpoint", tmp_path / "model_final.pt")[1][-1]["fix"] == \
        "train the student again: python distill.py --budget 1m"
    save_checkpoint(tmp_path / "checkpoints/model_step_00000003.pt", **broken)
    assert "distill.py" in run("--checkpoint", tmp_path / "checkpoints/model_step_00000003.pt")[1][-1]["fix"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model_final.pt").rename(tmp_path / "elsewhere/mine.pt")
    assert "FOLDER_OF_ITS_RUN" in run("--checkpoint", tmp_path / "elsewhere/mine.pt")[1][-1]["fix"]
    other = make_checkpoint()
    other["config"]["data"]["shape"] = [1, 32, 32]
    save_checkpoint(tmp_path / "model.pt", **other)
    status, findings = run("--checkpoint", tmp_path / "model.pt")
    assert status == 1 and (findings[-1]["check"], findings[-1]["status"]) == ("data set", "FAIL")


def test_data_are_examined_in_the_code_of_the_checkpoint(run, tmp_path, data_dir, monkeypatch):
    path, codes = tmp_path / "model_final.pt", []
    save_checkpoint(path, **make_checkpoint())
    with_level_code(path, load_dataset("glyphs", "train", data_dir).images[:500])
    for name in ("examine_error", "examine_samples"):
        monkeypatch.setattr(doctor, name, lambda model, diffusion, *data: codes.extend(
            each.code for each in data[:2]) or iter(()))
    run("--checkpoint", path)
    expected = code_of(load_checkpoint(path)["config"]).points
    assert len(codes) == 4 and all(torch.equal(code.points, expected) for code in codes)


def test_a_damaged_export_is_not_told_to_go_on_by_itself(run, tmp_path):
    """It is no run: train.py --resume would refuse its folder."""
    (tmp_path / "export").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "export" / name).write_text("{}")
    status, findings = run("--checkpoint", tmp_path / "export")
    assert status == 1 and "the checkpoint that was exported" in findings[-1]["fix"]
    assert str(tmp_path) not in findings[-1]["fix"]


def test_data_that_cannot_be_opened_is_a_finding(run, monkeypatch):
    def damaged(*args):
        raise UserError("train.npz is damaged")
    monkeypatch.setattr(doctor, "load_dataset", damaged)
    status, findings = run("--dataset", "glyphs")
    assert status == 1 and "damaged" in findings[-1]["message"]


def test_flags_that_cannot_be_are_refused(run, tmp_path):
    save_checkpoint(tmp_path / "model.pt", **make_checkpoint())
    for flags, message in ((("--checkpoint", tmp_path / "none.pt"), "no checkpoint"), (("--dataset", "x"), "mnist"),
                           (("--fit", "pad"), "--fit is for your own pictures: add --dataset PATH"),
                           (("--checkpoint", tmp_path / "model.pt", "--dataset", "mnist"), "leave out --dataset")):
        status, err = run(*flags)
        assert status == 2 and message in err and err.count("\n") == 1


def test_the_lines_that_a_person_reads(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda args: iter([
        health_checks.Finding("a", "OK", "fine"), health_checks.Finding("b", "FAIL", "broken", "python mend.py")]))
    assert doctor.main([]) == 1
    assert capsys.readouterr().out == "OK    a: fine\nFAIL  b: broken\n      -> python mend.py\n"
