"""Errors whose cause lies outside this program. Any other exception is a bug of ours and gets a traceback.

    UserError    what the user asked for cannot be done     one line on stderr, exit status 2
    RunFailed    the machine or the numbers stop a run      one line on stderr, exit status 1
"""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """The user asked for something that cannot be done; the message says what is wrong and what to type instead."""


class RunFailed(Exception):
    """The run cannot go on, although the user asked for something possible; the message says what to do."""


@contextlib.contextmanager
def checking_user_input() -> Iterator[None]:
    """Turn a ValueError raised in the block into a UserError.

    For calls into diffusion.py, samplers.py and models/ with values that the user typed: these modules know nothing
    of scripts and raise ValueError. Keep the block as small as the call.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
