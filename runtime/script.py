"""How a script ends: exit status, one line for errors from outside, a traceback for a bug."""

import atexit
import contextlib
import errno
import functools
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from runtime import distributed, progress
from runtime.errors import RunFailed, UserError
from runtime.files import one_line
from runtime.memory import keep_one_heap, out_of_memory, trim_heap

# Errors of the system that no flag and no line of this program causes: full or failing disks, closed pipes, limits.
SYSTEM_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EPIPE, errno.ENOMEM,
                 errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET}
# Errors of the system about a path that the user has named.
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
# Errors of writing to a pipe that nobody reads, or to a terminal that is closed. Windows has EINVAL for the first.
NO_READER = {errno.EPIPE, errno.EIO, *([errno.EINVAL] if sys.platform == "win32" else [])}


def script(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Make `main(argv)` the entry point of a script: main(argv=None) -> exit status.

    0 done; 1 the run failed, or a bug; 2 the user asked for something impossible; 130 Ctrl-C. A failure is one line on
    stderr, a bug a traceback with the command and a request to report it. A closed pipe or terminal ends nothing, nor
    does Ctrl-C while Python exits.
    """
    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        if argv is None:
            silence_libraries()
        keep_one_heap()
        with lasting_streams():
            return carry_out(argv)

    def carry_out(argv: Sequence[str] | None) -> int:
        try:
            return main(argv) or 0
        except SystemExit as stop:  # --help
            return stop.code or 0
        except KeyboardInterrupt:
            return _print_error("stopped by Ctrl-C", 130)
        except UserError as error:
            return _print_error(error, 2)
        except RunFailed as error:
            return _print_error(error, 1)
        except Exception as error:
            if message := no_access(error) or distributed.shared_gpu(error):
                return _print_error(message, 2)
            return _print_error(message, 1) if (message := outside_cause(error)) else _report_bug(argv)
        finally:
            if argv is None:  # a second Ctrl-C would only make torch's way out print a traceback
                atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
            trim_heap()  # torch needs some more memory while it exits
    return run


def silence_libraries() -> None:
    """Hide the warnings of libraries, which a user can do nothing about, unless python -W or PYTHONWARNINGS asks."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its font cache


class LastingStream:
    """A text stream that outlives its reader: what is written to a closed pipe or terminal is dropped.

    What its encoding has not got, as a part of a path that is not UTF-8, is written as an escape sequence.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with self._dropping():
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self.stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in NO_READER:
                raise
            with contextlib.suppress(OSError, ValueError):  # what is still in the buffer goes to the null device
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Let sys.stdout and sys.stderr outlive their readers within the block."""
    before = sys.stdout, sys.stderr
    lasting = sys.stdout, sys.stderr = [stream and LastingStream(stream) for stream in before]
    try:
        yield
    finally:
        for stream in filter(None, lasting):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = (old if now is new else now for old, new, now in zip(
            before, lasting, (sys.stdout, sys.stderr), strict=True))  # main may have put others in their place


def no_access(error: Exception) -> str | None:
    """A message for a path that the user may not use, or that is too long; None for other errors."""
    if isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename is not None:
        return f"cannot use {one_line(error.filename)} ({error.strerror}): give another path"
    return None


def outside_cause(error: Exception) -> str | None:
    """A message for an exception that the machine caused; None for a bug."""
    if out_of_memory(error):
        return (f"out of memory ({one_line(error, 100)}): try a smaller --batch_size or, where there is none, fewer "
                f"images")
    if distributed.process_lost(error):
        return f"another process of this run has ended ({one_line(error, 100)})"
    if message := distributed.nccl_failure(error):
        return message
    return str(error) if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS else None


def _print_error(message, status: int) -> int:
    progress.close_all()
    if status == 2 and distributed.local_rank():
        return status  # all processes of a machine find the same mistake: the first of them reports it
    with contextlib.suppress(OSError):
        print(f"{Path(sys.argv[0]).name}: {one_line(message, None)}", file=sys.stderr, flush=True)
    return status


def called_as() -> str:
    """What stands behind `python` in the command that was called: "train.py", or "-m guide.measure" for a module."""
    name, spec = Path(sys.argv[0]).name, getattr(sys.modules["__main__"], "__spec__", None)
    return f"-m {spec.name}" if spec and f"{spec.name.rpartition('.')[2]}.py" == name != "__main__.py" else name


def _report_bug(argv: Sequence[str] | None) -> int:
    """Print the traceback of the exception that is being handled, the command, and a request."""
    command = shlex.join(["python", *called_as().split(), *(sys.argv[1:] if argv is None else argv)])
    progress.close_all()
    with contextlib.suppress(OSError):
        traceback.print_exc()
        print(f"This is a bug in Tiny Diffusion. Please report it with the lines above and this command:\n  {command}",
              file=sys.stderr, flush=True)
    return 1
