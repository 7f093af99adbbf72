"""Data sets: known counts, exact conversions, splits that share nothing, and damaged files that are named."""

import io
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
import torchvision
from torch.testing import assert_close

from data import (
    CODE_POWER,
    CODE_SHARE,
    DATASETS,
    FASHION_FILES,
    LINEAR,
    MNIST_FILES,
    SPLITS,
    ImageData,
    LevelCode,
    code_of,
    histogram_code,
    in_parts,
    load_dataset,
    noise_level,
    to_model,
    to_uint8,
)
from data_sources.glyphs import BLOCK, draw_glyphs
from runtime.errors import UserError
from runtime.progress import Bar


@pytest.fixture(scope="module")
def splits(data_dir):
    return {split: load_dataset("glyphs", split, data_dir) for split in SPLITS}


# ------------------------------------------------------------------------------------------------------------- values


def test_to_uint8_is_the_inverse_of_to_model_at_every_level():
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_model(levels)
    assert values.dtype == torch.float32 and values[0] == -1 and values[-1] == 1
    assert torch.equal(to_uint8(values), levels)
    for dtype in (torch.float64, torch.float16):
        assert torch.equal(to_uint8(values.to(dtype)), levels)


def test_to_uint8_rounds_to_the_nearest_level_and_clips():
    step = 2 / 255
    values = torch.tensor([-7, -1 - step, -1 + 0.4 * step, -1 + 0.6 * step, 1 + step, 7])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]


# --------------------------------------------------------------------------------------------------------- level code

LEVELS = torch.arange(256, dtype=torch.uint8)


def pixels(counts):
    """Images (N, 1, 1, 1) with so many pixels of each level."""
    return torch.cat([torch.full((count,), level, dtype=torch.uint8) for level, count in counts.items()])[:, None, None,
                                                                                                        None]


@pytest.mark.parametrize("counts", [{0: 900, 253: 50, 128: 3}, {255: 7}, dict.fromkeys(range(256), 4), {0: 1, 255: 1}])
@pytest.mark.parametrize("share", [0.0, CODE_SHARE, 0.9])
def test_a_code_is_undone_exactly_and_stays_in_its_range(counts, share):
    code = histogram_code(pixels(counts), share)
    values = code.encode(LEVELS)
    assert values.dtype == torch.float32 and values[0] == -1 and values[-1] == 1 and bool((values.diff() > 0).all())
    assert torch.equal(code.decode(values), LEVELS)
    assert torch.equal(code.decode(torch.tensor([-7.0, 7.0])), LEVELS[[0, -1]])


def test_parts_hold_fewer_large_images_and_always_one():
    for side, most in ((8, 500), (64, 500), (512, 10), (4096, 1)):
        images = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(501, 3, side, side)
        parts = in_parts(images, 500)
        assert len(parts[0]) == most and sum(map(len, parts)) == 501, side


def test_a_level_survives_an_error_of_less_than_half_a_gap_and_no_more():
    code = histogram_code(pixels({0: 90, 255: 10}))
    half = torch.from_numpy(np.diff(code.points.numpy())).float() / 2
    values = code.encode(LEVELS)[:-1]
    assert torch.equal(code.decode(values + 0.99 * half), LEVELS[:-1])
    assert torch.equal(code.decode(values + 1.01 * half), LEVELS[1:])


def test_common_levels_lie_away_from_their_neighbours():
    gaps = histogram_code(pixels({0: 1000, 200: 100, 201: 1})).points.diff()
    assert gaps[0] > gaps[199] > 2 * gaps[100] and gaps[200] > 2 * gaps[100]
    assert gaps[100] == pytest.approx(2 * (1 - CODE_SHARE) / 255, abs=2e-6)
    weight = 100**CODE_POWER / (1000**CODE_POWER + 100**CODE_POWER + 1)
    assert gaps[199] == pytest.approx(2 * ((1 - CODE_SHARE) / 255 + CODE_SHARE * weight / 2), abs=2e-6)


def test_a_flat_histogram_and_no_share_give_the_linear_code():
    flat = histogram_code(pixels(dict.fromkeys(range(256), 3))).points
    assert (flat - LINEAR.points).abs().max() < 2 / 255
    assert histogram_code(pixels({0: 1000, 9: 1}), share=0.0).is_linear and LINEAR.is_linear
    assert not histogram_code(pixels({0: 1000, 9: 1})).is_linear
    assert (LINEAR.encode(LEVELS) - to_model(LEVELS)).abs().max() < 1e-6
    assert torch.equal(LINEAR.decode(to_model(LEVELS)), LEVELS)


