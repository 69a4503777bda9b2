"""Tiers of isolation: what the zygote does once, and what every session does to itself before it runs a line.

- `Namespaces`: own user, mount, pid, net, ipc and uts namespaces around zygote and session, a read-only root, a tmpfs
  scratch folder; and everything of the next tier within.
- `Landlocked`: file rights by Landlock, system calls by seccomp, resource limits, no capabilities. Shares the machine's
  process table (which it cannot read or signal) and has no quota on the scratch folder.
- `Bare`: limits, an empty environment and a scratch folder. Keeps accidents in, not intent.

Order matters and is the order below: mounts before the user namespace (so that the session's own capabilities say
nothing about its mounts), the uid before limits (root escapes RLIMIT_NPROC), Landlock and seccomp last.

Not protected against, in any tier: bugs in the kernel; a session lying about its own results; reading the list of
installed packages; using its fair share of the CPU for as long as its limits allow.
"""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import dataclass
from typing import ClassVar

from omr.sandbox import _landlock, _linux, _seccomp, _syscalls
from omr.sandbox._linux import StepError
from omr.sandbox._root import View

_SESSION_UIDS = range(0x6F6D0000, 0x6F6D1000)
"""Uids for sessions of a root owner, one each; beyond what accounts use."""
_NOBODY = 65534
_NICENESS = 5
MIB = 1 << 20


@dataclass(kw_only=True)
class Limits:
    """Resources of one session."""

    memory_bytes: int
    """What it may allocate, on top of what the preloaded interpreter maps."""
    scratch_bytes: int
    cpu_s: int
    """CPU time over its life; the wall-clock limit per block is kept by the owner."""
    threads: int = 32
    files: int = 128
    inodes: int = 2048


class Bare:
    """Limits only."""

    tier: ClassVar[str] = "process"
    own_space: ClassVar[bool] = False

    def __init__(self, view: View, scratch_root: str) -> None:
        self.view = view
        self.scratch_root = scratch_root
        self.uids = _session_uids() if os.geteuid() == 0 else range(0)
        self.root = bool(self.uids)
        """Whether sessions can have uids of their own. Root of a container that maps no other uid is like any user."""
        self.landlock_abi = 0

    def enter_zygote(self) -> None:
        """Everything that is done once. Raises StepError."""
        self._proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def settle(self, limits: Limits) -> None:
        """In the zygote, once the imports are done: what they map is not the sessions' memory. Prepares what all
        sessions share, so that none has to."""
        self.limits = limits
        self.zygote_pid = 0 if self.own_space else os.getpid()
        with os.fdopen(os.open("self/statm", os.O_RDONLY, dir_fd=self._proc)) as statm:
            pages = [int(field) for field in statm.read().split()]
        self.mapped_bytes, self.data_bytes = (pages[0] * resource.getpagesize(), pages[5] * resource.getpagesize())

    def fork_session(self) -> int:
        """os.fork, into the session's process space."""
        return os.fork()

    def scratch_of(self, index: int) -> str:
        """Path, on the host, of a session's scratch folder; empty if it vanishes with the session."""
        return os.path.join(self.scratch_root, str(index))

    def enter_session(self, kind: str, index: int) -> str:
        """Confine this process for good; returns its scratch folder. Raises StepError."""
        scratch = self._own_scratch(index)
        self._prefer_for_oom()
        if self.root:
            self._drop_root(index)
        else:
            _linux.drop_capabilities()
        self._limit()
        self._forsake(kind, scratch)
        return scratch

    def _own_scratch(self, index: int) -> str:
        path = self.scratch_of(index)
        os.mkdir(path, 0o700)
        if self.root:
            os.chown(path, self._uid(index), self._uid(index))
        os.chdir(path)
        return path

    def _uid(self, index: int) -> int:
        return self.uids[index % len(self.uids)]

    def _drop_root(self, index: int) -> None:
        """Another uid than root. Where the interpreter lives in a folder closed to others (a root-only home), the right
        to read past permission bits is kept: Landlock still confines it to the listed folders."""
        if all(_open_to_all(path) for path in self.view.libraries):
            _linux.set_uid(self._uid(index))
            _linux.drop_capabilities()
        else:
            _linux.keep_capabilities()
            _linux.set_uid(self._uid(index))
            _linux.drop_capabilities(but=_linux.CAP_DAC_READ_SEARCH)

    def _prefer_for_oom(self) -> None:
        """When the machine runs out of memory, a session goes first, not its owner."""
        fd = os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=self._proc)
        os.write(fd, b"1000")
        os.close(fd)

    def _limit(self) -> None:
        limits = self.limits
        for which, value in (
            (resource.RLIMIT_AS, self.mapped_bytes + limits.memory_bytes),
            (resource.RLIMIT_DATA, self.data_bytes + limits.memory_bytes),
            (resource.RLIMIT_CPU, limits.cpu_s),
            (resource.RLIMIT_FSIZE, limits.scratch_bytes),
            (resource.RLIMIT_NOFILE, limits.files),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
            (resource.RLIMIT_SIGPENDING, 64),
            (resource.RLIMIT_STACK, 8 * MIB),
            (resource.RLIMIT_NPROC, self._processes()),
        ):
            _linux.limit(which, value)
        os.nice(_NICENESS)

    def _processes(self) -> int:
        """RLIMIT_NPROC counts all processes of a uid: without an own one, leave room for the owner's others."""
        if len(self.uids) > 1:
            return self.limits.threads
        return self.limits.threads + sum(1 for name in os.listdir(self._proc) if name.isdigit()) * 4

    def _forsake(self, kind: str, scratch: str) -> None:
        """The last steps, in the session's final uid."""
        _linux.set_dumpable(False)
        _linux.die_with_parent(self.zygote_pid)


