"""What the scripts share: devices, seeds and pictures."""

import math
import platform
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

import utils
from runtime.errors import UserError


def test_the_cpu_is_always_there_and_auto_is_some_device():
    assert utils.get_device("cpu").type == "cpu"
    assert utils.get_device().type in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "cpu:1", "meta"])
def test_a_missing_device_is_named_with_those_that_are_there(name):
    with pytest.raises(ValueError, match=r"--device auto.*cpu") as caught:
        utils.get_device(name)
    assert repr(name) in str(caught.value)


def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert utils.get_device("auto").type == expected


def test_chance_depends_on_seed_and_key_alone():
    def draw(*key):
        return torch.rand(4, generator=utils.generator_for(*key)).tolist()
    keys = [(0, 1), (1, 1), (0, 2), (1, 2), (0, 1, 2), (0, 2, 1), (0, 0, 1), (2**63 - 1, 5)]
    first = [draw(*key) for key in keys]
    torch.manual_seed(99)
    assert first == [draw(*key) for key in keys]
    assert len({tuple(values) for values in first}) == len(keys)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_networks_arithmetic(precision, dtype):
    cpu = torch.device("cpu")
    assert utils.pick_precision(precision, cpu) == precision
    assert utils.pick_precision("auto", cpu) in ("fp32", "bf16")
    with utils.autocast(cpu, precision):
        assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == dtype


@pytest.mark.parametrize("has_instructions", [False, True])
def test_a_gpu_that_only_emulates_bf16_takes_fp32(monkeypatch, has_instructions):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
        including_emulation or has_instructions))
    assert utils.pick_precision("auto", torch.device("cuda")) == ("bf16" if has_instructions else "fp32")