def test_a_checkpoint_keeps_its_code_and_old_ones_are_linear():
    code = histogram_code(pixels({0: 90, 255: 10}))
    assert torch.equal(code_of({"data": {"shape": [1, 2, 2], "level_code": code.points.tolist()}}).points, code.points)
    assert code_of({"data": {"shape": [1, 2, 2]}}) is LINEAR


@pytest.mark.parametrize("levels, side, mean", [
    (range(256), 32, 0.0), (range(256), 64, 0.7), ([0] * 8 + [255, 9], 28, 0.51), ([255] * 5 + [*range(5)], 28, 0.27)])
def test_the_noise_of_ones_own_pictures_follows_from_their_size_and_their_paper(levels, side, mean):
    values = np.resize(np.array(levels, np.uint8), (10, 3, side, side))
    own = ImageData("my_own", "train", torch.from_numpy(values), torch.zeros(10), (), folder=Path("x"))
    assert noise_level(own.name, own) == (pytest.approx(mean, abs=0.01), 1.2)


def test_a_split_is_encoded_by_its_code(splits):
    data = splits["validation"].coded(LevelCode(torch.linspace(-1, 1, 256) ** 3))
    assert torch.equal(data.first(5).x_0(), data.code.encode(splits["validation"].images[:5]))
    assert torch.equal(data.x_0(slice(3, 5)), data.first(5).x_0()[3:])


# ------------------------------------------------------------------------------------------------------------- glyphs


def test_glyphs_have_the_shape_and_split_sizes_of_mnist(splits):
    for split, count in (("train", 55_000), ("validation", 5_000), ("test", 10_000)):
        data = splits[split]
        assert data.images.shape == (count, 1, 28, 28) and data.images.dtype == torch.uint8
        assert data.labels.shape == (count,) and data.labels.dtype == torch.int64
        assert data.class_names == tuple("0123456789") and (data.name, data.split) == ("glyphs", split)


def test_glyphs_use_the_whole_range_and_are_white_on_black(splits):
    images = splits["test"].images
    assert images.min() == 0 and images.max() == 255
    assert (images[:, :, [0, -1], :] < 128).float().mean() > 0.99  # the border is background
    assert (images.flatten(1).amax(1) > 200).all()  # no image is blank


def test_glyphs_are_balanced(splits):
    for split, data in splits.items():
        counts = data.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1, split


def test_splits_share_no_image(splits):
    seen = [{image.tobytes() for image in splits[split].images.numpy()} for split in SPLITS]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_glyphs_depend_on_seed_and_index_alone(splits):
    images, labels = draw_glyphs(BLOCK + 7, seed=1)
    assert np.array_equal(images, splits["test"].images[:BLOCK + 7, 0].numpy())
    assert np.array_equal(labels, splits["test"].labels[:BLOCK + 7].numpy())
    assert not np.array_equal(draw_glyphs(10, seed=2)[0], images[:10])


def test_glyphs_of_one_digit_resemble_each_other_more_than_other_digits(splits):
    x, y = to_model(splits["train"].images[:20_000]).flatten(1), splits["train"].labels[:20_000]
    centres = torch.stack([x[y == digit].mean(0) for digit in range(10)])
    test = splits["test"].first(2000)
    guesses = torch.cdist(to_model(test.images).flatten(1), centres).argmin(1)
    assert (guesses == test.labels).float().mean() > 0.6  # chance is 0.1


def test_first_and_to_keep_images_and_labels_together(splits):
    data = splits["test"].first(5).to("cpu")
    assert torch.equal(data.images, splits["test"].images[:5]) and torch.equal(data.labels, splits["test"].labels[:5])
    assert len(splits["test"].first(10**9).images) == 10_000


# ------------------------------------------------------------------------------------------------------ damaged files


def damaged_glyphs(data_dir, tmp_path, damage):
    path = tmp_path / "glyphs/test.npz"
    path.parent.mkdir()
    shutil.copy(data_dir / "glyphs/test.npz", path)
    damage(path)
    return path


def truncate(path):
    path.write_bytes(path.read_bytes()[:100_000])


