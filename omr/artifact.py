"""Artifacts: immutable folders named by the digest of what made them.

    artifacts/KIND/KEY/                 finished: files and manifest.json; never written to again
    artifacts/KIND/.KEY.building/       in the making; nothing reads it, the next attempt starts by deleting it
    artifacts/KIND/.KEY.resume/         what a long make wants back after a kill (training state); gone on success
    artifacts/KIND/.KEY.lock            held while KEY is being made

A key is the sha256 of canonical JSON: the kind, the producer's REVISION, the recipe (type and every field that can
change the bytes) and the keys of the inputs. So a sweep that wants the same checkpoint four times builds it once, and a
number in a table leads back to the exact bytes. The folder is renamed into place with its manifest already inside:
whatever is visible under KIND/KEY is whole. A file that changed later (size or mtime, then digest) is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omr import __version__
from omr.errors import InputError, ResourceError
from omr.option import fields_of

MANIFEST = "manifest.json"
KEY_CHARS = 20
"""Hex digits of the sha256 kept as key: 80 bits."""


@dataclass(frozen=True)
class Artifact:
    """A finished artifact. `built` tells whether this call made it."""

    kind: str
    key: str
    path: Path
    manifest: dict[str, Any]
    built: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """Summary numbers that its maker returned."""
        return dict(self.manifest.get("metrics", {}))


def content(recipe: Any) -> dict[str, Any]:
    """An option's fields that can change the bytes it makes: all but those with `metadata={"content": False}`."""

    def keep(obj: Any) -> dict[str, Any]:
        data = fields_of(obj)
        for f in dataclasses.fields(obj):
            if not f.metadata.get("content", True):
                del data[f.name]
            elif dataclasses.is_dataclass(getattr(obj, f.name)):
                data[f.name] = keep(getattr(obj, f.name))
        return data

    cls = type(recipe)
    name = f"{cls.option_group}/{cls.option_name}" if hasattr(cls, "option_name") else cls.__name__
    return {"type": name, **keep(recipe)}


def key_of(kind: str, recipe: Mapping[str, Any], inputs: Mapping[str, str], revision: int = 1) -> str:
    """The content key; stable over Python versions and field order."""
    text = json.dumps(
        {"kind": kind, "revision": revision, "recipe": recipe, "inputs": inputs},
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_CHARS]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resume_folder(building: Path) -> Path:
    """Where the maker of `building` may keep what it wants back after a kill. Exists only if the maker makes it."""
    assert building.name.endswith(".building"), building
    return building.with_name(building.name.removesuffix(".building") + ".resume")


@dataclass
class Store:
    """The content-addressed store under `root`."""

    root: Path
    notice: Callable[[str], None] = field(default=lambda line: None)
    """Called with one line when something is reused, waited for or built."""

    def find(self, kind: str, key: str) -> Artifact | None:
        """The finished artifact, or None. Raises InputError when its files are not those that were built."""
        folder = self.root / kind / key
        if not (folder / MANIFEST).exists():
            return None
        manifest = _read_manifest(folder)
        _check_files(folder, manifest["files"])
        return Artifact(kind, key, folder, manifest)

    def get(
        self,
        kind: str,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, str],
        make: Callable[[Path], Mapping[str, float] | None],
        *,
        revision: int = 1,
    ) -> Artifact:
        """The artifact of this recipe and these inputs (name -> key), made by `make(folder)` if it is not there.

        `make` fills an empty folder and may return summary metrics. When it raises, nothing becomes visible.
        """
        key = key_of(kind, recipe, inputs, revision)
        if found := self.find(kind, key):
            self.notice(f"{kind} {key}: reused")
            return found
        (self.root / kind).mkdir(parents=True, exist_ok=True)
        with self._lock(kind, key):
            if found := self.find(kind, key):
                self.notice(f"{kind} {key}: reused, another run has just built it")
                return found
            self.notice(f"{kind} {key}: building")
            return self._build(kind, key, recipe, inputs, make, revision)

    def _build(
        self,
        kind: str,
        key: str,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, str],
        make: Callable[[Path], Mapping[str, float] | None],
        revision: int,
    ) -> Artifact:
        final, building = self.root / kind / key, self.root / kind / f".{key}.building"
        for leftover in (building, final):  # `final` without a manifest: not ours, not whole
            if leftover.exists():
                shutil.rmtree(leftover)
        building.mkdir()
        started = time.time()
        try:
            metrics = make(building) or {}
            manifest = {
                "kind": kind,
                "key": key,
                "revision": revision,
                "recipe": recipe,
                "inputs": dict(inputs),
                "metrics": dict(metrics),
                "files": _describe_files(building),
                "seconds": round(time.time() - started, 3),
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                "omr": __version__,
            }
            with (building / MANIFEST).open("w") as file:
                json.dump(manifest, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            os.rename(building, final)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ResourceError(f"no space left for {kind} in {self.root}; free some or set OMR_HOME") from None
            raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(resume_folder(building), ignore_errors=True)
        return Artifact(kind, key, final, manifest, built=True)

    @contextlib.contextmanager
    def _lock(self, kind: str, key: str) -> Iterator[None]:
        with (self.root / kind / f".{key}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.notice(f"{kind} {key}: another run is building it, waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def all(self) -> Iterator[Artifact]:
        """Every finished artifact, files unchecked. One whose manifest is damaged is left out, with a notice."""
        for path in sorted(self.root.glob(f"*/*/{MANIFEST}")):
            folder = path.parent
            if folder.name.startswith("."):
                continue
            try:
                yield Artifact(folder.parent.name, folder.name, folder, _read_manifest(folder))
            except InputError as error:
                self.notice(str(error))


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest, dict) or not {"files", "recipe", "created"} <= manifest.keys():
            raise ValueError("it is no manifest")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / MANIFEST} cannot be read ({error}); delete {folder} to rebuild it") from None
    return manifest


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = path.stat()
        files[str(path.relative_to(folder))] = {
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": file_sha256(path),
        }
    return files


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError for a file that is missing or not what the manifest says."""
    fix = f"delete {folder} to rebuild it"
    for name, known in files.items():
        path = folder / name
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise InputError(f"{path} is missing from a finished artifact; {fix}") from None
        if stat.st_size != known["bytes"]:
            raise InputError(f"{path} has {stat.st_size} bytes, was built with {known['bytes']}; {fix}")
        if stat.st_mtime_ns != known["mtime_ns"] and file_sha256(path) != known["sha256"]:
            raise InputError(f"{path} was changed after it was built; {fix}")