def test_bf16_instructions_are_found_without_torchs_newer_function(monkeypatch):
    """/proc/cpuinfo, which only Linux has, says the same as torch."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("needs Linux on x86-64, and a torch with get_capabilities")
    expected = utils.has_bf16_instructions()
    assert expected == torch.cpu.get_capabilities().get("avx512_bf16", False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    has_bf16_instructions = utils.has_bf16_instructions.__wrapped__  # without its cache
    assert has_bf16_instructions() == expected
    for flags in ("flags : avx512_bf16 amx_bf16", "flags : avx2"):
        monkeypatch.setattr(utils.Path, "read_text", lambda _, flags=flags: flags)
        assert has_bf16_instructions() == ("avx512_bf16" in flags)


def test_count_parameters_counts_what_learns():
    model = torch.nn.Linear(3, 4)
    assert utils.count_parameters(model) == 16
    model.bias.requires_grad_(False)
    assert utils.count_parameters(model) == 12


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_moving_average_is_the_mean_of_the_last_values(window):
    values = np.random.default_rng(0).normal(size=20)
    expected = [values[max(0, i + 1 - window):i + 1].mean() for i in range(20)]
    np.testing.assert_allclose(utils.moving_average(values, window), expected, rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("shown", [2, 10, 41])
def test_evenly_spaced_indices_hold_both_ends_and_gaps_that_differ_by_one(shown):
    for count in range(1, 100):
        for rounding in (round, math.ceil):
            indices = utils.evenly_spaced(count, shown, rounding)
            gaps = np.diff(indices)
            assert indices[0] == 0 and indices[-1] == count - 1 and len(indices) == min(count, shown)
            assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_images_that_are_not_uint8_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="to_uint8"):
        utils.save_images(torch.zeros(1, 1, 4, 4), tmp_path / "x.png")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("count, channels, columns, across, down", [(6, 1, 3, 3, 2), (7, 3, 3, 3, 3), (2, 1, 8, 2, 1)])
def test_save_images_writes_a_grid_with_every_image_in_its_place(tmp_path, count, channels, columns, across, down):
    images = torch.randint(0, 256, (count, channels, 5, 5), dtype=torch.uint8)
    utils.save_images(images, tmp_path / "new" / "grid.png", columns=columns, scale=2)
    picture = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert picture.shape == ((6 * down + 1) * 2, (6 * across + 1) * 2, 3)
    for k, image in enumerate(images):
        top, left = 2 * (6 * (k // columns) + 1), 2 * (6 * (k % columns) + 1)
        part = picture[top:top + 10:2, left:left + 10:2]
        assert np.array_equal(part, image.expand(3, 5, 5).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("shape, columns", [((6, 1, 5, 4), 3), ((7, 3, 5, 5), 3), ((2, 1, 4, 4), 8)])
def test_a_grid_is_that_of_torchvision(shape, columns):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    expected = make_grid(images, nrow=columns, padding=1, pad_value=utils.GREY).permute(1, 2, 0).numpy()
    assert np.array_equal(utils.tile(images, columns), expected)


def test_one_image_is_a_picture_too(tmp_path):
    utils.save_images(torch.full((1, 1, 4, 4), 128, dtype=torch.uint8), tmp_path / "one.png")
    assert (np.asarray(Image.open(tmp_path / "one.png")) == 128).mean() > 0.2


@pytest.mark.parametrize("records", [
    [], [dict(step=1, loss=0.5, val_loss=None)], [dict(step=1, loss=math.nan, val_loss=0.4)],
    [dict(step=i, loss=1 / i, val_loss=0.1 if i % 5 == 0 else None) for i in range(1, 50)],
    [dict(step=1, loss=0.0, val_loss=0.0)],
], ids=["none", "one", "nan", "many", "zero"])
def test_any_records_give_a_plot_without_warnings(tmp_path, records, recwarn):
    utils.plot_losses(records, tmp_path / "plot.png")
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > 0
    assert not utils.pyplot().get_fignums()  # closed
    assert not [str(w.message) for w in recwarn if w.category is not DeprecationWarning]


def test_a_gpu_by_its_number_becomes_the_current_one(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    assert utils.get_device("cuda:1") == torch.device("cuda:1") and made == ["cuda:1"]
    assert utils.get_device("cuda") == torch.device("cuda") and made == ["cuda:1"]


# ------------------------------------------------------------------------------------- layout, captions and figures


@pytest.mark.parametrize("count, layout", [(1, (1, 8)), (2, (2, 8)), (8, (8, 3)), (64, (8, 3)), (200, (15, 2)),
                                           (10_000, (100, 1))])
def test_a_grid_is_about_square_and_of_a_size_to_look_at(count, layout):
    images = torch.zeros(1, 1, 28, 28).expand(count, -1, -1, -1)
    assert utils.grid_layout(images.shape) == layout
    assert utils.grid_layout(images.shape, columns=5, scale=2) == (5, 2)
    few = images[:20].shape
    assert utils.grid_layout(few, columns=2)[1] == {1: 8, 2: 8, 8: 7}.get(count, 3)  # ten rows are not too high


def test_captions_stand_above_their_pictures_and_change_none_of_them():
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    plain, captioned = utils.tile(images, 3, 2), utils.tile(images, 3, 2, ["one", "", "three", "four"])
    first, second = slice(utils.CAPTION), slice(utils.CAPTION + 58, 2 * utils.CAPTION + 58)
    rows = [captioned[first], captioned[second]]
    assert np.array_equal(np.delete(captioned, np.r_[first, second], axis=0), plain)
    written = [[part.max() > utils.GREY for part in np.array_split(row, 3, axis=1)] for row in rows]
    assert written == [[True, False, True], [True, False, False]]
    assert np.array_equal(utils.tile(images, 3, 2, ["", "", "", "d"])[:58], plain[:58])  # no line without a text


def test_a_caption_that_is_long_gets_smaller_letters():
    line = utils.caption_line(["in features", ""], 174)
    assert (line[:, :87] > utils.GREY).any() and (line[:, 88:] == utils.GREY).all()


def test_frames_of_an_animation_have_their_captions(tmp_path):
    frames = [torch.zeros(2, 1, 28, 28, dtype=torch.uint8)] * 2
    utils.save_gif(frames, tmp_path / "x.gif", captions=["t = 9", "image"])
    with Image.open(tmp_path / "x.gif") as film:
        heads = []
        for i in range(film.n_frames):
            film.seek(i)
            heads.append(np.asarray(film.convert("L"))[:utils.CAPTION])
    assert len(heads) == 2 and not np.array_equal(*heads) and all(head.max() > 200 for head in heads)


@pytest.mark.parametrize("channels, least", [(1, 40), (3, 150)])
def test_films_in_colour_have_more_colours(tmp_path, channels, least):
    frames = [torch.randint(0, 256, (16, channels, 8, 8)).to(torch.uint8)] * 2
    utils.save_gif(frames, tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as film:
        found = len(film.convert("RGB").getcolors(10**6))
    assert least < found <= (64 if channels == 1 else 256)


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_a_figure_has_the_format_of_its_ending_and_its_resolution(tmp_path, suffix, start):
    sizes = []
    for dpi in (50, 100):
        figure, axes = utils.pyplot().subplots()
        axes.plot([0, 1])
        utils.save_figure(figure, tmp_path / f"x{suffix}", dpi)
        assert (tmp_path / f"x{suffix}").read_bytes().startswith(start)
        sizes.append(Image.open(tmp_path / "x.png").width if suffix == ".png" else dpi)
    assert abs(sizes[1] / sizes[0] - 2) < 0.05


@pytest.mark.parametrize("low, high", [(1.3, 1.9), (0.02, 3), (0.1, 0.11), (1, 5000)])
def test_logarithmic_axes_have_plain_numbers(low, high):
    figure, axes = utils.pyplot().subplots()
    axes.plot([low, high])
    axes.set_yscale("log")
    utils.plain_log_ticks(axes.yaxis)
    figure.canvas.draw()
    bottom, top = axes.get_ylim()
    both = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    texts = [tick.label1.get_text() for tick in both if bottom <= tick.get_loc() <= top and tick.label1.get_text()]
    utils.pyplot().close(figure)
    assert len(texts) >= 3 and not any("10^" in text or "mathdefault" in text for text in texts)
    assert all(math.isfinite(float(text)) for text in texts)


@pytest.mark.parametrize("times, titles", [
    ([999, 500.4, 0, -1], ["t = 999", "t = 500", "t = 0", "image"]),
    ([9, 8.2, 7.8, 0.1, 0, -1], ["t = 9.0", "t = 8.2", "t = 7.8", "t = 0.1", "t = 0.0", "image"]),
    ([5, 5], ["t = 5", "t = 5"]), ([], [])])
def test_titles_tell_times_apart(times, titles):
    assert utils.time_titles(times) == titles


@pytest.mark.parametrize("count, columns, scale, words", [
    (10_000, None, 32, "smaller --scale"), (10_000, None, None, None), (10_000, 1, None, None),
    (200_000, None, None, "fewer images or take .npz")])
def test_a_picture_that_would_be_too_large_is_refused(count, columns, scale, words):
    if words is None:
        return utils.check_grid((count, 1, 28, 28), columns, scale)
    with pytest.raises(UserError, match=f"{count:,} images.* pixels, more than .*{words}") as caught:
        utils.check_grid((count, 1, 28, 28), columns, scale, " or take .npz")
    assert ("times as large" in str(caught.value)) == bool(scale)
