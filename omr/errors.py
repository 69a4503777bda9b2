"""Every error that omr raises on purpose, one tree.

    OmrError                      one line: what was wrong, the value, what to do
    |-- UserError                 exit code 2: the request cannot be carried out as written
    |   |-- ConfigError           unknown key, bad value, impossible combination
    |   |-- InputError            a file or folder given by the user is missing, truncated or tampered with
    |   `-- MissingBackend        an optional package or a device that the choice needs is not here
    `-- Failure                   exit code 1: it was a fair request and it went wrong
        |-- ChildError            a child process died or never became ready; carries its last log lines
        |-- RequestError          a server refused or failed a request; `status` is the HTTP status if there was one
        |   |-- ContextOverflow   prompt and max_tokens do not fit the model's context
        |   `-- StreamDropped     a stream broke off before its finish reason
        |-- ResourceError         no disk space, no memory, a port in use
        `-- TrainingError         the loss is not finite, the data ran out

Anything else that reaches `__main__` is a bug in omr and keeps its traceback in the run's log.
"""

from __future__ import annotations

import errno


class OmrError(Exception):
    """Base of all. `str(error)` is one line meant for the user."""

    exit_code = 1


class UserError(OmrError):
    exit_code = 2


class ConfigError(UserError):
    pass


class InputError(UserError):
    pass


class MissingBackend(UserError):
    """`package` is not installed; `fix` mends it, by default `pip install 'omr[extra]'`."""

    def __init__(self, package: str, *, extra: str | None = None, why: str = "", fix: str = "") -> None:
        fix = fix or (f"pip install 'omr[{extra}]'" if extra else f"install {package}")
        super().__init__(f"{package} is not available here{': ' + why if why else ''}. Fix: {fix}")
        self.package = package
        self.extra = extra
        self.why = why
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        return (_missing_backend, (self.package, self.extra, self.why, self.fix))


def _missing_backend(package: str, extra: str | None, why: str, fix: str) -> MissingBackend:
    return MissingBackend(package, extra=extra, why=why, fix=fix)


class Failure(OmrError):
    pass


class ChildError(Failure):
    """A child process failed. `log_tail` holds its last lines, already part of the message."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message if not log_tail else f"{message}\n{log_tail}")
        self.log_tail = log_tail


class RequestError(Failure):
    """One request went wrong; the server may be well. Callers count these instead of ending the run."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ContextOverflow(RequestError):
    pass


class StreamDropped(RequestError):
    pass


class ResourceError(Failure):
    pass


class TrainingError(Failure):
    pass


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or one that led to it, is a full disk. Libraries in other languages say it in words alone."""
    at: BaseException | None = error
    while at is not None:
        said = str(at)
        if getattr(at, "errno", None) == errno.ENOSPC or any(words in said for words in _FULL):
            return True
        at = at.__cause__ or at.__context__
    return False


_FULL = ("No space left on device", "database or disk is full", "PytorchStreamWriter failed writing")


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, no `except Exception` on the way may swallow it."""
