"""How a script ends: which exit status, and what stderr says."""

import errno
import sys

import pytest

from runtime.errors import RunFailed, UserError, checking_user_input
from runtime.parser import Parser
from runtime.script import script


@pytest.mark.parametrize("error, status", [
    (UserError("two\nlines"), 2), (RunFailed("no more"), 1), (MemoryError(), 1), (KeyboardInterrupt(), 130),
    (OSError(errno.ENOSPC, "No space left on device"), 1), (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1),
], ids=repr)
def test_errors_from_outside_become_an_exit_status_and_one_line(capsys, error, status):
    @script
    def main(argv=None):
        raise error
    assert main([]) == status
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "bug" not in err


@pytest.mark.parametrize("error", [
    ValueError("shape mismatch"), RuntimeError("size of tensor a"), KeyError("name"), ZeroDivisionError(),
    FileNotFoundError(errno.ENOENT, "No such file or directory"), OSError("no number")], ids=repr)
def test_a_bug_has_a_traceback_the_command_and_a_request_to_report_it(capsys, monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])

    @script
    def main(argv=None):
        raise error
    assert main(["--output_dir", "my folder"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and f"raise error\n{type(error).__name__}" in err
    request, command = err.splitlines()[-2:]
    assert "report" in request and command.strip() == "python train.py --output_dir 'my folder'"


def test_a_bug_inside_a_script_of_ours_is_not_taken_for_the_users_mistake(capsys, monkeypatch):
    import visualize_diffusion
    monkeypatch.setattr(visualize_diffusion, "draw_schedules", lambda args: [].index(1))
    assert visualize_diffusion.main(["--what", "schedules"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_script_that_ends_well_returns_0_and_help_too(capsys):
    assert script(lambda argv: None)([]) == 0
    assert script(lambda argv: Parser("What it does.").parse_args(argv))(["--help"]) == 0
    assert "What it does." in capsys.readouterr().out


def test_only_a_value_error_about_the_users_input_becomes_a_user_error():
    with pytest.raises(UserError, match="no such name") as caught, checking_user_input():
        raise ValueError("no such name")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(TypeError), checking_user_input():
        raise TypeError("a bug")
