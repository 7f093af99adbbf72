"""Changing pictures: the theorems on Gaussian data, where the answers are known, and `edit.py` as a user calls it."""

import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_checkpoint, with_level_code
from torch.testing import assert_close

import edit
import sample
from data import load_dataset, to_model, to_uint8
from data_sources.pictures import read_mask, read_picture
from diffusion import DiffusionProcess
from editing import ddim_inversion, inpaint, keep_known, slerp
from samplers import SAMPLERS, ddim, final_image, uniform_timesteps
from utils import CAPTION, GREY, grid_layout

PIXELS, SHAPE = 6, (1, 2, 3)
STD = torch.tensor([0.5, 0.4, 0.6, 0.5, 0.3, 0.5], dtype=torch.float64)
MEAN = torch.tensor([-0.5, 0.0, 0.3, 0.5, -0.2, 0.1], dtype=torch.float64)
DISTANCE = (torch.arange(PIXELS)[:, None] - torch.arange(PIXELS)).abs()
COVARIANCE = torch.exp(-DISTANCE / 2) * STD[:, None] * STD
HIDDEN = torch.tensor([False, False, True, True, True, False])
KNOWN = torch.tensor([0.4, 0.6, 9.0, 9.0, 9.0, -0.7], dtype=torch.float64).view(1, *SHAPE)  # what is hidden is wrong
MASK = HIDDEN.double().view(1, *SHAPE)


@pytest.fixture(scope="module")
def process():
    return DiffusionProcess(1000, "cosine")


def perfect_denoiser(process):
    """E[x_0 | x_t] for images N(MEAN, COVARIANCE): MEAN + alpha Σ (alpha² Σ + sigma²)⁻¹ (x_t - alpha MEAN)."""
    def denoise(x_t, t):
        alpha = process.alpha(t).flatten()[0].double()
        of_x_t = alpha**2 * COVARIANCE + (1 - alpha**2) * torch.eye(PIXELS, dtype=torch.float64)
        gain = alpha * torch.linalg.solve(of_x_t, COVARIANCE)                               # its transpose
        return (MEAN + (x_t.flatten(1) - alpha * MEAN) @ gain).view(x_t.shape)
    return denoise


def conditional():
    """Mean and covariance of the hidden pixels given the known ones."""
    gain = COVARIANCE[HIDDEN][:, ~HIDDEN] @ torch.linalg.inv(COVARIANCE[~HIDDEN][:, ~HIDDEN])
    return (MEAN[HIDDEN] + gain @ (KNOWN.flatten()[~HIDDEN] - MEAN[~HIDDEN]),
            COVARIANCE[HIDDEN][:, HIDDEN] - gain @ COVARIANCE[~HIDDEN][:, HIDDEN])


# ------------------------------------------------------------------------------------------------------ inpainting


def filled(process, steps, resample, count=1, randn=torch.zeros_like):
    x_T = randn(torch.zeros(count, *SHAPE, dtype=torch.float64))
    return final_image(inpaint(perfect_denoiser(process), x_T, uniform_timesteps(1000, steps), process, known=KNOWN,
                               mask=MASK, resample=resample, randn=randn)).flatten(1)


def test_inpainting_comes_to_the_conditional_mean_as_it_resamples(process):
    # Without noise the result is the mean over the noise: with this denoiser every step is affine.
    mean, _ = conditional()
    errors = [(filled(process, 50, resample)[0, HIDDEN] - mean).abs().max().item() for resample in (1, 5, 20)]
    # Measured: 0.17, 0.052, 0.018, with hidden pixels that spread by 0.2 to 0.5.
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.025
    assert (MEAN[HIDDEN] - mean).abs().max() > 0.3  # the known pixels say much