def flip_one_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    truncate, flip_one_byte, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"no archive" * 99),
    lambda path: np.savez(path, images=np.zeros((3, 28, 28), np.uint8), labels=np.zeros(3, int)),
    lambda path: np.savez(path, images=np.zeros((10_000, 28, 28)), labels=np.zeros(10_000, int)),
    lambda path: np.savez(path, labels=np.zeros(10_000, int)),
], ids=["truncated", "one byte", "empty", "foreign", "too few", "floats", "no images"])
def test_a_damaged_glyph_file_is_named(data_dir, tmp_path, damage):
    path = damaged_glyphs(data_dir, tmp_path, damage)
    with pytest.raises(ValueError, match=r"damaged.*delete") as caught:
        load_dataset("glyphs", "test", tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, kind, files", [("mnist", "MNIST", MNIST_FILES),
                                               ("fashion_mnist", "FashionMNIST", FASHION_FILES)])
def test_a_damaged_idx_file_is_named(tmp_path, name, kind, files):
    folder = tmp_path / kind / "raw"
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_bytes(b"\0\0\x08\x03 half of it")
    with pytest.raises(ValueError, match=r"damaged.*delete") as caught:
        load_dataset(name, "train", tmp_path)
    assert any(str(folder / file) in str(caught.value) for file in files)


@pytest.mark.parametrize("damaged", MNIST_FILES)
def test_one_wrong_file_among_good_ones_is_the_one_that_is_named(real_mnist, tmp_path, damaged):
    folder = tmp_path / "MNIST/raw"
    folder.mkdir(parents=True)
    for file in MNIST_FILES:
        if file == damaged:
            (folder / file).write_bytes((real_mnist / "MNIST/raw" / file).read_bytes()[:-1])
        else:
            (folder / file).symlink_to(real_mnist / "MNIST/raw" / file)
    with pytest.raises(ValueError, match="damaged") as caught:
        load_dataset("mnist", "test", tmp_path)
    assert str(folder / damaged) in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("Error downloading\nit"), OSError("no route to host")], ids=str)
