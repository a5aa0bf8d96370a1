"""User-facing errors with exit codes and whole messages (what, where, what to do); text made safe to be shown."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator

OK = 0
CHECK_FAILED = 1  # a check failed: a missed target that was required, a run that died
USAGE = 2  # a recipe, an option or data that is not there
UNAVAILABLE = 3  # a device or a kernel that cannot run here
DIVERGED = 4  # the loss stopped being finite
INTERRUPTED = 130  # Ctrl-C; 143 by SIGTERM and 129 by SIGHUP, as shells count


# Visible characters for those that act on a terminal or turn a line's direction: C0 but tab and newline, DEL, C1, ...
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if code not in b"\t\n"} | {0x7F: "\u2421"}
VISIBLE |= dict.fromkeys((*range(0x80, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


def printable(text: str) -> str:
    """The text with a visible character in the place of every control character; all that is shown passes here."""
    return text if text.isprintable() else text.translate(VISIBLE)


CODE_OF_YOURS = "your own code, which would be executed; allow it"  # with allow_code, the permission of that error


class BncliError(Exception):
    """Base class of user-facing errors. The CLI prints the message without a traceback and exits with `exit_code`.

    Args:
        mistakes: what is wrong, what was expected and what to do, a sentence each.
        field: the argument's name in Python, where one is at fault; the command line shows its option instead.
        value: the argument's value, where the message needs it.
        permission: the argument that would allow it, with which every mistake's sentence ends.

    `str(error)` is "shapes tiny: expected one of ..." or "kernel mine:norm: ...; allow it with allow_code=True".
    """

    exit_code = CHECK_FAILED

    def __init__(
        self, *mistakes: str, field: str | None = None, value: object = None, permission: str | None = None
    ) -> None:
        self._sentences, self.field, self.value, self.permission = mistakes, field, value, permission
        given = permission and f"{permission}=True"
        self.mistakes = tuple(self.lines(None, given))
        super().__init__("\n".join(self.lines(field, given)))

    def lines(self, field: str | None, permission: str | None = None) -> list[str]:
        """The mistakes, each between the argument with its value and the permission, named as the reader knows them."""
        where = "" if field is None else f"{field}: " if self.value is None else f"{field} {self.value}: "
        allowed = f" with {permission}" if permission else ""
        return [f"{where}{sentence}{allowed}" for sentence in self._sentences]

    @property
    def errors(self) -> tuple[BncliError, ...]:
        """This error, or those that it is made of."""
        return (self,)


class UsageError(BncliError):
    """An argument that cannot be obeyed."""

    exit_code = USAGE


class UsageErrors(UsageError):
    """Mistakes in several arguments, all of those found in one pass."""

    def __init__(self, errors: Iterable[UsageError]) -> None:
        self._errors = tuple(errors)
        super().__init__(*(str(error) for error in self._errors))

    @property
    def errors(self) -> tuple[BncliError, ...]:
        return self._errors


class RecipeError(UsageError):
    """One or more mistakes in a recipe, all of those found in one pass."""


class DataError(BncliError):
    """Data that a recipe names and that is not there, or does not have the shape that the recipe says."""

    exit_code = USAGE


def by_arm(mistakes: Iterable[tuple[str, str]]) -> list[str]:
    """Sentences about arms, each once with the names of all arms that it is about."""
    arms: dict[str, list[str]] = {}
    for arm, sentence in mistakes:
        arms.setdefault(sentence, []).append(arm)
    return [f"arm{'s' * (len(names) > 1)} {', '.join(names)}: {sentence}" for sentence, names in arms.items()]


class FileError(BncliError):
    """A file that bncli cannot read back, or cannot write."""

    exit_code = USAGE


class Refused(BncliError):
    """What a worker process said when no run at all can succeed, with the exit code of the error behind it."""

    def __init__(
        self, *mistakes: str, exit_code: int = CHECK_FAILED, field: str | None = None, value: object = None
    ) -> None:
        super().__init__(*mistakes, field=field, value=value)
        self.exit_code = exit_code


class RunFailed(BncliError):
    """A run that the user's own code ended."""


# Of torch's allocator on a CPU, of NumPy's sizes, and of the dynamic linker, which have no class of their own for it.
NO_MEMORY = ("DefaultCPUAllocator: ", "out of memory", "Storage size calculation overflowed", "failed to map")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be allocated, on any device."""
    words = isinstance(error, RuntimeError | ImportError) and any(each in str(error) for each in NO_MEMORY)
    return words or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


@contextlib.contextmanager
def out_of_memory_is(explained: BncliError) -> Iterator[None]:
    """A context in which an error that says that memory was short becomes that one."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise explained from error


class Unavailable(BncliError):
    """A device or a kernel that cannot run on this machine. The message says why and what would make it run."""

    exit_code = UNAVAILABLE