def test_inpainting_fills_in_with_nearly_the_conditional_spread(process):
    generator = torch.Generator().manual_seed(0)
    values = filled(process, 50, 10, 4000, lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype))
    ratio = values[:, HIDDEN].std(0) / conditional()[1].diag().sqrt()
    assert ratio.min() > 0.8 and ratio.max() < 1.05  # measured 0.84 to 0.89: a DDPM of 50 steps is a little too calm


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps, resample", [(1, 1), (5, 3), (40, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_pixels_are_kept_bit_for_bit(schedule, steps, resample, dtype):
    process, mask = DiffusionProcess(40, schedule), torch.rand(1, 1, 8, 8).round()
    known = torch.rand(3, 1, 8, 8, dtype=dtype) * 2 - 1
    images = final_image(inpaint(lambda x, t: x.clamp(-1, 1), torch.randn(3, 1, 8, 8, dtype=dtype),
                                 uniform_timesteps(40, steps), process, known=known, mask=mask, resample=resample))
    kept = (mask == 0).expand_as(known)
    assert images.dtype == dtype and torch.equal(images[kept], known[kept])
    assert not torch.equal(images[~kept], known[~kept])


def test_inpainting_costs_what_it_says(process):
    calls, visited = [], []

    def denoise(x_t, t):
        calls.append(t)
        return x_t
    for t, _, _ in inpaint(denoise, torch.zeros(1, *SHAPE), [999, 500, 100], process, known=torch.zeros(1, *SHAPE),
                           mask=torch.ones(1, 1, 1, 1), resample=4):
        visited.append(t)
    assert visited == [500, 100, -1] and len(calls) == 4 + 4 + 1  # at the end there is nothing to fit any more


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_sampler_keeps_what_is_known(process, name):
    denoise = keep_known(perfect_denoiser(process), KNOWN, MASK)
    x_T = torch.ones(2, *SHAPE, dtype=torch.float64)
    image = final_image(SAMPLERS[name].function(denoise, x_T, uniform_timesteps(1000, 10), process)).flatten(1)
    assert_close(image[:, ~HIDDEN], KNOWN.flatten()[~HIDDEN].expand(2, -1), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------ inversion, slerp


def test_inversion_comes_back_and_its_error_falls_at_first_order(process):
    x_0, errors = torch.linspace(-0.8, 0.8, 24, dtype=torch.float64).view(4, *SHAPE), []
    for steps in (80, 160, 320):
        times = uniform_timesteps(1000, steps)
        x_T = final_image(ddim_inversion(perfect_denoiser(process), x_0, times, process))
        back = final_image(ddim(perfect_denoiser(process), x_T, times, process))
        errors.append((back - x_0).abs().max().item())
    assert errors[2] < 0.02  # measured 0.063, 0.033, 0.017
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3


def test_inversion_of_the_data_gives_standard_normal_noise(process):
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(COVARIANCE)
    x_0 = MEAN + torch.randn(4000, PIXELS, generator=generator, dtype=torch.float64) @ root.T
    noise = final_image(ddim_inversion(perfect_denoiser(process), x_0.view(-1, *SHAPE), uniform_timesteps(1000, 200),
                                       process)).flatten(1)
    assert_close(noise.mean(0), torch.zeros(PIXELS).double(), rtol=0, atol=0.08)
    assert_close(torch.cov(noise.T), torch.eye(PIXELS).double(), rtol=0, atol=0.08)


def test_inversion_asks_the_network_at_each_time_but_the_last(process):
    asked = []
    way = ddim_inversion(lambda x, t: asked.append(t[0].item()) or x, torch.zeros(1, *SHAPE), [900, 400, 10], process)
    assert len([*way]) == 3 and asked == [10, 400]


def test_inversion_visits_the_samplers_times_upwards(process):
    visited = [t for t, _, _ in ddim_inversion(lambda x, t: x, torch.zeros(1, *SHAPE), [900, 400, 10], process)]
    assert visited == [10, 400, 900]


def test_numbers_of_steps_that_edit_nothing_are_refused(process):
    picture = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match="two times"):
        next(ddim_inversion(lambda x, t: x, picture, [999], process))
    with pytest.raises(ValueError, match="resample"):
        next(inpaint(lambda x, t: x, picture, [999, 0], process, known=picture, mask=MASK, resample=0))


