"""Verbs: `omr VERB ...`. One module per verb; its first docstring line is the help, its `main(argv)` the work."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import omr.job
from omr.errors import ConfigError


def jobs() -> list[str]:
    """`omr build X` means `python -m omr job=build X`."""
    return sorted(m.name for m in pkgutil.iter_modules(omr.job.__path__) if not m.name.startswith("_"))


def verbs() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def verb(name: str) -> Callable[[list[str]], int]:
    """The `main` of a verb. Raises ConfigError with the nearest verb for an unknown one."""
    if name not in verbs():
        from omr.config import nearest

        raise ConfigError(f"unknown verb {name!r}{nearest(name, [*verbs(), *jobs()])}")
    main: Callable[[list[str]], int] = importlib.import_module(f"omr.cli.{name}").main
    return main
