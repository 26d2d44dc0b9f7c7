"""The errors a user can meet, each with the exit code its command ends with."""

from collections.abc import Iterable


class Preempted(KeyboardInterrupt):
    """A signal asked this process to stop, and it did so with its work saved."""

    exit_code = 75


class UserError(ValueError):
    """What the user gave cannot work; the message names field, value, rule and remedy."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration file, an override or a command line cannot be used."""

    exit_code = 2


class DataError(UserError):
    """A data set is missing, empty, damaged beyond what is allowed, or has nothing to learn."""

    exit_code = 3


class ModelError(UserError):
    """A model folder or file is missing, unreadable, of an unsupported kind, or unsafe to read."""

    exit_code = 4


class MismatchError(ModelError):
    """Teacher and student cannot work together: tokenizer, vocabulary or shapes differ."""

    exit_code = 4


class FitError(UserError):
    """The run does not fit the device memory or the disk."""

    exit_code = 5


class DamagedError(UserError):
    """Files are not as they were written: a checkpoint, or all of a run."""

    exit_code = 6


class DivergedError(UserError):
    """Training produced non-finite numbers too many times in a row and gave up."""

    exit_code = 7


class LostProcessError(UserError):
    """Another process of the run has ended or cannot be heard any more."""

    exit_code = 8


class StorageError(UserError):
    """A file or folder cannot be written."""

    exit_code = 9


def combined(errors: Iterable[UserError]) -> UserError | None:
    """Several errors as one, of the class with the smallest exit code among them; None of none."""
    errors = list(errors)
    if not errors:
        return None
    first = min(errors, key=lambda error: error.exit_code)
    return type(first)("\n".join(str(error) for error in errors))


def check(errors: Iterable[UserError]) -> None:
    """Raises `combined` errors, if there are any."""
    error = combined(errors)
    if error is not None:
        raise error