def test_slerp_keeps_the_ends_and_the_length():
    a, b = torch.randn(2, 1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(slerp(a, b, 0), a)
    assert_close(slerp(a, b, 1), b, rtol=0, atol=1e-6)
    for share in (0.25, 0.5, 0.75):
        between = slerp(a, b, share)
        assert abs(between.std() - 1) < 0.05  # a straight line would have 0.71 in its middle
        assert_close(between, slerp(b, a, 1 - share), rtol=0, atol=1e-6)
    assert torch.equal(slerp(a, a, 0.3), a)


# ---------------------------------------------------------------------------------------------------------- edit.py


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("edit") / "model.pt")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("edit") / "labelled.pt", conditional=True)


@pytest.fixture(scope="module")
def picture(data_dir):
    """The picture (28, 28) uint8 that edit.py changes by default."""
    return load_dataset("glyphs", "test", data_dir).images[0, 0].numpy()


@pytest.fixture(scope="module")
def coded(tmp_path_factory, data_dir):
    """A checkpoint with the code of the levels of glyphs."""
    path = small_checkpoint(tmp_path_factory.mktemp("edit") / "coded.pt")
    return with_level_code(path, load_dataset("glyphs", "train", data_dir).images[:500])


@pytest.fixture
def call(checkpoint, data_dir, tmp_path):
    def run(command, *flags):
        where = [] if command == "interpolate" else ["--data_dir", data_dir]
        return edit.main(list(map(str, [command, "--checkpoint", checkpoint, "--output", tmp_path / "x.png", "--device",
                                        "cpu", "--precision", "fp32", "--steps", 8, *where, *flags])))
    return run


def cells(path, columns):
    """The pictures (N, 28, 28) uint8 of one row that save_images wrote with scale 4, below its captions."""
    pixels = np.asarray(Image.open(path).convert("L"))[CAPTION::4, ::4]
    rows = [pixels[r:r + 28] for r in range(1, pixels.shape[0] - 1, 29)]
    return np.stack([row[:, c:c + 28] for row in rows for c in range(1, 29 * columns, 29)])


def frames_of(path):
    """(durations in milliseconds, the last frame (H, W))."""
    with Image.open(path) as film:
        durations = []
        for i in range(film.n_frames):
            film.seek(i)
            film.load()
            durations.append(film.info["duration"])
        return durations, np.asarray(film.convert("L"))


HALVES = {"left": np.s_[:, :14], "right": np.s_[:, 14:], "top": np.s_[:14], "bottom": np.s_[14:],
          "center": np.s_[7:21, 7:21]}


@pytest.mark.parametrize("side", HALVES)
def test_inpaint_shows_picture_mask_known_part_and_results(call, tmp_path, picture, side):
    assert call("inpaint", "--mask", side, "--num_images", 3, "--resample", 2) == 0
    shown, mask = cells(tmp_path / "x.png", 6), np.zeros((28, 28), bool)
    mask[HALVES[side]] = True
    assert np.array_equal(shown[0], picture)
    assert np.array_equal(shown[1], mask * np.uint8(255))
    assert np.array_equal(shown[2][~mask], picture[~mask])
    greys = np.unique(shown[2][mask])  # a pattern without the grey of the grid
    assert len(greys) == 2 and abs(greys - float(GREY)).min() > 32
    for result in shown[3:]:
        assert np.array_equal(result[~mask], picture[~mask])
        assert not np.array_equal(result[mask], picture[mask])
    assert not np.array_equal(shown[3], shown[4])


def test_inpaint_takes_pictures_and_masks_from_files(call, tmp_path, picture):
    mask = np.zeros((28, 28), np.uint8)
    mask[3:9, 5:20] = 255
    Image.fromarray(mask).convert("1").save(tmp_path / "mask.png")
    Image.fromarray(255 - picture).convert("RGB").save(tmp_path / "mine.png")
    assert call("inpaint", "--mask", tmp_path / "mask.png", "--image", tmp_path / "mine.png", "--num_images", 1) == 0
    shown = cells(tmp_path / "x.png", 4)
    assert np.array_equal(shown[0], 255 - picture) and np.array_equal(shown[1], mask)
    assert np.array_equal(shown[3][mask == 0], (255 - picture)[mask == 0])


