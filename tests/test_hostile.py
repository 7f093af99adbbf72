"""Files from strangers: nothing in them runs, nothing that they ask for is allocated, one line says what is wrong."""

import io
import json
import os
import pickle
import shutil
import struct
import sys
import time
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from harness import assert_identical, assert_refused, files, peak_memory, reset_peak_memory, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import small_checkpoint

import edit
import evaluate
import sample
import train
import visualize_diffusion
from checkpoint import FORMAT, load_checkpoint, load_model, saved_step
from data_sources import pictures
from data_sources.pictures import read_folder, read_mask, read_npz, read_picture
from training.run import newest_valid

SECONDS = 10  # of the processor's time that a refusal may take


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A valid checkpoint."""
    return small_checkpoint(tmp_path_factory.mktemp("good") / "model.pt")


def altered(good, path, change):
    """Write the good checkpoint to `path` with `change` made to its dict."""
    content = torch.load(good, weights_only=True)
    torch.save(change(content) or content, path)
    return path


def refused_by_sample(path, capfd, *words):
    """sample.py refuses a checkpoint in one line, soon, with little memory, and writes nothing."""
    before, start = files(path.parent), time.process_time()
    reset_peak_memory()
    peak = peak_memory()
    output = path.parent / "new/x.png"
    assert_refused(capfd, sample.main(["--checkpoint", str(path), "--output", str(output), "--device", "cpu"]),
                   path.name, *words)
    assert time.process_time() - start < SECONDS
    assert peak_memory() - peak < 500_000  # KiB
    assert files(path.parent) == before and not output.parent.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be set back")
def test_memory_that_is_taken_and_given_back_is_seen():
    """Also after the process has held more: tests of another file may have."""
    bytes(bytearray(600 * 2**20))
    reset_peak_memory()
    peak = peak_memory()
    bytes(bytearray(300 * 2**20))
    assert 500_000 < peak_memory() - peak < 700_000  # KiB: both are held at the same time


class Evil:
    """A pickle of this makes the folder `executed` where it is loaded without care."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


# ---------------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize("where", ["itself", "config", "history", "weight", "key"])
def test_code_in_a_checkpoint_is_not_run_by_any_script(good, tmp_path, monkeypatch, capfd, where):
    monkeypatch.chdir(tmp_path)
    place = {"config": lambda c: c["config"]["model"].update(depth=Evil()), "key": lambda c: c.update({Evil(): 1}),
             "history": lambda c: c["history"].update(records=Evil()), "weight": lambda c: c["ema"].update(x=Evil()),
             "itself": lambda c: Evil()}[where]
    (tmp_path / "run").mkdir()
    path = altered(good, tmp_path / "run/model_final.pt", place)
    before = files(tmp_path)
    for main, flags in [(sample.main, []), (edit.main, ["vary"]), (evaluate.main, []),
                        (visualize_diffusion.main, ["--what", "denoising"])]:
        output = {evaluate.main: "--output_dir", visualize_diffusion.main: "--save_path"}.get(main, "--output")
        argv = [*flags, "--checkpoint", str(path), output, str(tmp_path / "new/x.png"), "--device", "cpu"]
        status = main(argv)
        assert status == 2 and "model_final.pt" in capfd.readouterr().err
    assert not (tmp_path / "executed").exists()
    assert newest_valid(tmp_path / "run") is None
    assert files(tmp_path) == before and not (tmp_path / "executed").exists()


def test_a_bare_pickle_is_not_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 2, 4):
        (tmp_path / "model.pt").write_bytes(pickle.dumps(Evil(), protocol))
        refused_by_sample(tmp_path / "model.pt", capfd)
    assert not (tmp_path / "executed").exists()


# --------------------------------------------------------------------------------------------------------------- bytes


