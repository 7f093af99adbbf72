"""export.py: what it writes where, and what it refuses. What the page does is tested in tests/web/."""

import json
import re

import pytest
import torch
from harness import assert_refused
from small import small_checkpoint

import export
from web import page as page_of


def exported(path, *flags):
    return export.main(["--checkpoint", str(path), *map(str, flags)])


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
    assert entry["class_names"] == [str(i) for i in range(10)]
    assert entry["defaults"] == dict(sampler="dpmpp_2m", steps=10, guidance_scale=1.5)
    address = r"""(?:src|href)\s*=\s*["']?(?!["']?data:,)|https?://(?!www\.w3\.org/2000/svg)|@import|url\("""
    assert not re.search(address, text)


def test_the_name_is_seen_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    path = small_checkpoint(tmp_path / "a b/model.pt")
    monkeypatch.chdir(tmp_path)
    assert exported(path, "--output", "x.html") == 0
    assert entries(tmp_path / "x.html")[0]["name"] == "'a b/model.pt'"


def test_several_checkpoints_in_one_page(tmp_path):
    paths = [small_checkpoint(tmp_path / f"{name}.pt", name, conditional=True) for name in ("mnist", "fashion_mnist")]
    assert export.main(["--checkpoint", *map(str, paths), "--output", str(tmp_path / "x.html")]) == 0
    text = (tmp_path / "x.html").read_text()
    assert [entry["dataset"] for entry in entries(tmp_path / "x.html")] == ["mnist", "fashion_mnist"]
    assert 'id="weights-1"' in text and 'id="weights-2"' not in text


def test_a_page_of_48_channels_is_small(tmp_path):
    path = small_checkpoint(tmp_path / "model.pt", conditional=True, num_timesteps=1000, base_channels=48,
                            time_emb_dim=256, middle_depth=3)
    assert exported(path) == 0 and (tmp_path / "page.html").stat().st_size < 3_000_000
    assert exported(path, "--weights", "float32") == 0 and (tmp_path / "page.html").stat().st_size < 6_000_000


def test_half_precision_is_as_close_as_it_can_be():
    numbers = torch.tensor([0.1, 1e6, -1e6, 3e-8])
    assert torch.frombuffer(bytearray(page_of._bytes(numbers, torch.float16)), dtype=torch.float16).tolist() == [
        torch.tensor(0.1).half().item(), 65504, -65504, torch.tensor(3e-8).half().item()]


@pytest.mark.parametrize("flags, words", [
    (["--output", "x.pdf"], ["x.pdf", ".html"]), (["--weights", "int8"], ["int8"]),
    (["--output", "model.pt/x.html"], ["model.pt"])])
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