def test_vary_with_strength_0_returns_the_picture_and_1_forgets_it(call, tmp_path, picture):
    Image.fromarray(255 - picture).save(tmp_path / "other.png")
    made = {}
    for strength in (0, 0.3, 1):
        for name, which in (("one", []), ("other", ["--image", tmp_path / "other.png"])):
            assert call("vary", "--strength", strength, "--num_images", 2, *which) == 0
            made[strength, name] = cells(tmp_path / "x.png", 3)
    assert all(np.array_equal(cell, picture) for cell in made[0, "one"])
    assert not np.array_equal(*made[0.3, "one"][1:])
    change = {s: np.abs(made[s, "one"][1:].astype(int) - made[s, "other"][1:]).mean() for s in (0, 0.3, 1)}
    assert change[0] > change[0.3] > change[1] and change[1] < 2


@pytest.mark.parametrize("strength, T", [(1.0, 1), (0.01, 40), (0.5, 2)])
def test_vary_works_in_the_shortest_processes(strength, T, data_dir, tmp_path):
    path = small_checkpoint(tmp_path / "model.pt", num_timesteps=T)
    assert edit.main(list(map(str, ["vary", "--checkpoint", path, "--data_dir", data_dir, "--output",
                                    tmp_path / "x.png", "--steps", 1, "--strength", strength, "--gif"]))) == 0
    assert frames_of(tmp_path / "x.gif")[0][-1] == 2000


def test_the_ends_of_an_interpolation_are_the_images_of_the_two_seeds(call, checkpoint, tmp_path):
    assert call("interpolate", "--seeds", 5, 9, "--frames", 7) == 0
    walk = cells(tmp_path / "x.png", 7)
    for seed, end in ((5, walk[0]), (9, walk[-1])):
        assert sample.main(list(map(str, ["--checkpoint", checkpoint, "--output", tmp_path / "x.npz", "--seed", seed,
                                          "--num_images", 1, "--sampler", "dpmpp_2m", "--steps", 8, "--device", "cpu",
                                          "--precision", "fp32"]))) == 0
        image = np.load(tmp_path / "x.npz")["arr_0"][0, :, :, 0]
        assert np.abs(image.astype(int) - end).max() <= 1  # rounding of float32 in batches of 1 and 7
    changes = np.abs(np.diff(walk.astype(int), axis=0)).mean((1, 2))
    assert changes.max() < np.abs(walk[0].astype(int) - walk[-1]).mean()  # no step is the whole way


def test_what_is_kept_stays_exactly_with_every_code_of_levels(call, coded, tmp_path, picture):
    assert call("inpaint", "--checkpoint", coded, "--mask", "left", "--num_images", 1, "--resample", 1) == 0
    assert np.array_equal(cells(tmp_path / "x.png", 4)[3][:, 14:], picture[:, 14:])


def test_invert_tells_the_error_of_what_it_shows(call, tmp_path, picture, capsys):
    assert call("invert") == 0
    shown, told = cells(tmp_path / "x.png", 3), capsys.readouterr().out
    error = float(re.search(r"mean error ([\d.]+) of 255", told)[1])
    assert np.array_equal(shown[0], picture)
    assert abs(np.abs(shown[0].astype(float) - shown[2]).mean() - error) < 0.01


def test_an_animation_keeps_what_it_shows_and_nothing_is_kept_without_one(call, monkeypatch):
    editors, do = [], edit.do_inpaint
    monkeypatch.setattr(edit, "do_inpaint", lambda args, editor: editors.append(editor) or do(args, editor))
    for more in ([], ["--gif"]):
        assert call("inpaint", "--seed", 1, "--num_images", 12, "--steps", 2, *more) == 0
    assert editors[0].frames == [] and len(editors[1].frames) >= 2
    for part in itertools.chain(*editors[1].frames):
        assert len(part) == edit.FILM_IMAGES < 12 and part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("command, flags, frames", [
    ("inpaint", ["--num_images", 10, "--resample", 1], 8), ("vary", ["--num_images", 2, "--strength", 1], 8),
    ("vary", ["--strength", 0], 1), ("interpolate", ["--frames", 5], 5), ("invert", [], 16),
    ("invert", ["--steps", 30], 40)])