def loads_the_same_or_is_refused(content, path, expected):
    """Whether a file of these bytes loads; then it is the same in every number and name."""
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            loaded = load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return False
    assert_identical(loaded, expected)
    return True


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_with_any_byte_changed_it_is_refused_or_the_same(good, data):
    content = bytearray(good.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    loads_the_same_or_is_refused(bytes(content), good.with_name("flipped.pt"), load_checkpoint(good))


def test_with_any_bit_of_a_weight_changed_it_is_refused(good):
    content = good.read_bytes()
    with zipfile.ZipFile(good) as archive:
        parts = [part for part in archive.infolist() if "/data/" in part.filename][:40]
    for part in parts:
        place = part.header_offset + 30 + sum(struct.unpack("<HH", content[part.header_offset + 26:][:4]))
        for offset in (0, part.file_size - 1):
            changed = bytearray(content)
            changed[place + offset] ^= 1
            assert not loads_the_same_or_is_refused(bytes(changed), good.with_name("flipped.pt"), None)


def test_a_tensor_that_a_changed_header_calls_a_folder_is_not_left_to_chance(good):
    """torch fills such a tensor with whatever lay in memory."""
    content = bytearray(good.read_bytes())
    place = content.index(b"PK\x01\x02")
    while not content[place + 46:].startswith(b"archive/data/3"):
        place = content.index(b"PK\x01\x02", place + 1)
    content[place + 38] ^= 0x10
    assert loads_the_same_or_is_refused(bytes(content), good.with_name("flipped.pt"), load_checkpoint(good))


@pytest.mark.parametrize("part", [0, 0.01, 0.2, 0.5, 0.9, 0.99, 0.999])
def test_a_truncated_checkpoint_is_refused(good, tmp_path, capfd, part):
    content = good.read_bytes()
    (tmp_path / "model.pt").write_bytes(content[:int(part * len(content))])
    refused_by_sample(tmp_path / "model.pt", capfd, "damaged or no checkpoint")


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=300), prefix=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"PK\x05\x06"]))
def test_random_bytes_are_refused(tmp_path_factory, content, prefix):
    path = tmp_path_factory.mktemp("random") / "model.pt"
    assert not loads_the_same_or_is_refused(prefix + content, path, None)
    assert saved_step(path) == float("inf")


# ----------------------------------------------------------------------------------------------------------- too large


