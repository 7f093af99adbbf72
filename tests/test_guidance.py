"""Labels and guidance: the theorems of the wrapper, and `sample.py --label` as a user calls it."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_checkpoint, small_model
from torch.testing import assert_close

import sample
import utils
from data import FASHION, ImageData
from diffusion import DiffusionProcess
from runtime.errors import UserError
from runtime.sampling import label_words, named_classes, sampling_options
from samplers import SAMPLERS, final_image, generate, guide
from training.trainer import Trainer

CLASSES = 10
LABELS = torch.tensor([7, 0, 3])


@pytest.fixture(scope="module")
def process():
    return DiffusionProcess(40, "cosine", prediction="v")


@pytest.fixture(scope="module")
def model():
    return small_model(num_classes=CLASSES)


class Counted:
    """A model that remembers the batch sizes of its calls."""

    def __init__(self, model):
        self.model, self.num_classes, self.calls = model, model.num_classes, []

    def __call__(self, x, t, labels=None):
        self.calls.append(len(x))
        return self.model(x, t, labels)


@pytest.fixture
def counted(model):
    return Counted(model)


def noisy(t):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(LABELS), 1, 8, 8, generator=generator), torch.full((len(LABELS),), float(t))


# -------------------------------------------------------------------------------------------------------- guide


@pytest.mark.parametrize("t", [0, 20, 39])
def test_scale_1_is_the_conditional_model_bit_for_bit_in_one_evaluation(process, model, counted, t):
    guided = guide(process, counted, LABELS, 1.0)(*noisy(t))
    assert torch.equal(guided, process.denoiser(model, LABELS)(*noisy(t)))
    assert counted.calls == [len(LABELS)]


@pytest.mark.parametrize("t", [0, 20, 39])
def test_scale_0_is_the_unconditional_model(process, model, t):
    guided = guide(process, model, LABELS, 0.0)(*noisy(t))
    assert_close(guided, process.denoiser(model)(*noisy(t)), rtol=0, atol=1e-5)
    assert (guided - process.denoiser(model, LABELS)(*noisy(t))).abs().max() > 1e-3  # labels do make a difference


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
def test_guidance_goes_from_the_unconditional_model_through_the_conditional_one_in_one_batched_call(
        process, model, counted, scale):
    guided = guide(process, counted, LABELS, scale, clip=False)(*noisy(20))
    without, with_label = (process.denoiser(model, labels, clip=False)(*noisy(20)) for labels in (None, LABELS))
    assert_close(guided, without + scale * (with_label - without), rtol=0, atol=1e-4)
    assert counted.calls == [2 * len(LABELS)]


def test_guided_images_stay_in_range(process, model):
    assert guide(process, model, LABELS, 50.0)(*noisy(20)).abs().max() <= 1
    assert guide(process, model, LABELS, 50.0, clip=False)(*noisy(20)).abs().max() > 1


@pytest.mark.parametrize("t, acts", [(9, False), (10, True), (20, True), (30, True), (31, False)])
def test_guidance_acts_inside_its_interval_only(process, model, counted, t, acts):
    guided = guide(process, counted, LABELS, 3.0, (10, 30))(*noisy(t))
    other = guide(process, model, LABELS, 3.0 if acts else 1.0)(*noisy(t))
    assert torch.equal(guided, other)
    assert counted.calls == [len(LABELS) * (2 if acts else 1)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_guided(process, model, name):
    images = [torch.cat([final_image(path) for _, path in generate(
        model, process, (1, 8, 8), range(3), sampler=name, steps=4, labels=LABELS, guidance_scale=scale)])
        for scale in (0.0, 1.0, 4.0)]
    assert (images[0] - images[1]).abs().max() > 1e-3 and (images[1] - images[2]).abs().max() > 1e-3
    unconditional = torch.cat([final_image(path) for _, path in generate(
        model, process, (1, 8, 8), range(3), sampler=name, steps=4)])
    assert_close(images[0], unconditional, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------- label dropout


def trainer(rate, **options):
    data = ImageData("glyphs", "train", torch.zeros(4000, 1, 4, 4, dtype=torch.uint8),
                     torch.arange(4000) % CLASSES, tuple("0123456789"))
    model = torch.nn.Conv2d(1, 1, 1)
    return Trainer(data, model, DiffusionProcess(10), batch_size=200, conditional=True, label_dropout=rate,
                   optimizer="adamw", **options)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_image_by_image_at_the_rate(rate):
    learner, dropped = trainer(rate), []
    for learner.step in range(20):  # an epoch
        dropped.append((learner.batch()[1] == CLASSES).float().mean().item())
    share, spread = np.mean(dropped), np.std(dropped)
    # Per image: binomial with 4,000 draws in all and 200 in a batch; per batch it would be all or nothing.
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / 4000) ** 0.5
    assert spread <= 2 * (rate * (1 - rate) / 200) ** 0.5


def test_which_labels_are_dropped_depends_on_seed_and_step_alone():
    def labels(seed, step):
        learner = trainer(0.5, seed=seed)
        learner.step = step
        return learner.batch()[1] == CLASSES
    assert torch.equal(labels(0, 3), labels(0, 3))
    assert not torch.equal(labels(0, 3), labels(0, 4)) and not torch.equal(labels(0, 3), labels(1, 3))


def test_labels_that_stay_are_those_of_the_images():
    learner = trainer(0.3)
    learner.data.images[:] = (torch.arange(4000) % CLASSES).to(torch.uint8).view(-1, 1, 1, 1)
    images, labels = learner.batch()
    shown = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(shown[labels < CLASSES], labels[labels < CLASSES])


# ------------------------------------------------------------------------------------------------ names of labels


@pytest.mark.parametrize("text, classes", [
    ("7", [7]), ("0-9", list(range(10))), ("3,5", [3, 5]), ("sneaker", [7]), ("Sneaker", [7]), ("T-shirt/top", [0]),
    ("t-shirt/top,Bag", [0, 8]), ("ankle boot", [9]), ("Trouser-Dress", [1, 2, 3]), (" 4 ", [4]), ("2-2", [2]),
    ("T-shirt/top-Pullover", [0, 1, 2]), ("1, bag", [1, 8])])
def test_labels_are_found_by_number_name_and_range(text, classes):
    assert named_classes(text, FASHION) == classes


@pytest.mark.parametrize("names, text, classes", [
    (("1", "2", "3"), "1", [0]), (("1", "10", "2"), "10", [1]), (("A", "a"), "A", [0]),
    (("A", "a"), "a", [1]), (("A", "b"), "a,B", [0, 1]), (("1", "2", "3"), "1-3", [0, 1, 2])])
def test_a_name_counts_more_than_a_number_and_its_exact_letters_more_than_others(names, text, classes):
    assert named_classes(text, names) == classes


@pytest.mark.parametrize("text", ["10", "-1", "boot", "9-0", "", "3-", "0-10", "1.5", "a-b", "sneaker,", "--"])
def test_unknown_labels_are_refused_with_what_there_is(text):
    with pytest.raises(ValueError, match=r"unknown label.*0 T-shirt/top.*9 Ankle boot.*0-9"):
        named_classes(text, FASHION)


def test_where_all_names_are_numbers_no_other_number_counts():
    assert named_classes("2-10", ("1", "2", "10")) == [1, 2]
    with pytest.raises(ValueError, match=r"unknown label '0': choose from 1, 2, 10, or a range such as 1-10"):
        named_classes("0", ("1", "2", "10"))


@pytest.mark.parametrize("names, words", [
    (("cat", "dog"), ["0", "1"]), (("1", "2", "3"), ["1", "2", "3"]), (("1", "big dog"), ["0", "'big dog'"])])
def test_the_word_that_a_page_names_for_a_class_is_understood(names, words):
    assert label_words(names) == words
    assert [named_classes(word.strip("'"), names) for word in words] == [[i] for i in range(len(names))]


def test_digits_are_listed_once():
    with pytest.raises(ValueError, match=r"choose from 0, 1, 2.*9, or a range"):
        named_classes("ten", tuple("0123456789"))


# ---------------------------------------------------------------------------------------------------- sample.py


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("c") / "conditional.pt", "fashion_mnist", conditional=True)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("u") / "unconditional.pt")


def call(checkpoint, output, *flags):
    return sample.main(list(map(str, ["--checkpoint", checkpoint, "--output", output, "--device", "cpu", "--precision",
                                      "fp32", "--steps", 3, *flags])))


def drawn(checkpoint, output, *flags):
    assert call(checkpoint, output, *flags) == 0
    with np.load(output) as file:
        return dict(file)


def test_an_npz_has_the_labels_in_rows(conditional, unconditional, tmp_path):
    made = drawn(conditional, tmp_path / "x.npz", "--label", "0-9", "--num_images", 20)
    assert made["labels"].tolist() == [i for i in range(10) for _ in range(2)]
    assert made["arr_0"].shape == (20, 28, 28, 1)
    made = drawn(conditional, tmp_path / "x.npz", "--num_images", 12)  # without --label: all in turn
    assert made["labels"].tolist() == [*range(10), 0, 1]
    assert drawn(conditional, tmp_path / "x.npz", "--label", "sneaker", "--num_images", 3)["labels"].tolist() == [7] * 3
    assert "labels" not in drawn(unconditional, tmp_path / "x.npz", "--num_images", 2)


def test_uneven_numbers_are_split_as_evenly_as_can_be(conditional, tmp_path):
    labels = drawn(conditional, tmp_path / "x.npz", "--label", "0-2", "--num_images", 8)["labels"].tolist()
    assert labels == sorted(labels) and sorted(map(labels.count, (0, 1, 2))) == [2, 3, 3]


def test_a_grid_has_a_row_for_each_label(conditional, tmp_path):
    assert call(conditional, tmp_path / "x.png", "--label", "0-4", "--num_images", 15, "--scale", 3) == 0
    width, height = Image.open(tmp_path / "x.png").size
    assert (width, height) == (3 * (3 * 29 + 1), 3 * (5 * 29 + 1))  # 3 columns, 5 rows of 28 pixels, enlarged


@pytest.mark.parametrize("label, count", [("0-9", 64), ("7,1", 35), ("0-2", 8)])
def test_no_row_of_a_grid_has_two_labels(conditional, tmp_path, label, count):
    """Each class begins a row, in the order of the images, and what its rows have left over is grey."""
    made = drawn(conditional, tmp_path / "x.npz", "--label", label, "--num_images", count)
    assert call(conditional, tmp_path / "x.png", "--label", label, "--num_images", count, "--scale", 3) == 0
    picture = np.asarray(Image.open(tmp_path / "x.png"))[::3, ::3, 0]
    assert picture.shape[1] <= 16 * 29 + 1
    cells = [[picture[r:r + 28, c:c + 28] for c in range(1, picture.shape[1], 29)]
             for r in range(1, picture.shape[0], 29)]
    images, shown = list(zip(made["arr_0"][..., 0], made["labels"], strict=True)), []
    for row in cells:
        filled = [cell for cell in row if (cell != utils.GREY).any()]
        in_row = images[len(shown):len(shown) + len(filled)]
        assert len({label for _, label in in_row}) == 1
        assert all(np.array_equal(cell, image) for cell, (image, _) in zip(row, in_row, strict=False))
        shown += in_row
    assert len(shown) == count


def test_one_label_makes_a_grid_as_without_labels(conditional, tmp_path):
    sizes = []
    for flags in (["--label", "7"], [], ["--columns", 8, "--scale", 3]):
        assert call(conditional, tmp_path / "x.png", *flags, "--num_images", 20) == 0
        sizes.append(Image.open(tmp_path / "x.png").size)
    assert sizes[0] == sizes[1] and sizes[2] == (3 * (8 * 29 + 1), 3 * (3 * 29 + 1))


def test_labels_and_guidance_change_images(conditional, tmp_path):
    variants = [drawn(conditional, tmp_path / "x.npz", "--num_images", 2, *flags)["arr_0"].tobytes() for flags in (
        ["--label", "3"], ["--label", "4"], ["--label", "3", "--guidance_scale", 3],
        ["--label", "3", "--guidance_scale", 3, "--guidance_interval", 25, 35])]
    assert len(set(variants)) == 4


@pytest.mark.parametrize("flags, words", [
    (["--label", "sandals"], ["sandals", "T-shirt/top", "Ankle boot"]),
    (["--label", "11"], ["11", "Sneaker"]),
    (["--label", "0-9", "--num_images", "4"], ["--label", "10", "4"]),
    (["--guidance_scale", "-1"], ["--guidance_scale"]),
    (["--label", "1", "--guidance_scale", "2", "--guidance_interval", "30", "10"], ["--guidance_interval", "30", "10"]),
    (["--label", "1", "--guidance_interval", "1000", "2000"], ["--guidance_interval", "1000 2000", "leave it out"]),
    (["--label", "1", "--guidance_interval", "10", "20"], ["holds none of the times of these steps", "39, "]),
    (["--guidance_scale", "1", "--guidance_interval", "10", "30"], ["--guidance_interval", "--guidance_scale than 1"]),
])
def test_sample_refuses_labels_that_there_are_not(conditional, tmp_path, capsys, flags, words):
    assert_refused(call(conditional, tmp_path / "x.png", *flags), capsys, words, tmp_path)


@pytest.mark.parametrize("training, words", [(dict(label_dropout=0.0), ["--label_dropout 0.1", "leave"]),
                                             (dict(student=True), ["distill.py --guidance_scale", "leave"])])
def test_a_network_that_was_never_without_labels_is_not_guided(conditional, tmp_path, capsys, training, words):
    content = torch.load(conditional, weights_only=True)
    content["config"]["training"] |= training
    torch.save(content, tmp_path / "model.pt")
    (tmp_path / "out").mkdir()
    options = sampling_options(content["config"], count=4)
    assert options["guidance_scale"] == 1 and options["labels"] is not None
    for scale in ("0", "2"):
        assert_refused(call(tmp_path / "model.pt", tmp_path / "out/x.png", "--guidance_scale", scale), capsys, words,
                       tmp_path / "out")
    with pytest.raises(UserError, match="--label"):  # without one nothing is left to ask the network for
        sampling_options(content["config"], count=4, label_all=False)


@pytest.mark.parametrize("flags", [["--label", "7"], ["--guidance_scale", "2"], ["--guidance_scale", "0"]])
def test_a_checkpoint_without_labels_says_so(unconditional, tmp_path, capsys, flags):
    assert_refused(call(unconditional, tmp_path / "x.png", *flags), capsys, ["without labels", "--conditional"],
                   tmp_path)


def test_an_interval_of_guidance_that_there_is_not_is_refused(unconditional, tmp_path, capsys):
    assert_refused(call(unconditional, tmp_path / "x.png", "--guidance_interval", 10, 30), capsys,
                   ["--guidance_interval", "--conditional"], tmp_path)


def assert_refused(status, capsys, words, folder):
    error = capsys.readouterr().err
    assert status == 2 and len(error.splitlines()) == 1 and all(word in error for word in words), error
    assert not any(folder.iterdir())


# --------------------------------------------------------------------------------------------------------- films


def frames_of(path):
    """The frames' durations in milliseconds."""
    with Image.open(path) as film:
        durations = []
        for i in range(film.n_frames):
            film.seek(i)
            film.load()
            durations.append(film.info["duration"])
    return durations