def test_films_have_their_frames_and_pause_on_the_last(call, tmp_path, command, flags, frames):
    assert call(command, "--gif", *flags) == 0
    durations, last = frames_of(tmp_path / "x.gif")
    assert len(durations) == frames and durations[-1] == 2000
    assert all(20 <= duration <= 1000 for duration in durations[:-1])
    assert last.std() > 1 and sorted(path.name for path in tmp_path.iterdir()) == ["x.gif", "x.png"]


def test_a_film_ends_in_the_result(call, tmp_path):
    assert call("vary", "--gif", "--num_images", 2) == 0
    result, (_, scale) = cells(tmp_path / "x.png", 3), grid_layout((4, 1, 28, 28), 8)
    film = frames_of(tmp_path / "x.gif")[1][CAPTION::scale, ::scale]
    assert np.abs(film[1:29, 1:29].astype(int) - result[1]).max() <= 8  # 64 shades


def test_the_same_seed_makes_the_same_picture(call, tmp_path):
    made = []
    for seed in (0, 0, 1):
        assert call("inpaint", "--seed", seed, "--num_images", 1, "--resample", 1) == 0
        made.append((tmp_path / "x.png").read_bytes())
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("command, flags", [("inpaint", ["--num_images", 2, "--resample", 1]), ("invert", []),
                                            ("vary", ["--num_images", 2]), ("interpolate", ["--frames", 3])])
def test_labels_and_guidance_change_what_is_made(call, labelled, tmp_path, command, flags):
    made = []
    for more in ([], ["--label", 3], ["--label", 4], ["--label", 3, "--guidance_scale", 3]):
        assert call(command, "--checkpoint", labelled, *flags, *more) == 0
        made.append((tmp_path / "x.png").read_bytes())
    assert len(set(made)) == 4


def test_an_image_between_seeds_has_the_label_that_sample_gives_it(call, labelled, tmp_path):
    asked = ["--label", 6, "--guidance_scale", 2]
    assert call("interpolate", "--checkpoint", labelled, "--seeds", 5, 5, "--frames", 2, *asked) == 0
    assert sample.main(list(map(str, ["--checkpoint", labelled, "--output", tmp_path / "x.npz", "--seed", 5, *asked,
                                      "--num_images", 1, "--steps", 8, "--device", "cpu", "--precision", "fp32"]))) == 0
    image = np.load(tmp_path / "x.npz")["arr_0"][0, :, :, 0]
    assert np.abs(image.astype(int) - cells(tmp_path / "x.png", 2)[0]).max() <= 1


# ----------------------------------------------------------------------------------------------------------- errors


def spoilt(folder, name):
    """A picture that does not fit, by its name."""
    path, grey = folder / f"{name}.png", np.zeros((28, 28), np.uint8)
    if name == "narrow":
        Image.fromarray(np.arange(4000, dtype=np.uint8)[:, None]).save(path)
    elif name == "deep":
        Image.fromarray(np.full((28, 28), 1000, np.uint16)).save(path)
    elif name == "text":
        path.write_text("no picture")
    elif name == "half":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:200])
    elif name == "grey":
        Image.fromarray(grey + 127).save(path)
    elif name == "black":
        Image.fromarray(grey).save(path)
    return path


@pytest.mark.parametrize("flag, name, words", [
    ("--image", "narrow", ["1×4000", "--fit stretch"]),
    ("--image", "text", ["not a picture"]), ("--image", "half", ["damaged"]), ("--image", "missing", ["missing.png"]),
    ("--mask", "grey", ["dark", "white"]), ("--mask", "black", ["dark", "white"]),
    ("--mask", "deep", ["dark"]), ("--mask", "missing", ["left", "center", "missing.png"])])
def test_pictures_that_do_not_fit_are_refused(call, tmp_path, capsys, flag, name, words):
    assert_refused(call("inpaint", "--fit", "pad", flag, spoilt(tmp_path, name)), capsys, words, tmp_path / "x.png")