def bomb(path, member="archive/data.pkl", size=2 * 10**8):
    """An archive of a few megabytes that unpacks to `size` zeros."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open(member, "w") as out:
        for _ in range(size // 10**7):
            out.write(bytes(10**7))
    return path


def test_a_zip_bomb_is_refused_before_it_unpacks(good, tmp_path, capfd):
    refused_by_sample(bomb(tmp_path / "model.pt"), capfd, "would unpack to 200,000,000 bytes")
    shutil.copy(good, tmp_path / "more.pt")
    refused_by_sample(bomb(tmp_path / "more.pt", "archive/data/9999"), capfd, "would unpack to")


def endless():
    """A list that is short in a file and has 10^30 elements when it is written out."""
    value = []
    for _ in range(30):
        value = [value] * 10
    return value


def deep():
    """A list in a list in a list ..., 200 times."""
    value = []
    for _ in range(200):
        value = [value]
    return value


MODEL_CONFIGS = [{"base_channels": 10**12}, {"base_channels": -8}, {"base_channels": 0}, {"base_channels": "8"},
                 {"base_channels": 8.0}, {"base_channels": True}, {"base_channels": None}, {"depth": 10**9},
                 {"depth": 64}, {"depth": -1}, {"middle_depth": 10**9}, {"time_emb_dim": 10**12}, {"time_emb_dim": 0},
                 {"time_emb_dim": 7}, {"image_channels": 10**12}, {"image_channels": 3}, {"patch_size": 3},
                 {"num_classes": 10**12}, {"num_classes": -1}, {"num_classes": "ten"}, {"num_classes": 5},
                 {"channel_mults": [10**12]}, {"channel_mults": [1] * 1000}, {"channel_mults": "1,2"},
                 {"channel_mults": [-1]}, {"channel_mults": []}, {"channel_mults": {}}, {"channel_mults": [[1]]},
                 {"attention": [10**12]}, {"attention": "4"}, {"attention": [[]]}, {"activation": "exec"},
                 {"activation": []}, {"activation": 10**5000}, {"unknown": 1}, {"depth": endless()},
                 {"base_channels": deep()}, {"activation": endless()}, {"activation": deep()}, {1: 2}, {"depth": {}},
                 {"base_channels": 4096, "channel_mults": [64] * 8, "depth": 64}]
DIFFUSION_CONFIGS = [{"num_timesteps": 10**12}, {"num_timesteps": -1}, {"num_timesteps": 0}, {"num_timesteps": "40"},
                     {"num_timesteps": 1.5}, {"num_timesteps": True}, {"schedule": "sigmoid"}, {"schedule": endless()},
                     {"schedule": ["cosine"]}, {"beta_start": "x"}, {"beta_end": float("nan")}, {"beta_end": 2.0},
                     {"data_std": float("inf")}, {"data_std": -1.0}, {"data_std": 0}, {"data_std": [1]},
                     {"prediction": "exec"}, {"prediction": {}}, {"noise_std": 0.0}, {"noise_mean": "x"},
                     {"timestep_sampling": None}, {"snr_gamma": "x"}, {"snr_gamma": -1}, {"loss_weight": 1},
                     {"zero_terminal_snr": True, "prediction": "eps"}, {"unknown": 1}, {"noise_mean": endless()}]
PICTURES = dict(path="x", fit="crop", channels="3", background="white", key="0" * 16, digest="0" * 64, count=3)
DATA_CONFIGS = [{"shape": [1, 10**9, 10**9]}, {"shape": [1, 28]}, {"shape": "1,28,28"}, {"shape": [1, 28.0, 28]},
                {"shape": [3, 28, 28]}, {"shape": [1, -28, 28]}, {"shape": [1, 27, 28]}, {"shape": endless()},
                {"level_code": None}, {"level_code": 3}, {"level_code": endless()}, {"level_code": [0.0] * 256},
                {"level_code": [-1.0, *[0.0] * 254, 1.0]}, {"level_code": ["a"] * 256}, {"level_code": [-1.0, 1.0]},
                {"guidance_scale": "2"}, {"guidance_scale": float("nan")}, {"guidance_scale": -1},
                {"guidance_scale": []},
                {"pictures": None}, {"pictures": {}}, {"pictures": PICTURES | {"fit": "bend"}},
                {"pictures": PICTURES | {"channels": "2"}}, {"pictures": PICTURES | {"count": "3"}},
                {"pictures": PICTURES | {"more": 1}}, {"pictures": PICTURES | {"path": endless()}},
                {"dataset": 3}, {"dataset": None}, {"class_names": 3}, {"class_names": "0123456789"},
                {"class_names": [1, 2]}, {"class_names": None}, {"class_names": endless()}, {"class_names": {"a": 1}}]
CONFIGS = [(part, change) for part, changes in [("model", MODEL_CONFIGS), ("diffusion", DIFFUSION_CONFIGS),
                                                ("data", DATA_CONFIGS)] for change in changes]


@pytest.mark.parametrize("part, change", CONFIGS, ids=[f"{part}-{next(iter(change))}-{i}" for i, (part, change)
                                                       in enumerate(CONFIGS)])
def test_a_config_that_cannot_be_or_asks_for_too_much_is_refused_soon(good, tmp_path, capfd, part, change):
    path = altered(good, tmp_path / "model.pt", lambda content: content["config"][part].update(change))
    refused_by_sample(path, capfd)


@pytest.mark.parametrize("field, value", [
    ("step", -1), ("step", 10**400), ("step", 1.0), ("epoch", "1"), ("seconds", float("nan")), ("seconds", -1.0),
    ("history", []), ("history", {"records": 1}), ("history", {"records": [{"step": 1}]}), ("precision", 16),
    ("history", {"records": [{"step": 1, "loss": 1.0, "seconds": 1.0, "x": float("nan")}]}), ("config", None),
    ("history", {"losses": [endless()]}), ("history", {"losses": "abc"}), ("history", {"skipped": [1]}),
    ("history", {"records": [{"step": 1, "loss": endless(), "seconds": 1.0}]}), ("optimizer", None), ("model", {}),
    ("ema", []), ("images_seen", None), ("format", "tiny-diffusion-9"), ("format", endless()), ("config", {}),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_a_field_that_cannot_be_is_refused(good, tmp_path, capfd, field, value):
    refused_by_sample(altered(good, tmp_path / "model.pt", lambda content: content.update({field: value})), capfd)


# ------------------------------------------------------------------------------------------------------------- weights


WEIGHTS = {
    "missing": lambda w, name: w.pop(name),
    "additional": lambda w, name: w.update(extra=torch.zeros(3)),
    "a number for a name": lambda w, name: w.update({3: torch.zeros(3)}),
    "not a number": lambda w, name: w[name].view(-1)[-1:].fill_(torch.nan),
    "infinite": lambda w, name: w[name].view(-1)[:1].fill_(-torch.inf),
    "transposed": lambda w, name: w.update({name: w[name].flatten()}),
    "of no dimension": lambda w, name: w.update({name: torch.zeros(())}),
    "whole numbers": lambda w, name: w.update({name: w[name].long()}),
    "double": lambda w, name: w.update({name: w[name].double()}),
    "complex": lambda w, name: w.update({name: w[name].to(torch.complex64)}),
    "bfloat16": lambda w, name: w.update({name: w[name].bfloat16()}),
    "sparse": lambda w, name: w.update({name: w[name].to_sparse()}),
    "nowhere": lambda w, name: w.update({name: w[name].to("meta")}),
    "without memory": lambda w, name: w.update({name: torch.zeros(1).expand(w[name].shape)}),
    "vast without memory": lambda w, name: w.update({name: torch.zeros(1).expand(10**6, 10**6)}),
    "a list": lambda w, name: w.update({name: w[name].tolist()}),
    "nothing": lambda w, name: w.update({name: None}),
    "endless": lambda w, name: w.update({name: endless()}),
}


@pytest.mark.parametrize("part", ["model", "ema"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_the_networks_are_refused(good, tmp_path, capfd, part, kind):
    def change(content):
        content["ema"] = {name: weight.clone() for name, weight in content["ema"].items()}
        WEIGHTS[kind](content[part], next(iter(content[part])))
    refused_by_sample(altered(good, tmp_path / "model.pt", change), capfd, part)


def test_a_large_network_of_one_small_memory_is_refused(good, tmp_path, capfd):
    """All tensors of a network of 100 MB are views of the same few kilobytes: it would grow when it is built."""
    from models import create_model
    with torch.device("meta"):
        large = create_model(base_channels=256, patch_size=2, image_channels=1, time_emb_dim=1024)

    def change(content):
        content["config"]["model"] = large.config
        shared = torch.zeros(max(weight.numel() for weight in large.state_dict().values()))
        for part in ("model", "ema"):
            content[part] = {name: shared[:weight.numel()].view(weight.shape)
                             for name, weight in large.state_dict().items()}
    refused_by_sample(altered(good, tmp_path / "model.pt", change), capfd, "do not fit into the file's")


def test_the_good_checkpoint_is_accepted(good, tmp_path):
    path = altered(good, tmp_path / "model.pt", lambda content: None)
    assert load_model(path)[2]["format"] == FORMAT


# ------------------------------------------------------------------------------------------------- arrays and pictures


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def header(shape, descr="|u1"):
    """The beginning of a .npy file that says it has this shape."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, dict(descr=descr, fortran_order=False, shape=shape))
    return out.getvalue()


