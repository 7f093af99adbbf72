"""Files whole or not at all: a reader meets the whole new file or the old one, whatever happens."""

import json
import os
import stat
from pathlib import PurePosixPath, PureWindowsPath

import pytest

from runtime.errors import UserError
from runtime.files import atomic_write, check_output, check_writable, quoted, write_json, write_json_lines


def test_what_is_written_is_there_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with atomic_write(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["file"]


def test_a_reader_sees_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(str(path), "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error, existed):
    path = tmp_path / "file"
    if existed:
        path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half of the n")
        raise error
    assert os.listdir(tmp_path) == (["file"] if existed else [])
    assert not existed or path.read_bytes() == b"old"


def test_a_rename_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_file_has_the_permissions_of_an_ordinary_one(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "file") as file:
            file.write(b"")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_check_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not any((tmp_path / "a" / "b").iterdir())


def test_check_writable_names_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot write to") as caught:
            check_writable(folder)
        assert str(folder) in str(caught.value)


def test_an_output_that_is_an_input_is_refused_by_any_name(tmp_path):
    mine, link, folder = tmp_path / "mine.png", tmp_path / "link.png", tmp_path / "pictures"
    mine.write_text("mine")
    link.symlink_to(mine)
    folder.mkdir()
    for path, given in ((mine, mine), (tmp_path / "pictures/../mine.png", mine), (link, mine), (mine, link),
                        (folder / "new.png", folder)):
        with pytest.raises(UserError, match=r"would (overwrite|be written into)"):
            check_output(path, None, given)
    assert check_output(tmp_path / "other.png", mine, None, tmp_path / "missing.png", folder)
    assert mine.read_text() == "mine" and not any(folder.iterdir())


def test_json_is_read_back_whole_or_line_by_line(tmp_path):
    records = [dict(step=1, loss=0.5, val_loss=None), dict(step=2, loss=0.25, val_loss=0.1)]
    write_json(dict(records=records), tmp_path / "new" / "m.json")
    assert json.loads((tmp_path / "new" / "m.json").read_text()) == dict(records=records)
    assert (tmp_path / "new" / "m.json").read_text().startswith('{\n  "records": [\n    {\n      "step": 1,')
    write_json_lines(records, tmp_path / "m.jsonl")
    assert [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()] == records


@pytest.mark.parametrize("system, path, word", [
    ("linux", PurePosixPath("outputs/a.pt"), "outputs/a.pt"), ("linux", PurePosixPath("a b/c.pt"), "'a b/c.pt'"),
    ("win32", PureWindowsPath("outputs\\a.pt"), "outputs/a.pt"), ("win32", PureWindowsPath("C:\\a b"), '"C:/a b"')])
def test_a_path_is_a_word_of_a_command(monkeypatch, system, path, word):
    """cmd.exe does not know single quotes, and a backslash alone would need some elsewhere."""
    monkeypatch.setattr("sys.platform", system)
    assert quoted(path) == word


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Else a power cut could leave the new name with nothing behind it."""
    told, fsync, replace = [], os.fsync, os.replace

    def sync(descriptor):
        status = os.fstat(descriptor)
        told.append(status.st_size if stat.S_ISREG(status.st_mode) else "folder")
        return fsync(descriptor)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *names: told.append("rename") or replace(*names))
    with atomic_write(tmp_path / "x") as file:
        file.write(b"whole")
    assert told[:2] == [5, "rename"] and told[2:] in ([], ["folder"])
