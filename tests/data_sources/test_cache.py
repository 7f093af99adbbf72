"""Your own pictures: every kind of file is read right or named in one line, and the cache is whole or not there."""

import errno
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from data import ImageData, load_dataset
from data_sources import cache
from data_sources.cache import MIN_HELD_OUT, Pictures, about, cached, find_cached, size_step
from data_sources.folder import find_pictures
from data_sources.pictures import decode
from evaluation.classifier_training import fitting_shrink
from runtime.errors import UserError
from training.sizing import network_stages

RED = (200, 0, 0)


def save(path, colour=RED, size=(40, 40), mode="RGB", **options):
    """Write a picture of one colour; its format follows from the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def noise(path, seed, side=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(path)


def read(path, data_dir, quiet=True, **settings):
    """(training images as numpy, ImageData) of the pictures at `path`, 16 pixels large."""
    folder = cached(Pictures(str(path), **dict(image_size=16) | settings), data_dir, quiet=quiet)
    data = load_dataset(folder)
    return data.images.numpy(), data


def snapshot(folder):
    """Every file below a folder with its content."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp", "a.gif", "a.bmp", "a.tif", "a b é\n.png"])
def test_every_format_of_a_red_picture_comes_out_red(tmp_path, name):
    options = {"a.webp": dict(lossless=True)}.get(name, {})
    save(tmp_path / "in" / name, **options)
    images, data = read(tmp_path / "in", tmp_path / "data")
    assert images.shape == (1, 3, 16, 16) and data.class_names == ()
    assert abs(images.astype(int) - np.array(RED)[None, :, None, None]).max() <= 3


