"""The documents are true: commands parse, code runs, links and pictures are there, and so are all named files."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from documents import FILE, broken_links, commands, links, missing_files, parse
from PIL import Image
from small import small_checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from training.flags import make_parser
from utils import count_parameters

WITH_COMMANDS = ("README.md", "GUIDE.md", "guide/experiments.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")
WITH_LINKS = (*WITH_COMMANDS, "CHANGELOG.md", "benchmarks/RECORDS.md")


def pytest_generate_tests(metafunc):
    if "command" in metafunc.fixturenames:
        texts = [(metafunc.config.rootpath / name).read_text() for name in WITH_COMMANDS]
        found = sorted(set().union(*map(commands, texts)))
        metafunc.parametrize("command", found, ids=[f"{name} {arguments}"[:60] for name, arguments in found])


@pytest.fixture
def readme(root):
    return (root / "README.md").read_text()


def test_every_command_of_the_documents_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/model_final.pt").touch()
    for folder in ("PATH", "outputs/drawings", "outputs/many"):  # what the documents call a folder of pictures
        (tmp_path / folder).mkdir()
    parse(*command)


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_the_documents_have_commands(root, name):
    assert commands((root / name).read_text())


def test_the_readme_names_every_script(root, readme):
    scripts = {path.stem for path in root.glob("*.py") if "\n@script\n" in path.read_text()}
    assert scripts == {name for name, _ in commands(readme)}


def test_the_code_of_the_readme_runs(readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    small_checkpoint(tmp_path / "outputs/model_final.pt", num_timesteps=100, conditional=True)
    [code] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["images"].shape == (16, 1, 28, 28) and names["images"].abs().max() <= 1


@pytest.mark.parametrize("name", WITH_LINKS)
def test_links_and_pictures_resolve(root, name):
    assert broken_links(root, name) == []


def test_the_tree_of_the_readme_is_the_repository(root, readme):
    """Every file and folder that it names is there, and every Python file and package at the top stands in it."""
    [tree] = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    assert missing_files(root, tree) == []
    top = {path.name for path in root.glob("*.py")} | {f"{path.parent.name}/" for path in root.glob("*/__init__.py")}
    assert top - set(FILE.findall(tree)) == set()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_the_documents_name_exist(root, name):
    assert missing_files(root, (root / name).read_text()) == []


def test_contributing_names_tests_and_tables_that_there_are(root):
    text = (root / "CONTRIBUTING.md").read_text()
    folders = (".", "evaluation", "guide", "models", "runtime", "training", "tests", "tests/evaluation", "tests/models")
    source = "\n".join(path.read_text() for folder in folders for path in (root / folder).glob("*.py"))
    named = re.findall(r"`(test_\w+|[A-Z]{2,}(?:_[A-Z]+)*|[a-z]+(?:_[a-z]+)+)[`(]", text)
    named = [name for name in named if f"self.{name}" not in source]  # attributes of a network
    assert len(named) >= 10
    assert [name for name in named if not re.search(rf"^(def )?{name}\b", source, re.MULTILINE)] == []


def test_the_readme_is_short_and_begins_with_pictures(readme):
    lines = readme.splitlines()
    assert len(lines) <= 130
    assert links("\n".join(line for line in lines[:15] if "<img" in line or line.startswith("![")))


def test_pictures_are_small(root, readme):
    pictures = [Path(target) for target in links(readme) if target.endswith((".gif", ".png"))]
    assert {path.suffix for path in pictures} == {".gif", ".png"}
    for path in pictures:
        assert (root / path).stat().st_size < 1_000_000, path
        assert (Image.open(root / path).format or "").lower() == path.suffix[1:]
        assert (Image.open(root / path).n_frames > 1) == (path.suffix == ".gif")


def test_every_picture_of_docs_is_shown(root, readme):
    assert {f"docs/{path.name}" for path in (root / "docs").iterdir()} <= set(links(readme))


def test_wrong_documents_would_be_found(tmp_path):
    """The tests above can fail."""
    with pytest.raises(ValueError):
        parse("sample", "--chekpoint x")
    text = "# One\n[a](#one) [b](#two) [c](no.md) ![d](no.png) <img src=\"no.gif\"> `no.py` folder/ data/x.py"
    (tmp_path / "README.md").write_text(text)
    assert broken_links(tmp_path, "README.md") == ["#two", "no.md", "no.png", "no.gif"]
    assert set(missing_files(tmp_path, text)) == {"no.md", "no.png", "no.gif", "no.py", "folder/"}


def test_the_calculated_run_has_the_size_that_is_told(root):
    text = (root / "benchmarks/RESULTS.md").read_text()
    [flags] = [arguments for name, arguments in commands(text) if "--base_channels 176" in arguments]
    args = make_parser("").parse_args(shlex.split(flags))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = create_model(image_channels=3, num_classes=10, base_channels=args.base_channels, depth=args.depth,
                             channel_mults=args.channel_mults, patch_size=args.patch_size)
        model(torch.empty(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)).mean().backward()
    flop, images = counter.get_total_flops(), args.epochs * 45_000
    hours = images * flop / (0.4 * 989e12) / 3600
    assert f"{count_parameters(model):,} parameters" in text and f"takes {flop / 1e9:.0f} GFLOP" in text
    assert images // 10**6 == 200 and f"so {flop * images / 1e18:.0f} · 10^18" in text
    assert f"{hours / 8:.1f} hours on eight of them, or {hours:.0f} hours on one" in text.replace("\n", " ")