def test_a_network_that_was_never_without_labels_is_not_asked_without(call, labelled, tmp_path, monkeypatch, capsys):
    """Nor for the note that a picture looks like a negative."""
    content = torch.load(labelled, weights_only=True)
    content["config"]["training"]["label_dropout"] = 0.0
    torch.save(content, tmp_path / "model.pt")
    Image.new("L", (28, 28), 255).save(tmp_path / "light.png")
    predict, told = DiffusionProcess.predict, []
    monkeypatch.setattr(DiffusionProcess, "predict", lambda self, model, x_t, t, labels=None: told.append(labels)
                        or predict(self, model, x_t, t, labels))
    flags = ["--checkpoint", tmp_path / "model.pt", "--image", tmp_path / "light.png", "--num_images", 2]
    assert call("vary", *flags) == 2 and "choose one with --label" in capsys.readouterr().err
    assert not told
    assert edit.main(list(map(str, ["vary", *flags, "--label", 1, "--steps", 4, "--output", tmp_path / "x.png",
                                    "--device", "cpu"]))) == 0
    assert told and all(labels is not None for labels in told)


def test_a_checkpoint_of_one_timestep_cannot_invert(tmp_path, data_dir, capsys):
    path = small_checkpoint(tmp_path / "one.pt", num_timesteps=1)
    assert edit.main(["invert", "--checkpoint", str(path), "--data_dir", str(data_dir), "--output",
                      str(tmp_path / "x.png")]) == 2
    assert "one timestep" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("command, flags, words", [
    ("inpaint", ["--mask", "middle"], ["middle", "center"]),
    ("inpaint", ["--mask", "middle", "--data_dir", "nowhere"], ["middle", "center"]),  # before data are read
    ("inpaint", ["--resample", 0], ["--resample"]),
    ("inpaint", ["--scale", 64, "--num_images", 60], ["--scale", "pixels"]),
    ("inpaint", ["--steps", 41], ["1..40", "41"]),
    ("vary", ["--strength", 1.5], ["--strength", "1.5"]),
    ("vary", ["--strength", "nan"], ["--strength", "nan"]),
    ("vary", ["--index", 10_000], ["--index", "10000"]),
    ("interpolate", ["--frames", 1], ["--frames"]),
    ("interpolate", ["--seeds", 1], ["--seeds"]),
    ("interpolate", ["--index", 1], ["--index"]),
    ("interpolate", ["--image", "a.png"], ["--image"]),
    ("interpolate", ["--image", "a.png", "b.png", "--seeds", 1, 2], ["--seeds", "not allowed", "--image"]),
    ("interpolate", ["--invert_colors"], ["--invert_colors", "--image"]),
    ("vary", ["--fit", "pad"], ["--fit", "--image"]),
    ("inpaint", ["--mask", "left", "--fit", "pad"], ["--fit", "--mask"]),
    ("vary", ["--background", "beige"], ["--background", "--image"]),
    ("vary", ["--background", "loud"], ["--background", "loud", "white"]),
    ("interpolate", ["--seed", 1], ["--seed", "did you mean --seeds?"]),
    ("invert", ["--seed", 1], ["--seed"]),
    ("invert", ["--steps", 1], ["--steps 2"]),
    ("invert", ["--image", "x.png", "--index", 0], ["--index", "not allowed", "--image"]),
    ("vary", ["--strenght", 1], ["--strenght", "did you mean --strength?", "vary --help"]),
    ("invert", ["--output", "x.jpg"], [".png", "x.jpg"]),
    ("invert", ["--checkpoint", "missing.pt"], ["missing.pt", "train.py"]),
    ("sharpen", [], ["sharpen", "inpaint"])])
def test_edit_refuses_what_cannot_be(call, tmp_path, capsys, command, flags, words):
    assert_refused(call(command, *flags), capsys, words, tmp_path / "x.png")


@pytest.mark.parametrize("command", ["inpaint", "vary", "interpolate", "invert"])
@pytest.mark.parametrize("flags", [["--label", "7"], ["--guidance_scale", "2"]])
def test_a_checkpoint_without_labels_says_so(call, tmp_path, capsys, command, flags):
    assert_refused(call(command, *flags), capsys, ["without labels", "--conditional"], tmp_path / "x.png")


@pytest.mark.parametrize("flags, words", [(["--label", "ten"], ["ten", "0, 1, 2"]), (["--label", "0-9"], ["10", "1"]),
                                          (["--guidance_scale", 2], ["--label"]),
                                          (["--label", 1, "--guidance_scale", -1], ["--guidance_scale"])])