class Landlocked(Bare):
    """Limits, Landlock, seccomp."""

    tier = "landlock"

    def enter_zygote(self) -> None:
        super().enter_zygote()
        self.landlock_abi = _landlock.abi()
        if not self.landlock_abi and not self.own_space:
            raise StepError("landlock_create_ruleset", errno.ENOSYS)

    def settle(self, limits: Limits) -> None:
        super().settle(limits)
        self._filters = {kind: self._filter(kind) for kind in ("python", "shell")} if self._any_pid() else {}

    def _any_pid(self) -> bool:
        """Whether kill may name any process: the session's own process space, or Landlock, keeps it from others."""
        return self.own_space or self.landlock_abi >= 6

    def _filter(self, kind: str) -> bytes:
        own_pid = None if self._any_pid() else os.getpid()
        code = _seccomp.program(kind, arch=_syscalls.machine(), own_pid=own_pid, own_space=self.own_space)
        return _seccomp.assemble(code)

    def _forsake(self, kind: str, scratch: str) -> None:
        super()._forsake(kind, scratch)
        _linux.no_new_privileges()
        if self.landlock_abi:
            _landlock.restrict(self.view.grants(kind, scratch, whole=self.own_space))
        _seccomp.install(self._filters.get(kind) or self._filter(kind))


class Namespaces(Landlocked):
    """Everything."""

    tier = "namespace"
    own_space = True
    _AROUND = (
        _linux.CLONE_NEWUSER
        | _linux.CLONE_NEWNS
        | _linux.CLONE_NEWPID
        | _linux.CLONE_NEWNET
        | _linux.CLONE_NEWIPC
        | _linux.CLONE_NEWUTS
        | _linux.CLONE_NEWCGROUP
    )
    _PER_SESSION = _linux.CLONE_NEWNS | _linux.CLONE_NEWNET | _linux.CLONE_NEWIPC | _linux.CLONE_NEWUTS

    def enter_zygote(self) -> None:
        super().enter_zygote()
        if self.root:  # the folders may be root's alone: bind them while root
            _linux.unshare(_linux.CLONE_NEWNS)
            self.view.enter()
            _linux.set_uid(self._uid(0))
            _linux.set_dumpable(True)  # or /proc/self/uid_map belongs to root
        uid, gid = os.geteuid(), os.getegid()
        _linux.unshare(self._AROUND)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            self._write_own(name, text)
        if not self.root:
            self.view.enter()
        _linux.set_hostname(b"sandbox")

    def _write_own(self, name: str, text: str) -> None:
        try:
            fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=self._proc)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise StepError(f"write /proc/self/{name}", error.errno or 0) from None

    def fork_session(self) -> int:
        own = os.pidfd_open(os.getpid())
        try:
            _linux.unshare(_linux.CLONE_NEWPID)
            try:
                pid = os.fork()
            except OSError:
                _linux.setns(own, _linux.CLONE_NEWPID)
                raise
            if pid:  # or a second unshare is refused
                _linux.setns(own, _linux.CLONE_NEWPID)
            return pid
        finally:
            os.close(own)

    def scratch_of(self, index: int) -> str:
        return ""

    def enter_session(self, kind: str, index: int) -> str:
        self._prefer_for_oom()
        _linux.unshare(self._PER_SESSION)
        options = f"size={self.limits.scratch_bytes},nr_inodes={self.limits.inodes},mode=0700"
        _linux.mount(
            "tmpfs", self.view.scratch, "tmpfs", _linux.MS_NOSUID | _linux.MS_NODEV | _linux.MS_NOEXEC, options
        )
        os.chdir(self.view.scratch)
        _linux.unshare(_linux.CLONE_NEWUSER)
        _linux.drop_capabilities()
        self._limit()
        self._forsake(kind, self.view.scratch)
        return self.view.scratch

    def _processes(self) -> int:
        return self.limits.threads  # counted within the session's own user namespace


TIERS = (Namespaces, Landlocked, Bare)


def _session_uids() -> range:
    """Uids that root may turn sessions into: in a container, those that its user namespace maps."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        mapped = [(int(first), int(first) + int(count)) for first, _, count in map(str.split, file)]
    for uids in (_SESSION_UIDS, range(_NOBODY, _NOBODY + 1)):
        if any(first <= uids.start and uids.stop <= end for first, end in mapped):
            return uids
    return range(0)


def _open_to_all(path: str) -> bool:
    """Whether any user can reach and read `path`, by the permission bits on the way."""
    while path != "/":
        if os.stat(path).st_mode & 0o005 != 0o005:
            return False
        path = os.path.dirname(path)
    return True
