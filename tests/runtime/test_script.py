"""How a script ends: which exit status, and what stderr says."""

import errno
import importlib
import io
import os
import subprocess
import sys

import pytest

from runtime.errors import RunFailed, UserError, checking_user_input
from runtime.parser import Parser
from runtime.script import script


@pytest.mark.parametrize("error, status", [
    (UserError("two\nlines"), 2), (RunFailed("no more"), 1), (MemoryError(), 1), (KeyboardInterrupt(), 130),
    (OSError(errno.ENOSPC, "No space left on device"), 1), (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1),
    (PermissionError(errno.EACCES, "Permission denied", "/root/secret.png"), 2),
    (OSError(errno.ENAMETOOLONG, "File name too long", 300 * "a"), 2),
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
    FileNotFoundError(errno.ENOENT, "No such file or directory"), OSError("no number"),
    PermissionError(errno.EACCES, "of no path")], ids=repr)
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
    monkeypatch.setitem(visualize_diffusion.DRAWN_FROM_FLAGS, "schedules", lambda args: [].index(1))
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


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_pipe_ends_nothing(monkeypatch, name):
    reader, writer = os.pipe()
    reached = []
    with open(writer, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, name, pipe)

        @script
        def main(argv=None):
            print("one", file=getattr(sys, name))
            os.close(reader)
            for i in range(3):
                print("two", file=getattr(sys, name), flush=True)
                reached.append(i)
        assert main([]) == 0 and reached == [0, 1, 2] and getattr(sys, name) is pipe


@pytest.mark.parametrize("encoding, written", [("utf-8", "é→\\udcff"), ("latin-1", "é\\u2192\\udcff"),
                                               ("ascii", "\\xe9\\u2192\\udcff")])
def test_what_the_terminal_cannot_show_is_escaped(monkeypatch, encoding, written):
    """A path of bytes that are not UTF-8 reaches Python so; other terminals lack arrows."""
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding, write_through=True))
    assert script(lambda argv: print("é→\udcff", end=""))([]) == 0 and file.getvalue().decode(encoding) == written


def test_a_full_disk_below_the_output_is_told(monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(sys, "stdout", Full())
    assert script(lambda argv: print("text"))([]) == 1 and "No space left" in capsys.readouterr().err


PIPED = """
import logging, sys, warnings
from runtime.script import script
@script
def main(argv=None):
    warnings.warn("of a library", UserWarning)
    logging.getLogger("matplotlib.font_manager").warning("of matplotlib")
    print("first", flush=True)
    for i in range(10_000): print(i)
    open(sys.argv[1], "w").write("done")
sys.exit(main())
"""


@pytest.mark.parametrize("lines", [1, 0])
def test_a_script_whose_reader_leaves_ends_with_0_and_in_silence(root, tmp_path, lines):
    """The second case: all lines are still in the buffer when the reader is gone."""
    code = PIPED if lines else PIPED.replace('print("first", flush=True)', "sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "x"], cwd=root, stdout=subprocess.PIPE,
                               stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if lines:
        assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 0 and process.stderr.read() == "" and (tmp_path / "x").read_text() == "done"


INTERRUPTED = """
import atexit, signal, sys
from runtime.script import script
@script
def main(argv=None):
    atexit.register(print, "left")
    atexit.register(signal.raise_signal, signal.SIGINT)  # runs before the other one
    if len(sys.argv) > 1: raise KeyboardInterrupt
sys.exit(main())
"""


@pytest.mark.parametrize("argv, status", [([], 0), (["stopped"], 130)])
def test_ctrl_c_while_python_exits_changes_nothing(root, argv, status):
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, *argv], cwd=root, capture_output=True, text=True)
    assert ended.returncode == status and ended.stdout == "left\n" and "KeyboardInterrupt" not in ended.stderr


def test_warnings_are_shown_to_those_who_ask(root, tmp_path):
    for flags, shown in (([], False), (["-W", "default"], True)):
        ended = subprocess.run([sys.executable, *flags, "-c", PIPED, tmp_path / "x"], cwd=root, capture_output=True,
                               text=True)
        for words in ("of a library", "of matplotlib"):
            assert ended.returncode == 0 and (words in ended.stderr) == shown, ended.stderr


@pytest.mark.parametrize("name", ["train", "sample", "visualize_diffusion", "evaluate", "edit", "distill", "doctor",
                                  "export", "benchmark"])
def test_all_scripts_begin_in_this_way(name):
    main = importlib.import_module(name).main
    assert main.__wrapped__ and main.__code__ is script(lambda argv: None).__code__


@pytest.mark.parametrize("called", ["-m data_sources.drawings", "sample.py"])
def test_the_help_that_is_named_is_that_of_the_command(root, called):
    done = subprocess.run([sys.executable, *called.split(), "--nonsense"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and f"python {called} --help" in done.stderr and done.stderr.count("\n") == 1