def test_labels_that_cannot_be_are_refused(call, labelled, tmp_path, capsys, flags, words):
    assert_refused(call("invert", "--checkpoint", labelled, *flags), capsys, words, tmp_path / "x.png")


def assert_refused(status, capsys, words, output):
    error = capsys.readouterr().err
    assert status == 2 and len(error.splitlines()) == 1 and all(word in error for word in words), error
    assert not output.exists()


@pytest.mark.parametrize("command, flags", [("inpaint", ["--resample", 1]), ("vary", []), ("invert", []),
                                            ("interpolate", ["--frames", 2])])
def test_without_steps_a_short_process_is_walked_as_far_as_it_goes(tmp_path, data_dir, command, flags):
    path = small_checkpoint(tmp_path / "model.pt", num_timesteps=6)
    where = [] if command == "interpolate" else ["--data_dir", data_dir]
    assert edit.main(list(map(str, [command, "--checkpoint", path, "--output", tmp_path / "x.png", "--device", "cpu",
                                    *where, *flags]))) == 0
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("argv", [[], ["inpaint"], ["vary"], ["interpolate"], ["invert"]], ids=str)
def test_help_is_there_for_every_command(argv, capsys):
    assert edit.main([*argv, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--steps" in text and "--checkpoint" in text if argv else "python edit.py inpaint" in text


def test_pictures_go_through_the_model_range_unchanged():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model(levels)), levels)


# ----------------------------------------------------------------------------------------------- pictures of any kind


def framed(picture):
    """A picture (28, 28) ten times as large, as one may draw it."""
    return np.kron(picture, np.ones((10, 10), np.uint8))