@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("cifar10", "CIFAR10")])
def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path, name, kind, error):
    def download(self):
        raise error
    monkeypatch.setattr(getattr(torchvision.datasets, kind), "download", download)
    with pytest.raises(ValueError) as caught:
        load_dataset(name, "train", tmp_path)
    message = str(caught.value)
    assert all(word in message for word in ("download", kind, str(tmp_path), "--data_dir", "--dataset glyphs"))
    assert "\n" not in message


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
@pytest.mark.parametrize("error, reason", [
    (URLError(socket.gaierror(-2, "Name or service not known")), "[Errno -2] Name or service not known"),
    (HTTPError("http://x", 503, "Service Unavailable", None, None), "HTTP Error 503: Service Unavailable"),
    (TimeoutError(), "TimeoutError"),
], ids=["no network", "no service", "no words"])
def test_a_failed_download_tells_its_innermost_reason_and_leaves_no_folder(monkeypatch, tmp_path, name, error, reason):
    def urlopen(*_, **__):
        raise error
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(UserError) as caught:
        load_dataset(name, "train", tmp_path / "new/data")
    assert f"({reason})" in str(caught.value) and "--dataset glyphs" in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_failed_download_deletes_nothing_that_was_there(monkeypatch, tmp_path):
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "MNIST/mine").write_text("mine")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(URLError("no network")))
    with pytest.raises(UserError, match=r"\(no network\)"):
        load_dataset("mnist", "train", tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["MNIST", "mine"]


def test_files_come_to_their_place_when_the_download_is_whole(monkeypatch, tmp_path, real_mnist):
    def download(dataset):
        Path(dataset.raw_folder).mkdir(parents=True)
        for file in MNIST_FILES:
            assert not any((tmp_path / "MNIST/raw").iterdir())
            shutil.copy(real_mnist / "MNIST/raw" / file, dataset.raw_folder)
            Path(dataset.raw_folder, f"{file}.gz").write_text("the archive")
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    assert len(load_dataset("mnist", "test", tmp_path).images) == 10_000
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(MNIST_FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


def test_a_download_has_our_bar_and_torchvision_has_its_own_again(monkeypatch, tmp_path):
    from torchvision.datasets import utils
    before, bars = utils.tqdm, []

    class Kept(Bar):
        def __enter__(self):
            bars.append(self)
            return super().__enter__()

    class Response(io.BytesIO):
        length, url = 40_000, None
    monkeypatch.setattr("data.Bar", Kept)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Response(b"x" * 40_000))
    with pytest.raises(UserError, match="corrupted"):
        load_dataset("mnist", "train", tmp_path)
    assert {(bar.title, bar.total, bar.unit, bar.done) for bar in bars} == {("downloading MNIST", 40_000, "bytes",
                                                                             40_000)}
    assert utils.tqdm is before


def test_train_and_validation_are_read_once_and_share_their_memory(data_dir):
    splits = [load_dataset("glyphs", split, data_dir) for split in ("train", "validation")]
    assert len({split.images.untyped_storage().data_ptr() for split in splits}) == 1
    assert load_dataset("glyphs", "test", data_dir).images.shape[0] == 10_000


@pytest.mark.parametrize("arguments, words", [(("emnist",), ["emnist", *DATASETS]),
                                              (("glyphs", "dev"), ["dev", *SPLITS])])
def test_unknown_names_are_refused_with_the_known_ones(tmp_path, arguments, words):
    with pytest.raises(ValueError) as caught:
        load_dataset(*arguments, data_dir=tmp_path)
    assert all(word in str(caught.value) for word in words)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- the real things


def test_real_mnist_has_its_known_label_counts(real_mnist):
    train, validation, test = (load_dataset("mnist", split, real_mnist) for split in SPLITS)
    counts = train.labels.bincount() + validation.labels.bincount()
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.images.shape == (55_000, 1, 28, 28) and validation.images.shape == (5_000, 1, 28, 28)
    assert_close(to_model(train.images).add(1).div(2).mean().item(), 0.1307, rtol=0, atol=5e-4)  # the well-known mean


@pytest.mark.parametrize("name, folder, shape", [("fashion_mnist", "FashionMNIST/raw", (1, 28, 28)),
                                                 ("cifar10", "cifar-10-batches-py", (3, 32, 32))])
def test_other_real_sets_are_balanced(root, name, folder, shape):
    if not (root / "data" / folder).exists():
        pytest.skip(f"data/{folder} is missing: {name} is not here")
    test = load_dataset(name, "test", root / "data")
    assert test.images.shape == (10_000, *shape) and test.images.dtype == torch.uint8
    assert test.images.is_contiguous() and test.labels.dtype == torch.int64
    assert test.labels.bincount().tolist() == [1000] * 10 and len(test.class_names) == 10


@pytest.mark.parametrize("left", ["", "x"])
def test_photographs_without_the_names_of_their_classes_are_no_bug(root, tmp_path, monkeypatch, left):
    """torchvision reads the file `batches.meta` too: missing, all are downloaded again; else it is named."""
    folder = root / "data/cifar-10-batches-py"
    if not folder.exists():
        pytest.skip(f"{folder} is missing: cifar10 is not here")
    (tmp_path / folder.name).mkdir()
    for path in folder.iterdir():
        if path.name != "batches.meta":
            (tmp_path / folder.name / path.name).symlink_to(path)
    if left:
        (tmp_path / folder.name / "batches.meta").write_text(left)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(URLError("no network")))
    with pytest.raises(UserError, match=r"batches.meta is damaged" if left else r"\(no network\)"):
        load_dataset("cifar10", "test", tmp_path)


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 352 MiB"), PermissionError(13, "no", "train.npz")])
def test_a_drawn_file_is_not_called_damaged_for_a_machine_that_cannot_read_it(data_dir, monkeypatch, error):
    def load(*_, **__):
        raise error
    monkeypatch.setattr("data.np.load", load)
    with pytest.raises(type(error)):
        load_dataset("glyphs", "test", data_dir)


def test_where_nothing_can_be_written_nothing_is_drawn(tmp_path, monkeypatch):
    (tmp_path / "glyphs").write_text("a file")
    monkeypatch.setattr("data_sources.glyphs.draw_glyphs", None)
    with pytest.raises(UserError, match=r"cannot write to .*glyphs .*another --data_dir"):
        load_dataset("glyphs", "test", tmp_path)


def test_torchvision_reads_the_same(real_mnist):
    """What data.py reads by itself is what torchvision reads."""
    ours, theirs = load_dataset("mnist", "test", real_mnist), torchvision.datasets.MNIST(real_mnist, train=False)
    assert torch.equal(ours.images[:, 0], theirs.data) and torch.equal(ours.labels, theirs.targets)


def test_what_training_and_sampling_need_does_not_import_torchvision(real_mnist, root, tmp_path):
    """Its import takes a second and 160 MB of every run."""
    code = (f"import sys, torch, train, sample, data, utils; data.load_dataset('mnist', 'test', {str(real_mnist)!r}); "
            f"utils.save_images(data.to_uint8(torch.zeros(2, 1, 4, 4)), {str(tmp_path / 'a.png')!r}); "
            f"sys.exit('torchvision' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