def archive_of(path, content, member="arr_0.npy"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


NPZ = {
    "code": lambda path: npz(path, arr_0=np.array([Evil()], dtype=object)),
    "code in the labels": lambda path: npz(path, arr_0=np.zeros((2, 28, 28, 1), np.uint8),
                                           labels=np.array([Evil()], dtype=object)),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "random": lambda path: path.write_bytes(os.urandom(5000)),
    "empty": lambda path: path.write_bytes(b""),
    "other names": lambda path: npz(path, pictures=np.zeros(3), **{"a\nb": np.zeros(3)}),
    "bytes that are no array": lambda path: archive_of(path, b"7"),
    "images that are no array": lambda path: archive_of(path, b"7", member="images.npy"),
    "an array that claims to be vast": lambda path: archive_of(path, header((10**12,)) + b"abc"),
    "a negative shape": lambda path: archive_of(path, header((-1, 28, 28, 1)) + bytes(784)),
    "a bomb": lambda path: bomb(path, "arr_0.npy"),
    "truncated": lambda path: path.write_bytes(
        npz(path, arr_0=np.random.default_rng(0).integers(0, 255, (9, 28, 28, 1), np.uint8)).read_bytes()[:3000]),
}


@pytest.mark.parametrize("kind", NPZ)
def test_arrays_that_are_not_harmless_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "MIN_BYTES", 10**6)
    path = tmp_path / "images.npz"
    NPZ[kind](path)
    reset_peak_memory()
    start, peak = time.process_time(), peak_memory()
    with pytest.raises(ValueError) as caught:
        read_npz(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists() and time.process_time() - start < SECONDS
    assert peak_memory() - peak < 500_000


def test_evaluate_refuses_arrays_with_code_in_one_line(tmp_path, monkeypatch, capfd, data_dir):
    monkeypatch.chdir(tmp_path)
    path = NPZ["code"](tmp_path / "images.npz")
    argv = ["--images", str(path), "--dataset", "glyphs", "--data_dir", str(data_dir), "--device", "cpu",
            "--output_dir", str(tmp_path / "new")]
    assert_refused(capfd, evaluate.main(argv), "images.npz")
    assert not (tmp_path / "executed").exists() and list(files(tmp_path)) == ["images.npz"]


def png(path, width, height, data=b""):
    """A PNG file whose header says that it has this size."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
                     + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def vast_png(path):
    """12,000 × 12,000 zeros, just under what PIL refuses by itself, in 140 kilobytes."""
    press = zlib.compressobj(9)
    png(path, 12_000, 12_000, b"".join(press.compress(bytes(12_001)) for _ in range(12_000)) + press.flush())


def half_png(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:400])


PNGS = {
    "truncated": half_png, "a bomb": vast_png, "random": lambda path: path.write_bytes(os.urandom(3000)),
    "empty": lambda path: path.write_bytes(b""), "no data": lambda path: png(path, 28, 28),
    "a claim": lambda path: png(path, 2**31 - 1, 2**31 - 1), "a pickle": lambda path: path.write_bytes(
        pickle.dumps(Evil())),
}


@pytest.mark.parametrize("kind", PNGS)
def test_pictures_and_masks_that_are_damaged_or_vast_are_refused(tmp_path, capfd, kind):
    path = tmp_path / "picture.png"
    PNGS[kind](path)
    reset_peak_memory()
    start, peak = time.process_time(), peak_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        for read in (lambda: read_picture(path, (1, 28, 28)), lambda: read_mask(path, 28, 28)):
            with pytest.raises(ValueError) as caught:
                read()
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(ValueError):
            read_folder(tmp_path, 1)
    assert time.process_time() - start < SECONDS
    assert peak_memory() - peak < 200_000


@pytest.mark.parametrize("flag", ["--image", "--mask"])
def test_edit_refuses_a_damaged_picture_in_one_line_and_writes_nothing(good, tmp_path, capfd, data_dir, flag):
    half_png(tmp_path / "picture.png")
    argv = ["inpaint", "--checkpoint", str(good), "--data_dir", str(data_dir), "--device", "cpu", flag,
            str(tmp_path / "picture.png"), "--output", str(tmp_path / "x.png")]
    if flag == "--mask":
        Image.new("L", (28, 28)).save(tmp_path / "image.png")
        argv += ["--image", str(tmp_path / "image.png")]
    before = files(tmp_path)
    assert_refused(capfd, edit.main(argv), "picture.png")
    assert files(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------- data sets


@pytest.mark.parametrize("content", [b"", b"half", None], ids=["empty", "random", "code"])
def test_a_damaged_data_set_is_refused_before_anything_is_written(tmp_path, monkeypatch, capfd, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data/glyphs/train.npz"
    path.parent.mkdir(parents=True)
    if content is None:
        np.savez(path, images=np.array([Evil()], dtype=object), labels=np.zeros(1))
    else:
        path.write_bytes(content)
    before = files(tmp_path)
    assert_refused(capfd, train.main(tiny(tmp_path / "data", tmp_path / "run")), "train.npz", "damaged", "delete")
    assert files(tmp_path) == before and not (tmp_path / "executed").exists()


RECORD = dict(step=1, epoch=0, loss=0.5, seconds=1.0, val_loss=None)


@pytest.mark.parametrize("change", [
    dict(loss="<script>"), dict(val_loss=[1.0]), dict(lr={"a": 1}), dict(loss=True), dict(x=float("inf")),
    dict(x=10**400), dict(step=1.5), dict(step=None), dict(seconds=1), dict(seconds=None), {7: 1.0},
    dict(x=torch.zeros(()))], ids=str)
def test_metrics_of_a_stranger_stay_plain(good, tmp_path, change):
    """What a checkpoint's history puts into metrics.jsonl when it is resumed is numbers and nothing else."""
    path = altered(good, tmp_path / "model.pt", lambda content: content.update(history={"records": [RECORD]}))
    assert json.loads(json.dumps(load_checkpoint(path)["history"]["records"], allow_nan=False)) == [RECORD]
    records = [RECORD, RECORD | change]
    with pytest.raises(ValueError, match=r"history|too large"):
        load_checkpoint(altered(good, path, lambda content: content.update(history={"records": records})))