def test_the_film_has_a_frame_for_noise_and_for_each_step_and_pauses_on_the_last(conditional, tmp_path):
    assert call(conditional, tmp_path / "x.png", "--num_images", 3, "--steps", 6, "--batch_size", 2, "--gif") == 0
    durations = frames_of(tmp_path / "x.gif")
    assert len(durations) == 7 and durations[-1] == 2000 and max(durations[:-1]) < 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gif", "x.png"]


def test_a_long_way_is_a_film_of_forty_frames(tmp_path):
    path = small_checkpoint(tmp_path / "long.pt", num_timesteps=100, channel_mults=[1])
    assert call(path, tmp_path / "x.png", "--num_images", 1, "--steps", 100, "--gif") == 0
    durations = frames_of(tmp_path / "x.gif")
    assert len(durations) == 40 and durations[-1] == 2000


def test_the_first_frame_of_a_film_is_noise_and_the_batch_size_changes_no_frame(conditional, tmp_path):
    films = []
    for size in (3, 20):
        path = tmp_path / f"{size}.png"
        assert call(conditional, path, "--num_images", 20, "--steps", 4, "--batch_size", size, "--gif") == 0
        with Image.open(path.with_suffix(".gif")) as film:
            frames = []
            for i in range(film.n_frames):
                film.seek(i)
                frames.append(np.asarray(film.convert("L")).astype(int))
        films.append(np.stack(frames))
    assert films[0].shape == films[1].shape and np.abs(films[0] - films[1]).mean() < 1
    assert np.abs(films[0][0] - films[0][1]).mean() > 5