def test_pictures_of_any_size_are_scaled_smoothly(call, tmp_path, picture):
    """Ten times as large and cut, or with a frame: the digit comes back; two sizes of pixels would differ more."""
    Image.fromarray(framed(picture)).save(tmp_path / "large.png")
    wide = np.concatenate([framed(picture)[:, :1] + 99, framed(picture), framed(picture)[:, :1] + 99], axis=1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for name in ("large", "wide"):
        assert call("vary", "--strength", 0, "--num_images", 1, "--image", tmp_path / f"{name}.png") == 0
        assert np.abs(cells(tmp_path / "x.png", 2)[0].astype(int) - picture).max() < 40  # the filter rounds edges off
    half = Image.fromarray(np.tile(np.uint8([0, 255]), (280, 140)))  # columns of one pixel
    half.save(tmp_path / "fine.png")
    assert call("inpaint", "--num_images", 1, "--resample", 1, "--image", tmp_path / "fine.png") == 0
    assert np.abs(cells(tmp_path / "x.png", 4)[0].astype(int) - 127).max() < 30  # grey, without stripes


@pytest.mark.parametrize("fit, expected", [("crop", (0, 0)), ("stretch", (1, 0)), ("pad", (1, 7))])
def test_each_fit_keeps_its_part_of_the_picture(fit, expected, tmp_path):
    """A picture twice as wide as high, with a white square left and black elsewhere; padded: 7 white rows on top."""
    pixels = np.zeros((280, 560), np.uint8)
    pixels[:, :140] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    read = read_picture(tmp_path / "wide.png", (1, 28, 28), fit)[0]
    left, top = expected
    assert bool((read[14, 0] > 200) == left) and int((read[:14, 20] > 200).sum()) == top


def test_transparency_is_laid_on_the_background(tmp_path):
    layer = np.zeros((28, 28, 4), np.uint8)
    layer[:14, :, 3] = 255  # black above, nothing below
    Image.fromarray(layer).save(tmp_path / "layer.png")
    for background, level in (("white", 255), ("black", 0), ("#808080", 128)):
        read = read_picture(tmp_path / "layer.png", (1, 28, 28), background=background)[0]
        assert bool((read[:14] == 0).all() and (read[14:] == level).all())


def test_masks_are_cut_at_one_half(tmp_path):
    Image.fromarray(np.linspace(0, 255, 280).round().astype(np.uint8)[None].repeat(280, 0)).save(tmp_path / "soft.png")
    mask = read_mask(tmp_path / "soft.png", 28, 28)
    assert mask.shape == (1, 1, 28, 28) and torch.equal(mask[0, 0], (torch.arange(28) >= 14).float().expand(28, -1))


@pytest.mark.parametrize("flag", ["--image", "--mask", "--checkpoint"])
def test_no_input_is_overwritten(call, tmp_path, picture, checkpoint, capsys, flag):
    mine = tmp_path / "x.png"  # the output of `call`
    (tmp_path / "new").mkdir()
    Image.fromarray(picture).save(mine)
    if flag == "--checkpoint":
        mine.write_bytes(checkpoint.read_bytes())
    before = mine.read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(mine)
    for path in (mine, tmp_path / "new/../x.png", link):
        assert call("inpaint", flag, path) == 2
        assert "overwrite an input" in capsys.readouterr().err
    mine.rename(tmp_path / "x.gif")
    assert call("inpaint", flag, tmp_path / "x.gif", "--gif") == 2
    assert "overwrite an input" in capsys.readouterr().err and (tmp_path / "x.gif").read_bytes() == before


def test_a_negative_is_noticed_and_inverted(call, tmp_path, picture, monkeypatch, capsys):
    """The model's mean image is that of the digits; only a clear negative gives the line."""
    digits = to_model(torch.from_numpy(picture))
    monkeypatch.setattr(DiffusionProcess, "denoiser", lambda *_, **__: lambda x, t: digits.expand_as(x) * 0.7 - 0.3)
    Image.fromarray(255 - picture).save(tmp_path / "paper.png")
    Image.fromarray(picture).save(tmp_path / "screen.png")
    for name, flags, words in (("paper", [], "add --invert_colors"), ("paper", ["--invert_colors"], None),
                               ("screen", [], None), ("screen", ["--invert_colors"], "leave out --invert_colors")):
        assert call("vary", "--num_images", 1, "--image", tmp_path / f"{name}.png", *flags) == 0
        told = capsys.readouterr().out
        assert (words in told if words else "looks like" not in told), (name, flags, told)
        shown = cells(tmp_path / "x.png", 2)[0]
        assert np.array_equal(shown, 255 - picture if (name == "paper") != bool(flags) else picture)


def test_a_picture_of_one_colour_is_noticed(call, tmp_path, capsys):
    """Such as black strokes on nothing that are laid on black."""
    Image.new("RGBA", (280, 280), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert call("vary", "--num_images", 1, "--image", tmp_path / "clear.png", "--background", "black") == 0
    told = capsys.readouterr().out
    assert "one colour" in told and "--background black" in told and "looks like" not in told


@pytest.mark.parametrize("labels", [None, (3, 8)])
def test_the_ends_of_an_interpolation_are_what_inversion_makes_of_the_two_pictures(call, labelled, tmp_path, picture,
                                                                                   labels):
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(picture.T).save(tmp_path / "b.png")
    model = ["--checkpoint", labelled] if labels else []
    asked = [[*model, "--label", label] for label in ("3,8", *labels)] if labels else [[], [], []]
    assert call("interpolate", "--image", tmp_path / "a.png", tmp_path / "b.png", "--frames", 4, *asked[0]) == 0
    walk = cells(tmp_path / "x.png", 4)
    for name, end, flags in (("a", walk[0], asked[1]), ("b", walk[-1], asked[2])):
        assert call("invert", "--image", tmp_path / f"{name}.png", *flags) == 0
        assert np.abs(cells(tmp_path / "x.png", 3)[2].astype(int) - end).max() <= 1
    assert not np.array_equal(walk[1], walk[0]) and not np.array_equal(walk[2], walk[3])


def test_the_film_of_a_long_way_begins_with_its_first_end(call, tmp_path):
    assert call("interpolate", "--frames", 100, "--gif", "--seeds", 5, 9, "--steps", 2) == 0
    with Image.open(tmp_path / "x.gif") as film:
        shown = np.asarray(film.convert("L")).astype(int)
        assert film.n_frames == 40
    assert call("interpolate", "--frames", 2, "--gif", "--seeds", 5, 9, "--steps", 2) == 0
    with Image.open(tmp_path / "x.gif") as film:
        assert np.abs(shown - np.asarray(film.convert("L"))).mean() < 1
