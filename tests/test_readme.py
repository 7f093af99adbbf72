"""The README's commands are ones that the scripts take, and its code runs."""

import importlib
import re
import shlex

import pytest
from small import small_checkpoint

COMMAND = re.compile(r"(?:python|torchrun [^`\n]*?) (\w+)\.py([^`\n#]*)")


def commands(root):
    """(script, arguments) of every command in the README, in code blocks and in backticks."""
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda quoted: quoted[0].replace("\n", " "), (root / "README.md").read_text())
    found = COMMAND.findall(text)
    return sorted({(name, arguments.strip()) for name, arguments in found})


def pytest_generate_tests(metafunc):
    if "command" in metafunc.fixturenames:
        found = commands(metafunc.config.rootpath)
        metafunc.parametrize("command", found, ids=[f"{name} {arguments}"[:60] for name, arguments in found])


def test_every_command_of_the_readme_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/model_final.pt").touch()
    name, arguments = command
    given = arguments.replace("...", "outputs/model_final.pt").replace("NAME", "mnist")
    importlib.import_module(name).parse_args(shlex.split(given))


def test_the_readme_names_every_script(root):
    named = {name for name, _ in commands(root)}
    scripts = {path.stem for path in root.glob("*.py") if "\n@script\n" in path.read_text()}
    assert scripts == named


def test_the_code_of_the_readme_runs(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    small_checkpoint(tmp_path / "outputs/model_final.pt", num_timesteps=100, conditional=True)
    [code] = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["images"].shape == (16, 1, 28, 28) and names["images"].abs().max() <= 1


def test_a_command_that_there_is_not_would_be_found(tmp_path, monkeypatch):
    """The tests above can fail."""
    with pytest.raises(ValueError):
        test_every_command_of_the_readme_is_understood(("sample", "--chekpoint x"), tmp_path, monkeypatch)
