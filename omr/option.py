"""Options: the dataclasses that config groups choose between.

`@option("quant", "fp8")` registers a dataclass under (group, name). Nothing else registers anything: importing the
modules of an option package is what fills the registry, and `discover` does that for every module of a package whose
name does not start with an underscore. So a new option costs one module and one YAML.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

GROUPS = ("job", "quant", "drafter", "server", "sandbox")
"""Option groups: one dataclass per choice, in the package `omr.<group>`."""

T = TypeVar("T")
_registry: dict[tuple[str, str], type[Any]] = {}


def option(group: str, name: str) -> Callable[[type[T]], type[T]]:
    """Register a dataclass as the choice `name` of `group`. The class keeps both as `option_group`, `option_name`."""
    assert group in GROUPS, f"unknown option group {group!r}"

    def register(cls: type[T]) -> type[T]:
        assert dataclasses.is_dataclass(cls), f"{cls.__name__}: put @option above @dataclass"
        known = _registry.setdefault((group, name), cls)
        assert known.__qualname__ == cls.__qualname__, f"{group}/{name} is registered twice: {known}, {cls}"
        cls.option_group, cls.option_name = group, name  # type: ignore[attr-defined]
        return cls

    return register


def discover() -> dict[tuple[str, str], type[Any]]:
    """Import every option module and return the registry, (group, name) -> dataclass."""
    for group in GROUPS:
        package = importlib.import_module(f"omr.{group}")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"omr.{group}.{module.name}")
    return dict(_registry)


def fields_of(obj: Any) -> dict[str, Any]:
    """A dataclass instance as plain JSON data (Enums by name, nested dataclasses as dicts)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.name
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    result = plain(obj)
    assert isinstance(result, dict)
    return result


def from_fields(cls: type[T], data: dict[str, Any]) -> T:
    """The inverse of `fields_of`: a typed instance of `cls`, its `__post_init__` checks run."""
    from omegaconf import OmegaConf

    obj = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), data))
    assert isinstance(obj, cls)
    return obj
