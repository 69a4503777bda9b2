"""The few Linux calls that isolation needs, through ctypes: nothing to compile, nothing to install.

Every function is one step of building a cage and raises `StepError`, which carries the step's name and errno: "which
step did this kernel refuse" is what a user needs to know, and what `auto` reports. Numbers come from `_syscalls`, so
the C library's age does not matter. Imported by the zygote, which has an empty environment: standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import struct

from omr.sandbox import _syscalls

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

CAP_DAC_READ_SEARCH = 2

_FLAG_NAMES = {
    CLONE_NEWNS: "mount",
    CLONE_NEWCGROUP: "cgroup",
    CLONE_NEWUTS: "uts",
    CLONE_NEWIPC: "ipc",
    CLONE_NEWUSER: "user",
    CLONE_NEWPID: "pid",
    CLONE_NEWNET: "net",
}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_KEEPCAPS = 8
_PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 36, 47, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_LAST_CAPABILITY = 63

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_prctl = _libc.prctl  # looked up once: a session that does it copies pages


class StepError(OSError):
    """A step of building the cage failed: `step` says which, `errno` why."""

    def __init__(self, step: str, code: int) -> None:
        super().__init__(code, os.strerror(code))
        self.step = step

    def __str__(self) -> str:
        return f"{self.step}: {errno.errorcode.get(self.errno or 0, self.errno)} ({self.strerror})"


def call(step: str, name: str, *args: int | bytes | None) -> int:
    """One raw system call. Raises StepError(step)."""
    number = _NUMBERS.get(name)
    if number is None:
        raise StepError(step, errno.ENOSYS)
    converted = [ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_void_p(a) for a in args]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        raise StepError(step, ctypes.get_errno())
    return result


def supported() -> bool:
    """Whether this machine has a table of system-call numbers."""
    return bool(_NUMBERS)


def _numbers() -> dict[str, int]:
    with contextlib.suppress(KeyError):
        return _syscalls.numbers(_syscalls.machine())
    return {}


_NUMBERS = _numbers()


def unshare(flags: int) -> None:
    names = "+".join(name for flag, name in _FLAG_NAMES.items() if flags & flag)
    call(f"unshare({names} namespace)", "unshare", flags)


def setns(fd: int, flags: int) -> None:
    call(f"setns({'+'.join(name for flag, name in _FLAG_NAMES.items() if flags & flag)} namespace)", "setns", fd, flags)


def mount(source: str, target: str, fstype: str | None, flags: int, data: str = "") -> None:
    call(
        f"mount({fstype or 'bind'} on {target})",
        "mount",
        os.fsencode(source),
        os.fsencode(target),
        fstype.encode() if fstype else None,
        flags,
        data.encode() if data else None,
    )


def bind_read_only(source: str, target: str, *, device: bool = False) -> None:
    """Bind `source` on `target`, submounts included, read-only, without set-uid and (but for a device) device nodes."""
    mount(source, target, None, MS_BIND | MS_REC)
    attributes = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | (0 if device else _MOUNT_ATTR_NODEV)
    set_mount_attributes(target, attributes)


def set_mount_attributes(target: str, attributes: int = _MOUNT_ATTR_RDONLY) -> None:
    """Set attributes on a whole mount tree (Linux 5.12)."""
    attr = ctypes.create_string_buffer(struct.pack("=QQQQ", attributes, 0, 0, 0))
    flags, size = _AT_RECURSIVE, len(attr) - 1
    call(
        f"mount_setattr({target})",
        "mount_setattr",
        _AT_FDCWD,
        os.fsencode(target),
        flags,
        ctypes.addressof(attr),
        size,
    )


def pivot_root(new: str, old: str) -> None:
    call("pivot_root", "pivot_root", os.fsencode(new), os.fsencode(old))


def detach(target: str) -> None:
    call(f"umount({target})", "umount2", os.fsencode(target), MNT_DETACH)


def set_hostname(name: bytes) -> None:
    call("sethostname", "sethostname", name, len(name))


def die_with_parent(parent: int) -> None:
    """SIGKILL this process when its parent dies; at once if it already did. `parent` 0: it is in another pid space."""
    call("prctl(PDEATHSIG)", "prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def set_dumpable(on: bool) -> None:
    """Off: no core file, no ptrace, and /proc/self belongs to root."""
    call("prctl(DUMPABLE)", "prctl", _PR_SET_DUMPABLE, int(on), 0, 0, 0)


def adopt_orphans() -> None:
    """Descendants whose parent dies become children of this process."""
    call("prctl(CHILD_SUBREAPER)", "prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def no_new_privileges() -> None:
    call("prctl(NO_NEW_PRIVS)", "prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def keep_capabilities() -> None:
    """Let the permitted set survive the coming change of uid."""
    call("prctl(KEEPCAPS)", "prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)


def drop_capabilities(but: int | None = None) -> None:
    """Empty the bounding, ambient, inheritable, permitted and effective sets, all but capability `but`."""
    for capability in range(_LAST_CAPABILITY + 1):
        if _prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:  # past the kernel's last; or no right to drop
            break
    call("prctl(CAP_AMBIENT)", "prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    kept = 0 if but is None else 1 << but
    sets = ctypes.create_string_buffer(struct.pack("=6I", kept, kept, 0, 0, 0, 0))
    call("capset", "capset", ctypes.addressof(header), ctypes.addressof(sets))


def set_uid(uid: int) -> None:
    """Become `uid` in every sense, without groups. For root only."""
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise StepError(f"setresuid({uid})", error.errno or 0) from None


def close_from(first: int) -> None:
    """Close every descriptor from `first` on."""
    try:
        call("close_range", "close_range", first, 0xFFFFFFFF, 0)
    except StepError:
        os.closerange(first, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def limit(which: int, value: int) -> None:
    """Soft and hard limit at once, never above the hard limit in force."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))