@pytest.mark.parametrize("ending", ["tif", "jpg"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_every_mode_keeps_its_white(tmp_path, mode, ending):
    if (mode, ending) == ("P", "jpg"):
        ending = "png"  # a JPEG has no palette
    save(tmp_path / f"in/a.{ending}", (255, 255, 255), mode=mode)
    images, _ = read(tmp_path / "in", tmp_path / "data")
    assert images.shape[1] == 1 and images.min() >= 254


@pytest.mark.parametrize("ending", ["tif", "jpg"])
def test_cmyk_keeps_its_colour(tmp_path, ending):
    save(tmp_path / f"in/a.{ending}", RED, mode="CMYK")
    images, _ = read(tmp_path / "in", tmp_path / "data")
    assert abs(images[0, :, 8, 8].astype(int) - RED).max() <= 3


def png_of_16_bits(pixels):
    """The bytes of a colour PNG of 16 bits, which PIL reads and does not write, from pixels (H, W, 3) uint16."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)),
             (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(part)) + kind + part + struct.pack(
        ">I", zlib.crc32(kind + part)) for kind, part in parts)


def test_16_bits_of_colour_become_8(tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.broadcast_to(np.array(RED, np.uint16) * 257, (16, 16, 3))
    (tmp_path / "in/a.png").write_bytes(png_of_16_bits(pixels))
    images, _ = read(tmp_path / "in", tmp_path / "data")
    assert (images == np.array(RED)[:, None, None]).all()


def test_16_bits_become_the_nearest_of_8(tmp_path):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    (tmp_path / "in").mkdir()
    Image.fromarray(levels).save(tmp_path / "in/a.png")
    images, _ = read(tmp_path / "in", tmp_path / "data")
    assert (images.ravel() == np.arange(256)).all()


def grey_tiff(levels, bits, white_is_zero=False):
    """The bytes of a grey TIFF as PIL does not write it, of 12 or 16 bits, from levels (H, W), W even."""
    height, width = levels.shape
    first, second = levels.reshape(-1, 2).astype(int).T  # two levels in three bytes
    strip = (levels.astype("<u2") if bits == 16 else
             np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8)).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: height,
            279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_12_bits_become_the_nearest_of_8(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tif").write_bytes(grey_tiff(np.linspace(0, 4095, 256).round().reshape(16, 16), 12))
    images, _ = read(tmp_path / "in", tmp_path / "data")
    assert (images.ravel() == np.arange(256)).all()


@pytest.mark.parametrize("white_is_zero", [False, True])
def test_a_scan_of_16_bits_whose_white_is_0_is_no_negative(tmp_path, white_is_zero):
    (tmp_path / "in").mkdir()
    levels = np.linspace(0, 65535, 256).round().reshape(16, 16)
    (tmp_path / "in/a.tif").write_bytes(grey_tiff(levels, 16, white_is_zero))
    images, _ = read(tmp_path / "in", tmp_path / "data")
    assert (images.ravel() == (np.arange(256)[::-1] if white_is_zero else np.arange(256))).all()


def test_a_level_of_16_bits_that_is_transparent_shows_the_background(tmp_path, capsys):
    levels = np.full((16, 16), 257 * 9, np.uint16)
    levels[4:12] = 5
    (tmp_path / "in").mkdir()
    Image.fromarray(levels).save(tmp_path / "in/a.png", transparency=5)
    with Image.open(tmp_path / "in/a.png") as image:
        assert image.info["transparency"] == 5
    images, _ = read(tmp_path / "in", tmp_path / "data", quiet=False, background="white")
    assert (images[0, 0, 4:12] == 255).all() and (images[0, 0, :4] == 9).all()
    assert "transparent" in capsys.readouterr().out


def test_numbers_of_32_bits_whose_range_is_unknown_are_skipped_with_a_reason(tmp_path, capsys):
    save(tmp_path / "in/a.png")
    Image.fromarray(np.full((16, 16), 255, np.int32)).save(tmp_path / "in/b.tif")
    images, _ = read(tmp_path / "in", tmp_path / "data", quiet=False)
    assert len(images) == 1 and "b.tif (has numbers that are no levels of 16 bits" in capsys.readouterr().out


@pytest.mark.parametrize("name, background, level", [("a.png", "white", 255), ("a.webp", "black", 0)])
def test_transparent_parts_show_the_background_and_a_line_says_so(tmp_path, capsys, name, background, level):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(tmp_path / "in" / name)
    images, _ = read(tmp_path / "in", tmp_path / "data", quiet=False, background=background)
    assert (images == level).all()
    assert f"--background {background}" in capsys.readouterr().out


def test_a_channel_for_transparency_that_hides_nothing_is_no_transparency(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (16, 16), (*RED, 255)).save(tmp_path / "in/a.png")
    images, _ = read(tmp_path / "in", tmp_path / "data", quiet=False)
    assert (images[0] == np.array(RED)[:, None, None]).all() and "transparent" not in capsys.readouterr().out


def test_grey_with_transparency_and_a_palette_with_it_show_the_background(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("LA", (16, 16), (10, 0)).save(tmp_path / "in/a.png")
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.save(tmp_path / "in/b.png", transparency=1)
    images, _ = read(tmp_path / "in", tmp_path / "data", background="blue", channels="3")
    assert (images == np.array((0, 0, 255))[None, :, None, None]).all()


def test_a_turned_photograph_stands_upright(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    notes = Image.Exif()
    notes[0x0112] = 3  # the camera was upside down
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in/a.png", exif=notes)
    images, _ = read(tmp_path / "in", tmp_path / "data")
    assert images[0, 0, 0, 0] == 0 and images[0, 0, -1, 0] == 255


def test_the_first_picture_of_an_animation_counts(tmp_path):
    (tmp_path / "in").mkdir()
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, (0, 0, 200))]
    frames[0].save(tmp_path / "in/a.gif", save_all=True, append_images=frames[1:])
    images, _ = read(tmp_path / "in", tmp_path / "data")
    assert abs(images[0, :, 0, 0].astype(int) - RED).max() <= 3


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000)])
def test_odd_shapes_are_cropped(tmp_path, size):
    save(tmp_path / "in/a.png", size=size)
    images, _ = read(tmp_path / "in", tmp_path / "data")
    assert (images[0] == np.array(RED)[:, None, None]).all()


def test_what_is_broken_is_named_in_one_line_and_the_rest_is_read(tmp_path, capsys):
    folder = tmp_path / "in"
    for seed in range(3):
        noise(folder / f"{seed}.png", seed)
    noise(folder / "half.jpg", 9)
    (folder / "half.jpg").write_bytes((folder / "half.jpg").read_bytes()[:300])  # within its tables
    (folder / "text.png").write_text("no picture")
    (folder / "notes.txt").write_text("left alone")
    (folder / ".hidden.png").write_text("not looked at")
    header = io.BytesIO()
    Image.new("L", (1, 1)).save(header, "PNG")
    bomb = bytearray(header.getvalue())
    bomb[16:24] = (2**30).to_bytes(4, "big") * 2
    (folder / "bomb.png").write_bytes(bomb)
    images, _ = read(folder, tmp_path / "data", quiet=False)
    first = capsys.readouterr().out.splitlines()[0]
    assert len(images) == 3
    assert all(word in first for word in ("3 pictures used", "3 skipped", "half.jpg", "text.png (it is no picture",
                                          "bomb", "1 other files (1 .txt)"))


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_a_picture_that_ends_too_early_is_skipped(tmp_path, name, share):
    noise(tmp_path / "in/b.png", 0)
    noise(path := tmp_path / "in" / name, 1, side=200)
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    images, data = read(tmp_path / "in", tmp_path / "data")
    assert len(images) == 1 and list(about(data.folder)["skipped"]) == [name]


def test_kinds_of_other_files_are_named_and_what_to_do_with_those_of_telephones(tmp_path, capsys):
    noise(tmp_path / "in/a.png", 0)
    for name in ("b.HEIC", "c.heic", "d.mov", "README", "@eaDir/thumb.jpg", "#recycle/old.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    images, _ = read(tmp_path / "in", tmp_path / "data", quiet=False)
    first = capsys.readouterr().out.splitlines()[0]
    assert "4 other files (2 .heic, " in first and "1 without an ending" in first and "1 .mov" in first
    assert first.endswith("save the .heic files as JPEG to use them, too") and len(images) == 1
    (tmp_path / "in/a.png").unlink()
    with pytest.raises(UserError, match=r"holds no pictures .*save the \.heic files as JPEG"):
        read(tmp_path / "in", tmp_path / "data")


def test_a_picture_of_too_many_pixels_is_named_with_the_limit(tmp_path, monkeypatch):
    noise(tmp_path / "in/a.png", 0)
    noise(tmp_path / "in/large.png", 0, side=41)
    monkeypatch.setattr("data_sources.pictures.MAX_PIXELS", 40 * 40)
    _, data = read(tmp_path / "in", tmp_path / "data")
    assert about(data.folder)["skipped"] == {
        "large.png": "has 41×41 pixels, more than the 1,600 that are read: make it smaller"}


def test_a_picture_that_is_deleted_while_they_are_read_is_left_out(tmp_path, monkeypatch):
    noise(tmp_path / "in/a.png", 0)
    noise(tmp_path / "in/b.png", 1)
    found = find_pictures(tmp_path / "in")
    (tmp_path / "in/b.png").unlink()
    monkeypatch.setattr(cache, "find_pictures", lambda _: found)
    images, data = read(tmp_path / "in", tmp_path / "data")
    assert len(images) == 1 and "deleted" in about(data.folder)["skipped"]["b.png"]


def test_a_drive_that_goes_away_while_pictures_are_read_is_named_and_leaves_no_cache(tmp_path, monkeypatch):
    noise(tmp_path / "in/a.png", 0)
    monkeypatch.setattr(cache, "decode", lambda *given: (shutil.move(tmp_path / "in", tmp_path / "b"), decode(*given)))
    with pytest.raises(UserError, match="in is no longer there"):
        read(tmp_path / "in", tmp_path / "data")
    assert not list((tmp_path / "data").glob("pictures/my*"))


def test_loops_of_links_end_and_links_to_nothing_are_named(tmp_path, capsys):
    noise(tmp_path / "in/cat/a.png", 0)
    noise(tmp_path / "in/dog/b.png", 1)
    os.symlink(tmp_path / "in", tmp_path / "in/dog/again")
    os.symlink(tmp_path / "nothing.png", tmp_path / "in/dog/lost.png")
    os.symlink("self.png", tmp_path / "in/dog/self.png")
    images, data = read(tmp_path / "in", tmp_path / "data", quiet=False)
    assert len(images) == 2 and data.class_names == ("cat", "dog")
    assert "self.png" in capsys.readouterr().out


def test_a_folder_that_a_link_leads_to_keeps_its_own_name(tmp_path):
    noise(tmp_path / "in/cat/a.png", 0)
    noise(tmp_path / "in/dog/b.png", 1)
    noise(tmp_path / "elsewhere/c.png", 2)
    (tmp_path / "in/owl").mkdir()
    os.symlink("../cat", tmp_path / "in/owl/similar")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in/owl/more")
    assert find_pictures(tmp_path / "in").names == ["cat/a.png", "dog/b.png", "owl/more/c.png"]


def test_files_of_an_unread_kind_are_counted_below_long_names_too(tmp_path):
    noise(tmp_path / "in/a.png", 0)
    deep = tmp_path / "in" / ("long " * 20) / ("deep " * 20)
    deep.mkdir(parents=True)
    (deep / "a.HEIC").write_text("x")
    assert find_pictures(tmp_path / "in").others == {".heic": 1}


def test_folders_that_a_drive_does_not_number_are_all_read(tmp_path, monkeypatch):
    noise(tmp_path / "in/cat/a.png", 0)
    noise(tmp_path / "in/dog/b.png", 1)
    look = os.stat

    def unnumbered(path, **options):
        about = look(path, **options)
        return os.stat_result((about[0], 0, 0, *about[3:]))
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", unnumbered)
        assert find_pictures(tmp_path / "in").names == ["cat/a.png", "dog/b.png"]


@pytest.mark.parametrize("make, words", [
    (lambda path: path.mkdir(), "holds no pictures"), (lambda path: path.write_text("x"), "no folder, no .zip"),
    (lambda path: (path.mkdir(), (path / "a.png").write_text("x")), "no picture that can be read")])
def test_nothing_usable_is_one_line(tmp_path, make, words):
    make(tmp_path / "in")
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path / "in", tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").glob("pictures/my*")) + list((tmp_path / "data").glob("pictures/.*.tmp"))


def test_every_size_that_is_allowed_leads_a_network_to_few_positions_and_its_judges_to_64_pixels():
    allowed = [side for side in range(8, 513) if side % size_step(side) == 0]
    assert {8, 28, 32, 60, 64, 72, 128, 144, 256, 288, 512} <= set(allowed) and not {68, 132, 264} & set(allowed)
    for side in allowed:
        stages = network_stages((3, side, side))
        assert side / stages["patch_size"] / 2**(len(stages["channel_mults"]) - 1) <= (16 if side > 64 else 31), side
        images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        shrink = fitting_shrink(ImageData("my", "train", images, torch.zeros(1), (), folder=Path("x")))
        assert side % (4 * shrink) == 0 and (side <= 64) == (shrink == 1) and side / shrink <= 64, side
    assert fitting_shrink(ImageData("scenes", "train", images, torch.zeros(1), ())) == 1


@pytest.mark.parametrize("side, nearest", [(30, 32), (7, 8), (513, 512), (66, 64), (100, 96), (300, 288)])
def test_a_size_that_networks_cannot_divide_names_the_nearest(tmp_path, side, nearest):
    save(tmp_path / "in/a.png")
    with pytest.raises(UserError, match=f"is {nearest}$"):
        read(tmp_path / "in", tmp_path / "data", image_size=side)


# ------------------------------------------------------------------------------------------------ archives and .npz


def test_an_archive_reads_as_its_folder_and_paths_that_lead_out_are_named(tmp_path, capsys):
    for seed, name in enumerate(("top/cat/a.png", "top/dog/b.png")):
        noise(tmp_path / "in" / name, seed)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in ("top/cat/a.png", "top/dog/b.png"):
            archive.write(tmp_path / "in" / name, name)
        archive.writestr("../evil.png", (tmp_path / "in/top/cat/a.png").read_bytes())
        archive.writestr("__MACOSX/top/cat/._a.png", "x")
    before = snapshot(tmp_path)
    from_folder, _ = read(tmp_path / "in", tmp_path / "data")
    from_archive, data = read(tmp_path / "in.zip", tmp_path / "data", quiet=False)
    assert (from_folder == from_archive).all() and data.class_names == ("cat", "dog")
    assert "1 skipped: ../evil.png" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "data")
    assert snapshot(tmp_path) == before  # nothing was written anywhere else


@pytest.mark.parametrize("written", ["./top/{}", "top\\{}"])
def test_names_in_a_zip_of_tar_and_of_windows_are_understood(tmp_path, written):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for seed, name in enumerate(("cat/a.png", "dog/b.png")):
            noise(tmp_path / "in" / name, seed)
            written_name = written.format(name).replace("/", written[-3])
            archive.writestr(zipfile.ZipInfo(written_name), (tmp_path / "in" / name).read_bytes())
    images, data = read(tmp_path / "in.zip", tmp_path / "data")
    assert data.class_names == ("cat", "dog") and np.array_equal(images, read(tmp_path / "in", tmp_path / "data")[0])


def test_several_processes_read_an_archive_as_its_folder(tmp_path):
    folder = many(tmp_path / "in", cache.MIN_PARALLEL + 14)
    archive = shutil.make_archive(str(tmp_path / "in"), "zip", folder)
    found = [about(read(path, tmp_path / "data")[1].folder) for path in (folder, archive)]
    assert found[0]["count"] == cache.MIN_PARALLEL + 14 and found[0]["digest"] == found[1]["digest"]


def test_an_archive_that_would_unpack_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data_sources.folder.MIN_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(6):
            archive.writestr(f"{number}.png", bytes(2**20))
    with pytest.raises(UserError, match="would unpack to"):
        read(tmp_path / "bomb.zip", tmp_path / "data")


@pytest.mark.parametrize("name, channels", [("arr_0", 3), ("images", 1)])
def test_an_npz_keeps_its_pixels_and_labels(tmp_path, name, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, channels), np.uint8)
    np.savez(tmp_path / "in.npz", **{name: pixels, "labels": np.array([4, 7, 7, 4, 7, 4])})
    images, data = read(tmp_path / "in.npz", tmp_path / "data")
    assert data.class_names == ("4", "7")
    for image, label in zip(images, data.labels.tolist(), strict=True):
        [k] = [k for k in range(6) if (pixels[k].transpose(2, 0, 1) == image).all()]
        assert label == (k in (1, 2, 4))


def test_what_else_lies_in_an_npz_is_not_looked_at(tmp_path):
    np.savez(tmp_path / "in.npz", images=np.random.default_rng(0).integers(0, 256, (4, 16, 16), np.uint8),
             mean=np.zeros(3), about=np.array([(1, "x")], [("größe", int), ("name", "U1")]))
    with zipfile.ZipFile(tmp_path / "in.npz", "a") as archive:
        archive.writestr("README.txt", "drawings")
        archive.writestr("arr_0.txt", "no array")
    assert len(read(tmp_path / "in.npz", tmp_path / "data")[0]) == 4


def test_arrays_of_another_content_are_other_pictures_whatever_their_date(tmp_path):
    places = []
    for seed in (0, 1):
        path = tmp_path / f"fold{seed}/pics.npz"
        path.parent.mkdir()
        np.savez(path, arr_0=np.random.default_rng(seed).integers(0, 256, (6, 16, 16), np.uint8))
        os.utime(path, (10**9, 10**9))
        places.append(cached(Pictures(str(path), 16), tmp_path / "data", quiet=True))
    assert places[0] != places[1]
    assert sorted(path.name for path in places[1].iterdir()) == ["about.json", "images.npy", "labels.npy"]


def test_a_checkpoint_finds_the_cache_of_its_own_pictures_among_those_of_one_key(tmp_path):
    place = cached(Pictures(str(many(tmp_path / "in", 3)), 16), tmp_path / "data", quiet=True)
    key, digest = (about(place)[name] for name in ("key", "digest"))
    other = place.with_name(f"my_a-{key}")
    shutil.copytree(place, other)
    (other / "about.json").write_text((other / "about.json").read_text().replace(digest, "0" * 64))
    assert find_cached(key, digest, tmp_path / "data") == place
    assert find_cached(key, "1" * 64, tmp_path / "data") is None
    assert find_cached(f"*{key[1:]}", digest, tmp_path / "data") is None  # a pattern, in a file of someone else


@pytest.mark.parametrize("arrays, words", [
    (dict(arr_0=np.zeros((4, 16, 16, 3))), r"save uint8 .*\(N, H, W\).*x \* 255"),
    (dict(arr_0=np.zeros((4, 3, 16, 16), np.uint8)), r"save images.transpose\(0, 2, 3, 1\)"),
    (dict(x=np.zeros(3)), "no array arr_0 or images, but x"),
    (dict(x_train=np.zeros((4, 16, 16), np.uint8)), "x_train: save the pictures"),
    (dict(arr_0=np.zeros((4, 16, 16), np.uint8), arr_1=np.zeros(4, int)), "an array arr_1 that looks like labels"),
    (dict(arr_0=np.zeros((4, 16, 16), np.uint8), y=np.zeros((4, 1), int)), "an array y that looks like labels"),
    (dict(images=np.zeros((4, 16, 16), np.uint8), labels=np.array(list("abca"), object)), "astype"),
    (dict(arr_0=np.zeros((4, 16, 16), np.uint8), labels=np.zeros(3, int)), "labels")])
def test_an_npz_of_other_arrays_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "in.npz", **arrays)
    with pytest.raises(UserError, match=words):
        read(tmp_path / "in.npz", tmp_path / "data")


@pytest.mark.parametrize("damage, save", [("content", np.savez), ("content", np.savez_compressed), ("shape", np.savez)])
def test_a_damaged_npz_is_one_line_and_leaves_no_cache(tmp_path, damage, save):
    path = tmp_path / "in.npz"
    save(path, arr_0=np.random.default_rng(0).integers(0, 256, (40, 16, 16), np.uint8))
    content = bytearray(path.read_bytes())
    if damage == "content":
        content[len(content) // 2] ^= 255
    else:
        with zipfile.ZipFile(path) as archive:
            array = archive.read("arr_0.npy").replace(b"(40, 16, 16)", b"(90, 16, 16)")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", array)
        content = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        read(path, tmp_path / "data")
    assert "\n" not in str(caught.value) and not list((tmp_path / "data").glob("pictures/*my_in*/*"))


def test_many_blocks_hold_what_one_holds(tmp_path, monkeypatch):
    np.savez(tmp_path / "in.npz", arr_0=np.random.default_rng(0).integers(0, 256, (40, 16, 16), np.uint8))
    whole, _ = read(tmp_path / "in.npz", tmp_path / "a")
    monkeypatch.setattr(cache, "BLOCK", 7 * 3 * 16 * 16)
    assert np.array_equal(read(tmp_path / "in.npz", tmp_path / "b")[0], whole)


def test_an_archive_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    noise(tmp_path / "in/a.png", 0)
    path = shutil.make_archive(tmp_path / "all", "zip", tmp_path / "in")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        find_pictures(Path(path))


def test_a_zip_whose_end_is_missing_is_called_incomplete(tmp_path):
    noise(tmp_path / "in/a.png", 0)
    path = Path(shutil.make_archive(tmp_path / "all", "zip", tmp_path / "in"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"all\.zip is damaged or incomplete"):
        find_pictures(path)


# ------------------------------------------------------------------------------------------------ labels and splits


def test_names_that_differ_in_blanks_or_after_a_hundred_letters_are_told_apart_as_they_should_be(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16), np.uint8)
    np.savez(tmp_path / "in.npz", images=images, labels=np.array(["cat", "cat ", "dog", "cat"]))
    found = find_pictures(tmp_path / "in.npz")
    assert (found.class_names, found.labels) == (("cat", "dog"), [0, 0, 1, 0])
    np.savez(tmp_path / "in.npz", images=images, labels=np.array(["cat", "cat ", "cat", "cat"]))
    assert find_pictures(tmp_path / "in.npz").class_names == ()
    for seed, name in enumerate("ab"):
        noise(tmp_path / "in" / f"{'x' * 120}{name}" / "a.png", seed)
    assert find_pictures(tmp_path / "in").labels == [0, 1]


def test_labels_are_the_sub_folders_in_sorted_order(tmp_path):
    for seed, name in enumerate(("zebra", "ant", "Émile", "bee")):
        noise(tmp_path / "in" / name / "deep/a.png", seed)
    found = find_pictures(tmp_path / "in")
    assert found.class_names == ("ant", "bee", "zebra", "Émile")
    assert [found.class_names[label] for label in found.labels] == [name.split("/")[0] for name in found.names]


def test_sub_folders_with_numbers_as_names_are_in_the_order_of_these(tmp_path):
    for name in ("10", "2", "-1", "1"):
        noise(tmp_path / "in" / name / "a.png", ord(name[0]) + len(name))
    assert find_pictures(tmp_path / "in").class_names == ("1", "2", "10", "-1")


@pytest.mark.parametrize("names, part", [
    (("test", "train"), "train"), (("Train", "val", "test"), "Train"), (("train", "cat"), None),
    (("seg_pred", "seg_test", "seg_train"), "seg_train"), (("evaluation", "training"), "training"),
    (("trainers", "testers"), None)])
def test_parts_for_training_and_testing_are_not_taken_for_classes_without_a_line(tmp_path, capsys, names, part):
    for number, name in enumerate(names):
        for kind in ("cat", "dog"):
            noise(tmp_path / "in" / name / f"{kind}/0.png", 10 * number + len(kind))
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in sorted((tmp_path / "in").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path / "in"))
    for source, words in ((tmp_path / "in", "of them, give"), (tmp_path / "in.zip", "unpack the archive and give")):
        read(source, tmp_path / "data", quiet=False)
        said = capsys.readouterr().out
        assert ("look like parts for training" in said) == bool(part)
        assert not part or (words in said and f"such as {tmp_path / 'in' / part}\n" in said)


def test_the_part_for_training_is_named_where_it_is(tmp_path, capsys):
    for name in ("train", "val"):
        noise(tmp_path / "in" / "all of it/images" / name / "cat/0.png", len(name))
    read(tmp_path / "in", tmp_path / "data", quiet=False)
    assert f"such as '{tmp_path}/in/all of it/images/train'\n" in capsys.readouterr().out


def test_names_in_a_zip_are_right_though_it_does_not_say_that_they_are_utf_8(tmp_path):
    noise(tmp_path / "a.png", 0)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in ("caf\u00e9/a.png", "th\u00e9/a.png"):
            archive.write(tmp_path / "a.png", name)
    content = (tmp_path / "in.zip").read_bytes()
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags of a file, in both places of the archive
        first = content.find(mark)
        while first >= 0:
            assert content[first + place + 1] & 8  # the flag for UTF-8
            content = content[:first + place + 1] + b"\0" + content[first + place + 2:]
            first = content.find(mark, first + 1)
    (tmp_path / "in.zip").write_bytes(content)
    images, data = read(tmp_path / "in.zip", tmp_path / "data")
    assert data.class_names == ("caf\u00e9", "th\u00e9") and len(images) == 2


def test_a_class_without_a_readable_picture_is_none(tmp_path):
    for number, name in enumerate(("a", "c")):
        noise(tmp_path / "in" / name / "0.png", number)
    (tmp_path / "in/b").mkdir()
    (tmp_path / "in/b/0.png").write_text("no picture")
    _, data = read(tmp_path / "in", tmp_path / "data")
    assert data.class_names == ("a", "c") and sorted(data.labels.tolist()) == [0, 1]
    shutil.rmtree(tmp_path / "in/c")
    assert read(tmp_path / "in", tmp_path / "data")[1].class_names == ()


def test_copies_and_classes_of_which_nothing_is_learned_are_told(tmp_path, capsys):
    for seed in range(MIN_HELD_OUT):
        noise(tmp_path / "in/a" / f"{seed}.png", seed, side=16)
    folder = cached(Pictures(str(tmp_path / "in"), 16), tmp_path / "data", quiet=True)
    held_out = load_dataset(folder, "test").images[0].permute(1, 2, 0).numpy()
    (tmp_path / "in/rare").mkdir()
    Image.fromarray(held_out).save(tmp_path / "in/rare/0.png")
    read(tmp_path / "in", tmp_path / "data", quiet=False)
    said = capsys.readouterr().out
    assert "All pictures of rare are held out" in said
    assert "\nExact copies of others: 1; in more than one class: 1\n" in said


def test_pictures_beside_sub_folders_have_no_classes_and_a_line_says_so(tmp_path, capsys):
    noise(tmp_path / "in/a.png", 0)
    noise(tmp_path / "in/cat/b.png", 1)
    _, data = read(tmp_path / "in", tmp_path / "data", quiet=False)
    assert data.class_names == () and "beside the sub-folders" in capsys.readouterr().out


def many(folder, count=260):
    for seed in range(count):
        noise(folder / f"{'cat' if seed % 3 else 'dog'}/{seed}.png", seed, side=16)
    return folder


def test_splits_are_tenths_without_copies_on_two_sides_and_stay_when_pictures_are_added(tmp_path):
    folder = many(tmp_path / "in")
    for seed in range(0, 60):
        shutil.copy(folder / f"{'cat' if seed % 3 else 'dog'}/{seed}.png", folder / f"dog/copy{seed}.png")

    def splits():
        place = cached(Pictures(str(folder), 16), tmp_path / "data", quiet=True)
        return {split: {image.tobytes() for image in load_dataset(place, split).images.numpy()}
                for split in ("train", "validation", "test")}

    before = splits()
    assert sum(map(len, before.values())) == 260
    assert all(10 <= len(before[split]) <= 45 for split in ("validation", "test"))
    noise(folder / "cat/new.png", 10_000, side=16)
    after = splits()
    assert all(before[split] <= after[split] for split in before)


def test_few_pictures_are_all_learned_from_and_a_line_says_what_is_missing(tmp_path, capsys):
    folder = many(tmp_path / "in", 150)
    for seed in range(100):  # copies do not make them more
        shutil.copy(folder / "cat/1.png", folder / f"cat/copy{seed}.png")
    _, data = read(folder, tmp_path / "data", quiet=False)
    assert len(data.images) == 250 and len(load_dataset(data.folder, "test").images) == 0
    assert "no validation loss" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- the cache


def test_the_same_folder_gives_the_same_bytes_in_one_process_and_in_several(tmp_path, monkeypatch):
    folder = many(tmp_path / "in", 270)
    parallel = cached(Pictures(str(folder), 16), tmp_path / "a", quiet=True)
    monkeypatch.setattr(cache, "MIN_PARALLEL", 10**6)
    shutil.copytree(folder, tmp_path / "other name")
    alone = cached(Pictures(str(tmp_path / "other name"), 16), tmp_path / "b", quiet=True)
    for name in ("images.npy", "labels.npy"):
        assert (parallel / name).read_bytes() == (alone / name).read_bytes()
    assert about(parallel)["digest"] == about(alone)["digest"]


def test_no_more_processes_read_than_windows_can_wait_for(tmp_path, monkeypatch):
    asked = []

    class Few(cache.ProcessPoolExecutor):
        def __init__(self, cores, *rest):
            asked.append(cores)
            super().__init__(2, *rest)
    monkeypatch.setattr(cache, "available_cores", lambda: 96)
    monkeypatch.setattr(cache, "ProcessPoolExecutor", Few)
    cached(Pictures(str(many(tmp_path / "in", 270)), 16), tmp_path / "data", quiet=True)
    assert asked == [61]


@pytest.mark.parametrize("count", [3, 270])
@pytest.mark.parametrize("error, words", [(PermissionError(13, "Permission denied"), "Permission denied"),
                                          (OSError(5, "Input/output error"), "Input/output error"),
                                          (MemoryError(), "too little memory")])
def test_what_the_system_cannot_read_now_ends_the_reading_and_leaves_no_cache(tmp_path, monkeypatch, count, error,
                                                                             words):
    """A picture that is left out for it would be missing for good."""
    folder, read_one = many(tmp_path / "in", count), cache.decode
    bad = sorted(folder.rglob("*.png"))[1].name

    def fail(file, *given):
        if Path(file).name == bad:
            raise error
        return read_one(file, *given)
    monkeypatch.setattr(cache, "decode", fail)  # forked processes have it too
    with pytest.raises(UserError) as raised:
        cached(Pictures(str(folder), 16), tmp_path / "data", quiet=True)
    assert words in str(raised.value) and bad in str(raised.value)
    monkeypatch.undo()
    assert about(cached(Pictures(str(folder), 16), tmp_path / "data", quiet=True))["count"] == count


def test_too_little_space_for_the_cache_is_said_before_anything_is_read(tmp_path, monkeypatch):
    folder = many(tmp_path / "in", 3)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=4000))
    monkeypatch.setattr(cache, "decode", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match=r"takes up to 4,608 bytes .* 4,000 are free"):
        cached(Pictures(str(folder), 16), tmp_path / "data", quiet=True)


def test_two_processes_at_once_read_once(tmp_path):
    many(tmp_path / "in", 60)
    code = (f"import sys\nfrom data_sources import cache\nread = cache._read_all\n"
            f"cache._read_all = lambda *given: (print('reads'), read(*given))\n"
            f"cache.cached(cache.Pictures({str(tmp_path / 'in')!r}, 16), {str(tmp_path / 'data')!r}, quiet=True)")
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                                env=os.environ | dict(PYTHONPATH=os.getcwd())) for _ in range(2)]
    assert b"".join(process.communicate()[0] for process in running).count(b"reads\n") == 1
    assert len(list((tmp_path / "data/pictures").glob("my_*"))) == 1


def test_the_second_time_no_picture_is_opened_and_a_change_is_noticed(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    for seed in range(3):
        noise(folder / f"{seed}.png", seed)
    first, data = read(folder, tmp_path / "data")
    opened = []
    monkeypatch.setattr(cache, "decode", lambda *_: opened.append(1))
    again, _ = read(folder, tmp_path / "data")
    assert (first == again).all() and not opened
    monkeypatch.undo()
    noise(folder / "3.png", 3)
    capsys.readouterr()
    more, changed = read(folder, tmp_path / "data")
    assert len(more) == 4 and changed.folder != data.folder
    assert f"{data.folder} (" in capsys.readouterr().out  # it can be deleted
    read(folder, tmp_path / "data", image_size=32)
    assert "deleted" not in capsys.readouterr().out  # read in another way: both are wanted


def test_changes_of_the_tensor_do_not_reach_the_file(tmp_path):
    noise(tmp_path / "in/a.png", 0)
    _, data = read(tmp_path / "in", tmp_path / "data")
    before = (data.folder / "images.npy").read_bytes()
    data.images.zero_()
    assert (data.folder / "images.npy").read_bytes() == before


def test_a_file_too_large_for_a_mapping_that_can_be_changed_is_mapped_all_the_same(tmp_path, monkeypatch):
    noise(tmp_path / "in/a.png", 0)
    expected, data = read(tmp_path / "in", tmp_path / "data")
    load = np.load

    def without_memory(path, mmap_mode=None):
        if mmap_mode == "c":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return load(path, mmap_mode=mmap_mode)
    monkeypatch.setattr(np, "load", without_memory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_dataset(data.folder).images, torch.from_numpy(expected))


@pytest.mark.parametrize("count, added", [(20, False), (270, False), (20, True)])  # 270: by reading processes
def test_killed_while_reading_the_next_run_starts_clean(tmp_path, count, added):
    folder = many(tmp_path / "in", count)
    slow = (f"import os, time\nfrom data_sources import cache\n"
            f"cache.decode = lambda *_: (os.write(1, f'reading {{os.getpid()}}\\n'.encode()), time.sleep(60))\n"
            f"cache.cached(cache.Pictures({str(folder)!r}, 16), {str(tmp_path / 'data')!r})")
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE,
                               env=os.environ | dict(PYTHONPATH=os.getcwd()))
    reader = int(process.stdout.readline().removeprefix(b"reading "))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (reader == process.pid) == (count < cache.MIN_PARALLEL)
    end = time.monotonic() + 30
    while Path(f"/proc/{reader}").exists() and "Z (zombie)" not in Path(f"/proc/{reader}/status").read_text():
        assert time.monotonic() < end, "a reading process goes on without its parent"
        time.sleep(0.1)
    left = list((tmp_path / "data/pictures").glob(".*.tmp"))
    assert left and not list((tmp_path / "data/pictures").glob("my_*"))
    if added:
        noise(folder / "one more.png", count)
    start = time.monotonic()
    _, data = read(folder, tmp_path / "data")
    assert about(data.folder)["count"] == count + added and time.monotonic() - start < 30
    assert not list((tmp_path / "data/pictures").glob(".*.tmp"))


def test_what_another_process_reads_in_another_size_stays(tmp_path):
    noise(tmp_path / "in/a.png", 0)
    place = tmp_path / "data/pictures"
    for key in ("0" * 16, "1" * 16):
        (place / f".my_in-{key}.tmp").mkdir(parents=True)
    with ThreadPoolExecutor(1) as other, FileLock(place / f".my_in-{'1' * 16}.lock"):
        other.submit(read, tmp_path / "in", tmp_path / "data").result()
    assert [path.name for path in place.glob(".*.tmp")] == [f".my_in-{'1' * 16}.tmp"]


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "images.npy").write_bytes(b"x"), lambda folder: (folder / "about.json").write_text("{"),
    lambda folder: (folder / "about.json").write_text(json.dumps(dict(splits=3))),
    lambda folder: np.save(folder / "labels.npy", np.zeros(1)), lambda folder: (folder / "labels.npy").write_bytes(b""),
    lambda folder: (folder / "images.npy").write_bytes(b"")])
def test_a_damaged_cache_is_one_line(tmp_path, damage):
    for seed in range(3):
        noise(tmp_path / f"in/{seed}.png", seed)
    _, data = read(tmp_path / "in", tmp_path / "data")
    damage(data.folder)
    with pytest.raises(UserError, match="delete it"):
        load_dataset(data.folder)


def test_a_line_says_how_to_turn_the_tint_of_scans_to_grey(tmp_path, capsys):
    for name, colour in (("a.png", (250, 248, 246)), ("b.png", (20, 22, 21))):
        save(tmp_path / "in" / name, colour)
    read(tmp_path / "in", tmp_path / "data", quiet=False)
    assert "Only 0 have clear colours: --channels 1" in capsys.readouterr().out
    save(tmp_path / "in/c.png", RED)
    read(tmp_path / "in", tmp_path / "data", quiet=False)
    assert "clear colours" not in capsys.readouterr().out


def test_channels_follow_from_the_pictures_unless_they_are_given(tmp_path):
    save(tmp_path / "in/a.png", (90, 90, 90))
    save(tmp_path / "in/b.jpg", (50, 50, 50))
    grey, _ = read(tmp_path / "in", tmp_path / "data")
    assert grey.shape[1] == 1
    assert read(tmp_path / "in", tmp_path / "data", channels="3")[0].shape[1] == 3
    save(tmp_path / "in/c.png", RED)
    assert read(tmp_path / "in", tmp_path / "data")[0].shape[1] == 3
    assert read(tmp_path / "in", tmp_path / "data", channels="1")[0].shape[1] == 1


@pytest.mark.parametrize("side, small, expected", [(20, True, 28), (40, True, 32), (300, True, 32), (300, False, 64)])
def test_the_size_follows_from_the_pictures_and_the_device(tmp_path, side, small, expected):
    save(tmp_path / "in/a.png", size=(side, side + 50))
    folder = cached(Pictures(str(tmp_path / "in")), tmp_path / "data", small=small, quiet=True)
    assert about(folder)["shape"] == [3, expected, expected]
