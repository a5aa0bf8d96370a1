"""What a user can get wrong, each with its exit code. An error carries its whole message: what, where, what to do."""

from __future__ import annotations

OK = 0
CHECK_FAILED = 1  # a check failed: a target missed under --require-target, a run that died
USAGE = 2  # a recipe, an option or data that is not there
UNAVAILABLE = 3  # a device or a kernel that cannot run here
DIVERGED = 4  # the loss stopped being finite
INTERRUPTED = 130  # Ctrl-C; SIGTERM is 143, as shells count


class BncliError(Exception):
    """A mistake that a user can mend. The door prints its text without a traceback and leaves with `exit_code`."""

    exit_code = CHECK_FAILED


class UsageError(BncliError):
    """One or more mistakes in what was asked, all of those found in one pass.

    `field` is the argument that is wrong, and `value` what it was given; the command line shows the field as an option.
    """

    exit_code = USAGE

    def __init__(self, *mistakes: str, field: str | None = None, value: object = None) -> None:
        self.mistakes, self.field, self.value = mistakes, field, value
        place = "" if field is None else f"{field}: " if value is None else f"{field} {value}: "
        super().__init__("\n".join(place + mistake for mistake in mistakes))


class RecipeError(UsageError):
    """One or more mistakes in a recipe, all of those found in one pass."""


class DataError(BncliError):
    """Data that a recipe names and that is not there, or does not have the shape that the recipe says."""

    exit_code = USAGE


class FileError(BncliError):
    """A file that bncli cannot read back, or cannot write."""

    exit_code = USAGE


class RunFailed(BncliError):
    """A run that the user's own code ended."""


class Unavailable(BncliError):
    """A device or a kernel that cannot run on this machine. The message says why and what would make it run."""

    exit_code = UNAVAILABLE
