"""What a session may see of the file system: the interpreter, its packages, the C library, three devices. Nothing else.

Two forms of one list. With namespaces it becomes a new root: an empty tmpfs with those folders bound read-only at their
own paths (so that sys.path and loaded libraries stay valid), no /etc, /proc, /home. Without, the same list becomes
Landlock grants. Folders in `hidden` (the product's own package: its benchmark files hold answers) are covered by an
empty tmpfs, or left out of the grants.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator

from omr.sandbox import _landlock, _linux

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/random")
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/libexec", "/usr/share/zoneinfo", "/lib", "/lib64", "/lib32")
_PROGRAMS = ("/usr/bin", "/bin")
_STAGE = "/tmp"  # any folder that exists everywhere; covered in a mount namespace of our own only


class View:
    """Folders of the host that a session sees. `libraries` readable by all; `programs` by shell sessions only."""

    def __init__(self, interpreter: list[str], programs: list[str], hidden: list[str]) -> None:
        present = [path for path in (*_SYSTEM, *interpreter) if os.path.exists(path)]
        self.libraries = _outermost(present)
        self.programs = _outermost([path for path in (*_PROGRAMS, *programs) if os.path.exists(path)])
        visible = self.libraries + self.programs
        self.hidden = [path for path in hidden if os.path.isdir(path) and any(_within(path, v) for v in visible)]
        names = ("/sandbox" + "_" * n for n in itertools.count())
        self.scratch = next(name for name in names if not any(_within(path, name) for path in visible))
        """Where the scratch folder is mounted in the namespace tier: a name that no visible path needs."""

    def grants(self, kind: str, scratch: str, *, whole: bool) -> list[tuple[str, int]]:
        """Landlock grants of a session. `whole`: the calling process's root is this view and nothing else."""
        rights = _landlock.RUN if kind == "shell" else _landlock.READ
        if whole:
            device = _landlock.READ_FILE | _landlock.WRITE_FILE
            return [("/", rights), ("/dev", device), (scratch, _landlock.SCRATCH)]
        folders = self.libraries + (self.programs if kind == "shell" else [])
        paths = [path for folder in folders for path in self._around_hidden(folder)]
        devices = [(device, _landlock.READ_FILE | _landlock.WRITE_FILE) for device in DEVICES]
        return [(path, rights) for path in paths] + devices + [(scratch, _landlock.SCRATCH)]

    def _around_hidden(self, folder: str) -> Iterator[str]:
        if not any(_within(path, folder) for path in self.hidden):
            yield folder
        elif folder not in self.hidden:
            for name in sorted(os.listdir(folder)):
                yield from self._around_hidden(os.path.join(folder, name))

    def enter(self) -> None:
        """Make this view the root of the calling process's mount namespace, which must be its own."""
        _linux.mount("none", "/", None, _linux.MS_REC | _linux.MS_PRIVATE)
        _linux.mount("tmpfs", _STAGE, "tmpfs", _linux.MS_NOSUID | _linux.MS_NODEV, "mode=0755,size=1m")
        os.mkdir(f"{_STAGE}/host", 0o700)
        _linux.pivot_root(_STAGE, f"{_STAGE}/host")
        os.chdir("/")
        for path in self.libraries + self.programs:
            self._bind(path)
        for path in self.hidden:
            _linux.mount("tmpfs", path, "tmpfs", _linux.MS_RDONLY | _linux.MS_NOSUID | _linux.MS_NODEV, "size=4k")
        os.mkdir("/dev", 0o755)
        for device in DEVICES:
            os.close(os.open(device, os.O_CREAT | os.O_WRONLY, 0o666))
            _linux.mount(f"/host{device}", device, None, _linux.MS_BIND)
        os.mkdir(self.scratch, 0o755)
        _linux.detach("/host")
        os.rmdir("/host")
        _linux.set_mount_attributes("/")

    def _bind(self, path: str) -> None:
        source = f"/host{path}"
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        if os.path.islink(source):
            os.symlink(os.readlink(source), path)
        else:
            os.makedirs(path, 0o755, exist_ok=True)
            _linux.bind_read_only(source, path)


def remove_tree(folder: str, within_s: float = float("inf")) -> bool:
    """Remove what a session left, whatever its depth or permissions; False if time ran out first. The session is dead.

    Subfolders are first moved up to `folder`: no path grows long, and no recursion follows the depth.
    """
    deadline = time.monotonic() + within_s
    for count in itertools.count():
        try:
            entries = list(os.scandir(folder))
            if not entries:
                os.rmdir(folder)
                return True
        except OSError:
            return True
        for entry in entries:
            if time.monotonic() > deadline:
                return False
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    _empty_folder(entry.path, folder, str(count))
                else:
                    os.unlink(entry.path)
    raise AssertionError("count never ends")


def _empty_folder(path: str, above: str, prefix: str) -> None:
    """Remove `path`, its subfolders moved to `above` under new names."""
    os.chmod(path, 0o700)
    with os.scandir(path) as children:
        for number, child in enumerate(list(children)):
            if child.is_dir(follow_symlinks=False):
                os.rename(child.path, os.path.join(above, f"{prefix}-{number}-{child.inode()}"))
            else:
                os.unlink(child.path)
    os.rmdir(path)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _outermost(paths: list[str]) -> list[str]:
    """`paths` without duplicates and without those below another, shortest first."""
    kept: list[str] = []
    for path in sorted(set(paths), key=lambda p: (p.count("/"), p)):
        if not any(_within(path, other) for other in kept if not os.path.islink(other)):
            kept.append(path)
    return kept
