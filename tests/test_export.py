"""export.py: what it writes where, and what it refuses. What the page does is tested in tests/web/."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import assert_refused
from small import pretrained_folder, small_checkpoint, small_model
from torch.testing import assert_close

import export
import sample
from checkpoint import FIELDS, load_checkpoint, save_checkpoint, to_precision
from data import DATASETS
from data_sources.points import POINT_SETS
from runtime import checkpoints
from runtime.errors import UserError
from runtime.files import file_digest
from web import page as page_of


def exported(path, *flags):
    return export.main(["--checkpoint", str(path), *map(str, flags)])


@pytest.mark.parametrize("to", ["html", "onnx"])
def test_no_folder_is_made_for_a_model_that_cannot_be_exported(tmp_path, capsys, to):
    path = tmp_path / "model.pt"
    path.write_bytes(b"broken")
    assert exported(path, "--format", to, "--output", tmp_path / f"new/x.{to}") == 2
    assert "model.pt is damaged" in capsys.readouterr().err and not (tmp_path / "new").exists()


def entries(path):
    """The configs of the models in a page."""
    return json.loads(re.search(r'id="entries">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_the_page_lies_beside_the_checkpoint_and_names_no_folder_of_this_machine(tmp_path, capsys):
    path = small_checkpoint(tmp_path / "model.pt", conditional=True)
    assert exported(path) == 0 and "page.html" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    assert str(tmp_path) not in text and "{{" not in text
    [entry] = entries(tmp_path / "page.html")
    assert (entry["name"], entry["dataset"], entry["precision"]) == ("model.pt", "glyphs", "float16")
    assert entry["use_ema"] is True
    assert entry["class_names"] == [str(i) for i in range(10)]
    assert entry["defaults"] == dict(sampler="dpmpp_2m", steps=10, guidance_scale=1.5)
    address = r"""(?:src|href)\s*=\s*["']?(?!["']?data:,)|https?://(?!www\.w3\.org/2000/svg)|@import|url\("""
    assert not re.search(address, text)


def test_words_of_a_checkpoint_are_not_taken_for_places_of_the_page(tmp_path):
    path = small_checkpoint(tmp_path / "model.pt", conditional=True)
    fields = {name: load_checkpoint(path)[name] for name in FIELDS}
    names = ["{{script}}", "{{blocks}}", *fields["config"]["data"]["class_names"][2:]]
    fields["config"]["data"]["class_names"] = names
    save_checkpoint(path, **fields)
    assert exported(path) == 0
    assert entries(tmp_path / "page.html")[0]["class_names"] == names


def test_the_name_is_seen_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    path = small_checkpoint(tmp_path / "a b/model.pt")
    monkeypatch.chdir(tmp_path)
    assert exported(path, "--output", "x.html") == 0
    assert entries(tmp_path / "x.html")[0]["name"] == "'a b/model.pt'"


def test_a_pretrained_model_has_its_page_below_outputs(tmp_path, monkeypatch, capsys):
    (tmp_path / "pretrained").mkdir()
    path = small_checkpoint(tmp_path / "model.pt")
    monkeypatch.setattr(checkpoints, "PRETRAINED", pretrained_folder(tmp_path / "pretrained", mnist=path, glyphs=path))
    monkeypatch.chdir(tmp_path)
    assert export.main([]) == 0 and "pretrained mnist" in capsys.readouterr().out
    assert entries(tmp_path / "outputs/pretrained/mnist/page.html")[0]["name"] == "mnist"
    assert export.main(["--checkpoint", "glyphs", "mnist", "--output", "x.html"]) == 0
    assert [entry["name"] for entry in entries(tmp_path / "x.html")] == ["glyphs", "mnist"]


def test_several_checkpoints_in_one_page(tmp_path):
    paths = [small_checkpoint(tmp_path / f"{name}.pt", name, conditional=True) for name in ("mnist", "fashion_mnist")]
    assert export.main(["--checkpoint", *map(str, paths), "--output", str(tmp_path / "x.html")]) == 0
    text = (tmp_path / "x.html").read_text()
    assert [entry["dataset"] for entry in entries(tmp_path / "x.html")] == ["mnist", "fashion_mnist"]
    assert 'id="weights-1"' in text and 'id="weights-2"' not in text


def test_the_weights_without_their_average_are_named_so(tmp_path):
    path = small_checkpoint(tmp_path / "model.pt")
    assert exported(path, "--no-use_ema") == 0
    assert entries(tmp_path / "page.html")[0]["use_ema"] is False


def without_models(text):
    """A page with neither its models' configs nor their weights."""
    text = re.sub(r'(id="entries">).*?(?=</script>)', r"\1", text, flags=re.DOTALL)
    return re.sub(r'<script type="text/plain" id="weights-\d+">.*?</script>\n', "", text, flags=re.DOTALL)


def test_the_page_below_docs_is_made_of_the_scripts_that_are_here(root, tmp_path):
    """If not, make it again: the command is in benchmarks/RESULTS.md."""
    path = root / "docs/index.html"
    assert path.stat().st_size < 8_000_000
    assert [entry["name"] for entry in entries(path)] == ["mnist", "fashion_mnist"]
    assert without_models(path.read_text(encoding="utf-8")) == without_models(page_of.page([]))
    assert exported(small_checkpoint(tmp_path / "model.pt", conditional=True)) == 0
    [here] = entries(tmp_path / "page.html")
    assert all(entry.keys() == here.keys() for entry in entries(path))


def test_make_demo_writes_the_page_and_names_it(root):
    if shutil.which("make") is None:
        pytest.skip("make is missing")
    says = subprocess.run(["make", "-n", "demo"], cwd=root, capture_output=True, text=True, check=True).stdout
    told = f"outputs/demo/{export.OUTPUTS['html']} in a browser"
    assert says.index("export.py --checkpoint outputs/demo/model_final.pt") < says.index(told)


def test_a_page_of_48_channels_is_small(tmp_path):
    path = small_checkpoint(tmp_path / "model.pt", conditional=True, num_timesteps=1000, base_channels=48,
                            time_emb_dim=256, middle_depth=3)
    assert exported(path) == 0 and (tmp_path / "page.html").stat().st_size < 3_000_000
    assert exported(path, "--weights", "float32") == 0 and (tmp_path / "page.html").stat().st_size < 6_000_000


def test_half_precision_is_as_close_as_it_can_be():
    numbers = to_precision({"a": torch.tensor([0.1, 1e6, -1e6, 3e-8])}, torch.float16)["a"]
    assert torch.frombuffer(bytearray(page_of._bytes(numbers)), dtype=torch.float16).tolist() == [
        torch.tensor(0.1).half().item(), 65504, -65504, torch.tensor(3e-8).half().item()]


@pytest.mark.parametrize("flags, words", [
    (["--output", "x.pdf"], ["x.pdf", ".html"]), (["--weights", "int8"], ["int8"]),
    (["--output", "model.pt/x.html"], ["model.pt"]), (["--format", "onnx", "--weights", "float16"], ["float32"]),
    (["--format", "onnx", "--checkpoint", "model.pt", "model.pt"], ["one --checkpoint"]),
    (["--format", "onnx", "--output", "x.html"], ["x.html", ".onnx"])])
def test_wrong_flags_are_refused(flags, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = small_checkpoint(tmp_path / "model.pt")
    assert_refused(capfd, exported(path, *flags), *words)


def test_nothing_is_written_if_a_checkpoint_cannot_be_read(tmp_path, capfd):
    path = small_checkpoint(tmp_path / "model.pt")
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    for other in ("missing.pt", "bad.pt"):
        status = export.main(["--checkpoint", str(path), str(tmp_path / other), "--output", str(tmp_path / "x.html")])
        assert_refused(capfd, status, other)
    assert not (tmp_path / "x.html").exists()


def test_what_the_page_cannot_run_is_refused(tmp_path, monkeypatch, capfd):
    path = small_checkpoint(tmp_path / "model.pt")
    monkeypatch.setattr(page_of, "LARGEST", 100)
    assert_refused(capfd, exported(path), "model.pt", "too many")
    monkeypatch.setattr(page_of, "SimpleUNet", object)
    assert_refused(capfd, exported(path), "model.pt", "SimpleUNet")
    assert not (tmp_path / "page.html").exists()


# ------------------------------------------------------------------------------------------------------- safetensors


def images(checkpoint, folder):
    """The images that sample.py makes with a checkpoint."""
    flags = ["--num_images", "3", "--steps", "3", "--device", "cpu", "--precision", "fp32"]
    assert sample.main(["--checkpoint", str(checkpoint), "--output", str(folder / "x.npz"), *flags]) == 0
    return np.load(folder / "x.npz")["arr_0"].astype(int)


@pytest.fixture
def folder(tmp_path):
    """What --format safetensors writes of a small checkpoint, which was measured."""
    pytest.importorskip("safetensors", reason="safetensors is missing: pip install -r requirements-export.txt")
    path = small_checkpoint(tmp_path / "model.pt", "fashion_mnist", conditional=True)
    figures = dict(frechet_distance=dict(value=0.1234, low=0.1, high=0.2, floor=0.05),
                   bits_per_dim=dict(value=1.5, low=1.4, high=1.6, floor=None))
    report = dict(checkpoint="outputs/model.pt", checkpoint_sha256=file_digest(path), use_ema=True, figures=figures)
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    assert exported(path, "--format", "safetensors") == 0
    return tmp_path / "safetensors"


def test_sample_py_draws_the_same_from_the_folder(folder, tmp_path):
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    expected = images(tmp_path / "model.pt", tmp_path)
    assert (images(folder, tmp_path) == expected).all() and expected.std() > 10
    assert exported(tmp_path / "model.pt", "--format", "safetensors", "--weights", "float16", "--output", folder) == 0
    assert np.abs(images(folder / "model.safetensors", tmp_path) - expected).max() <= 3
    assert load_checkpoint(folder / "model.safetensors")["config"] == load_checkpoint(tmp_path / "model.pt")["config"]


def test_weights_beside_the_config_of_another_export_are_refused(folder, tmp_path, capfd):
    older = (folder / "config.json").read_bytes()
    assert exported(tmp_path / "model.pt", "--format", "safetensors", "--weights", "float16", "--output", folder) == 0
    (folder / "config.json").write_bytes(older)
    with pytest.raises(UserError, match=r"config\.json beside it was written with other weights"):
        load_checkpoint(folder / "model.safetensors")


def test_the_model_card_says_what_it_is_and_its_example_runs(folder, tmp_path, monkeypatch):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "fashion_mnist" in card and "Ankle boot" in card and "MIT" in card
    assert "| frechet_distance | 0.1234 | 0.1000 to 0.2000 | 0.0500 |" in card
    assert "| bits_per_dim | 1.5000 | 1.4000 to 1.6000 |  |" in card and str(tmp_path) not in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["pixels"].shape == (16, 1, 28, 28) and names["pixels"].dtype == torch.uint8
    assert names["pixels"].float().std() > 10


def test_a_card_has_no_figures_of_other_weights(folder, tmp_path, capfd):
    path = tmp_path / "model.pt"
    assert exported(path, "--format", "safetensors", "--output", folder, "--no-use_ema") == 0
    assert "frechet_distance" not in (folder / "README.md").read_text()
    report = json.loads((tmp_path / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps(report | dict(checkpoint_sha256="0" * 64)))
    assert exported(path, "--format", "safetensors", "--output", folder) == 0
    assert "frechet_distance" not in (folder / "README.md").read_text()
    huge = dict(value=10**400, low=0, high=1, floor=None)  # no float can hold it
    for figure in ({}, huge, huge | dict(value=0.5, floor=10**400)):
        (tmp_path / "evaluation.json").write_text(json.dumps(report | dict(figures={"a": figure})))
        status = exported(path, "--format", "safetensors", "--output", folder)
        assert_refused(capfd, status, "evaluation.json", "damaged")


def trained_by_alice(path):
    """The checkpoint, with folders of the machine of its training."""
    fields = {name: load_checkpoint(path)[name] for name in FIELDS}
    fields["config"]["training"] = dict(output_dir="/home/alice/secret", data_dir="/home/alice/data", lr=0.5,
                                        checkpoint="/home/alice/teacher.pt")
    save_checkpoint(path, **fields)
    return path


def test_no_folder_of_the_machine_that_trained_is_written(tmp_path):
    """That of ONNX is looked at where it is written, below."""
    pytest.importorskip("safetensors", reason="safetensors is missing: pip install -r requirements-export.txt")
    path = trained_by_alice(small_checkpoint(tmp_path / "model.pt"))
    for kind, name in (("safetensors", "x/config.json"), ("html", "x.html")):
        assert exported(path, "--format", kind, "--output", tmp_path / name.removesuffix("/config.json")) == 0
        content = (tmp_path / name).read_bytes()
        assert b"alice" not in content and (b"0.5" in content or kind == "html")


def test_every_data_set_of_images_has_its_licence_in_the_card():
    assert set(export.LICENCES) == set(DATASETS) - set(POINT_SETS)


def test_the_example_in_the_card_of_a_student_draws_as_a_student_does(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is missing: pip install -r requirements-export.txt")
    path = small_checkpoint(tmp_path / "model.pt", conditional=True)
    fields = {name: load_checkpoint(path)[name] for name in FIELDS}
    fields["config"]["training"] = dict(student=True)
    save_checkpoint(path, **fields)
    assert exported(path, "--format", "safetensors", "--output", tmp_path / "x") == 0
    assert "sampler='consistency', steps=2, guidance_scale=1.0" in (tmp_path / "x/README.md").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every name of a file is text")
def test_a_folder_whose_name_is_not_utf_8_gets_all_files(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is missing: pip install -r requirements-export.txt")
    folder = tmp_path / "out\udcff"
    assert exported(small_checkpoint(tmp_path / "model.pt"), "--format", "safetensors", "--output", folder) == 0
    assert len(list(folder.iterdir())) == 3 and "out\\udcff" in (folder / "README.md").read_text()


def test_a_card_without_figures_says_how_to_measure(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is missing: pip install -r requirements-export.txt")
    path = small_checkpoint(tmp_path / "model.pt")
    (tmp_path / "evaluation.json").write_text(json.dumps(dict(checkpoint="outputs/another.pt", figures={"a": {}})))
    assert exported(path, "--format", "safetensors", "--output", tmp_path / "x") == 0
    assert "evaluate.py" in (tmp_path / "x/README.md").read_text()


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "config.json").unlink(), lambda folder: (folder / "config.json").write_text("{"),
    lambda folder: (folder / "config.json").write_text("[]"), lambda folder: (folder / "config.json").write_text("{}"),
    lambda folder: (folder / "model.safetensors").write_bytes(b""),
    lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])])
def test_a_damaged_folder_is_refused(folder, damage, capfd):
    damage(folder)
    assert_refused(capfd, sample.main(["--checkpoint", str(folder)]), "model.safetensors")


def test_files_of_others_are_not_overwritten(tmp_path, capfd):
    path = small_checkpoint(tmp_path / "model.pt")
    (tmp_path / "README.md").write_text("mine")
    status = exported(path, "--format", "safetensors", "--output", tmp_path)
    assert_refused(capfd, status, "README.md", "another folder")
    assert (tmp_path / "README.md").read_text() == "mine" and not (tmp_path / "model.safetensors").exists()


def test_a_folder_has_no_other_weights_than_the_average(folder, capfd):
    assert_refused(capfd, sample.main(["--checkpoint", str(folder), "--no-use_ema"]), "--no-use_ema")


@pytest.mark.parametrize("name", ["safetensors", "onnx"])
def test_a_missing_library_is_named(name, tmp_path, monkeypatch, capfd):
    path = small_checkpoint(tmp_path / "model.pt")
    for module in (name, f"{name}.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    assert_refused(capfd, exported(path, "--format", name), name, "requirements-export.txt")
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["model.pt"]


# -------------------------------------------------------------------------------------------------------------- onnx


def test_the_page_names_a_file_as_sample_reads_it_and_tells_equal_names_apart(tmp_path, monkeypatch):
    for folder in ("work", "scratch/a", "scratch/b"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("a", "b"):
        small_checkpoint(tmp_path / "scratch" / folder / "model_final.pt")
    monkeypatch.chdir(tmp_path / "work")
    Path("outputs").symlink_to(tmp_path / "scratch")  # as on a computer with a disk for results
    assert export.shown_name(Path("outputs/a/model_final.pt")) == "outputs/a/model_final.pt"
    there = [tmp_path / "scratch" / folder / "model_final.pt" for folder in ("a", "b")]
    args = export.parse_args(["--checkpoint", *map(str, there)])
    names = [model.entry["name"] for model in export.read_models(there, args)]
    assert names == ["a/model_final.pt", "b/model_final.pt"]


@pytest.mark.parametrize("config", [dict(conditional=True), dict(patch_size=1, attention=[2, 4], depth=2)])
def test_onnx_predicts_the_same_for_batches_of_any_size(config, tmp_path, capsys):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is missing: pip install -r requirements-export.txt")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install -r "
                                                            "requirements-export.txt")
    path = trained_by_alice(small_checkpoint(tmp_path / "model.pt", **config))
    assert exported(path, "--format", "onnx") == 0
    assert float(re.search(r"by (\S+) at most", capsys.readouterr().out)[1]) < 1e-4
    content = (tmp_path / "model.onnx").read_bytes()
    assert not any(str(folder).encode() in content for folder in (tmp_path, export.__file__, torch.__path__[0]))
    session = onnxruntime.InferenceSession(content)
    kept = json.loads(session.get_modelmeta().custom_metadata_map["config"])
    assert kept == load_checkpoint(path)["config"] | dict(training=dict(lr=0.5)) and b"alice" not in content
    conditional = config.pop("conditional", False)
    model = small_model(num_classes=10 if conditional else None, **config)
    assert [each.name for each in session.get_inputs()] == ["x", "t", "labels"][:3 if conditional else 2]
    for count in (1, 7):
        inputs = export.example_inputs(model, (1, 28, 28), count)
        named = dict(zip(("x", "t", "labels"), (each.numpy() for each in inputs), strict=False))
        [prediction] = session.run(None, named)
        assert_close(torch.from_numpy(prediction), model(*inputs), rtol=0, atol=1e-4)


def test_predictions_that_differ_are_not_written(tmp_path, monkeypatch, capfd):
    path = small_checkpoint(tmp_path / "model.pt")
    monkeypatch.setattr(export, "to_onnx", lambda *_: type("Model", (), {"SerializeToString": lambda self: b""})())
    monkeypatch.setattr(export, "difference", lambda *_: float("nan"))
    assert exported(path, "--format", "onnx") == 1
    assert "nothing is written" in capfd.readouterr().err and not (tmp_path / "model.onnx").exists()
