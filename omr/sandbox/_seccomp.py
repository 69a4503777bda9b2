"""The system-call filter: an allowlist in classic BPF, built here instruction by instruction.

What is not named is refused with EPERM, so code sees an ordinary PermissionError and lives on. Exceptions:
- another ABI's calls (32-bit `int 0x80`) kill the process: their numbers mean other calls;
- clone3 and calls newer than the table give ENOSYS, as on an older kernel: the C library then falls back to clone,
  whose flags a filter can read (clone3 hides them behind a pointer);
- calls with one harmless use are allowed for it alone: clone makes threads, kill reaches only the process itself,
  sendto has no address, socketpair is a unix stream (asyncio's self-pipe), ioctl asks about terminals.

Two kinds of session differ: `python` may not start processes; `shell` may fork and exec what the file system offers. It
may not map memory shared: such pages stay when no process has them mapped in, so that no count would find them.

Without a root of its own, a session may not change modes and times of files: Landlock does not cover those.

Refused on purpose although limits exist: locks on files (two sessions could talk through one on /dev/null; SQLite works
in memory only), memfd, SysV and POSIX shared memory (outside RLIMIT_AS), F_SETPIPE_SZ, sendmsg (descriptors in flight
escape RLIMIT_NOFILE), namespaces, mounts, ptrace, bpf, io_uring, userfaultfd, keyrings.
"""

from __future__ import annotations

import ctypes
import struct

from omr.sandbox import _syscalls
from omr.sandbox._linux import call

_ALLOWED = """
read write pread64 pwrite64 readv writev preadv pwritev open openat openat2 creat close close_range lseek stat fstat
lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd chdir
fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat truncate ftruncate
fallocate fadvise64 fsync fdatasync umask copy_file_range sendfile
getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
pipe pipe2 dup dup2 dup3 select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
epoll_pwait2 eventfd eventfd2 timerfd_create timerfd_settime timerfd_gettime recvfrom shutdown getsockopt getsockname
getpeername
mmap mprotect munmap mremap brk madvise msync
futex set_robust_list get_robust_list rseq membarrier set_tid_address arch_prctl
sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min getcpu
getpriority nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getitimer setitimer alarm pause
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall
getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid capget uname
sysinfo getrlimit setrlimit getrusage getrandom wait4 waitid exit exit_group
"""
_SHELL_ALLOWED = "fork vfork execve"
_OWN_SPACE_ALLOWED = "chmod fchmod fchmodat utime utimes futimesat utimensat"

_LOAD, _JEQ, _JGE, _JGT, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCH = 0, 4
_X32_BIT = 0x40000000
_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020000
_MAP_SHARED = 1  # and MAP_SHARED_VALIDATE, which has that bit too
_MODE_FILTER, _SPEC_ALLOW = 1, 4

_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
_FCNTLS = (0, 1, 2, 3, 4, 1030, 1032)  # dup, flags, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
_PRCTLS = (3, 15, 16, 21, 39, 0x53564D41)  # names, questions, and glibc naming its memory
_AF_UNIX, _SOCK_STREAM, _SOCK_FLAGS = 1, 1, 0o2004000

Instruction = tuple[int, int, int, int]
"""(code, jump if true, jump if false, operand)."""


def _low(argument: int) -> Instruction:
    return (_LOAD, 0, 0, 16 + 8 * argument)


def _high(argument: int) -> Instruction:
    return (_LOAD, 0, 0, 20 + 8 * argument)


_PASS: Instruction = (_RETURN, 0, 0, _ALLOW)
_REFUSE: Instruction = (_RETURN, 0, 0, _ERRNO | _EPERM)
_UNKNOWN: Instruction = (_RETURN, 0, 0, _ERRNO | _ENOSYS)


def _one_of(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow when the argument's low word is one of `values`. (The kernel reads these arguments as 32-bit.)"""
    body = [_low(argument)]
    for value in values:
        body += [(_JEQ, 0, 1, value), _PASS]
    return [*body, _REFUSE]


def _special(kind: str, own_pid: int | None, own_space: bool) -> dict[str, list[Instruction]]:
    """Calls whose arguments decide. Each body ends in a return."""
    clone: list[Instruction] = [_low(0), (_JSET, 0, 1, _CLONE_NAMESPACES), _REFUSE]
    if kind != "shell":
        clone += [(_JSET, 1, 0, _CLONE_THREAD), _REFUSE]
    clone.append(_PASS)
    rules = {
        "clone": clone,
        "clone3": [_UNKNOWN],
        "ioctl": _one_of(1, _IOCTLS),
        "fcntl": _one_of(1, _FCNTLS),
        "prctl": _one_of(0, _PRCTLS),
        "prlimit64": _one_of(0, (0,)),
        "sendto": [_low(4), (_JEQ, 1, 0, 0), _REFUSE, _high(4), (_JEQ, 1, 0, 0), _REFUSE, _PASS],
        "socketpair": [
            *(_low(0), (_JEQ, 1, 0, _AF_UNIX), _REFUSE),
            *(_low(1), (_JSET, 0, 1, 0xFFFFFFFF & ~(_SOCK_STREAM | _SOCK_FLAGS)), _REFUSE),
            *((_JSET, 1, 0, _SOCK_STREAM), _REFUSE, _PASS),
        ],
    }
    if own_pid is None:
        rules["kill"] = rules["tgkill"] = [_PASS]
    else:
        rules["kill"] = rules["tgkill"] = _one_of(0, (own_pid,))
    if kind == "shell":
        rules["mmap"] = [_low(3), (_JSET, 0, 1, _MAP_SHARED), _REFUSE, _PASS]
    if kind == "shell" and own_space:  # elsewhere the process group is what gets killed at the end
        rules["setsid"] = rules["setpgid"] = [_PASS]
    return rules


def program(kind: str, *, arch: str, own_pid: int | None, own_space: bool) -> list[Instruction]:
    """The filter for a session of `kind` (python, shell).

    `own_pid`: the only process that kill may name; None for any that the session can see. `own_space`: the session has
    its own processes and file system. Raises KeyError for an architecture without a table.
    """
    numbers = _syscalls.numbers(arch)
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_JEQ, 1, 0, _syscalls.AUDIT_ARCH[arch]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JGE, 0, 1, _X32_BIT),
        _REFUSE,
        (_JGT, 0, 1, _syscalls.HIGHEST_KNOWN),
        _UNKNOWN,
    ]
    special = {numbers[name]: body for name, body in _special(kind, own_pid, own_space).items() if name in numbers}
    names = _ALLOWED.split()
    if kind == "shell":
        names += _SHELL_ALLOWED.split()
    if own_space:
        names += _OWN_SPACE_ALLOWED.split()
    for first, last in _ranges(sorted({numbers[name] for name in names if name in numbers} - special.keys())):
        if first == last:
            code += [(_JEQ, 0, 1, first), _PASS]
        else:
            code += [(_JGE, 0, 2, first), (_JGT, 1, 0, last), _PASS]
    for number, body in special.items():
        code += [(_JEQ, 0, len(body), number), *body]
    return [*code, _REFUSE]


def _ranges(ordered: list[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, last)."""
    ranges: list[tuple[int, int]] = []
    for number in ordered:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def assemble(code: list[Instruction]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def install(filter_bytes: bytes) -> None:
    """Put this thread, for good, behind the filter. Set no_new_privileges before. Raises StepError."""
    text = ctypes.create_string_buffer(filter_bytes, len(filter_bytes))
    header = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(filter_bytes) // 8, ctypes.addressof(text)))
    call("seccomp", "seccomp", _MODE_FILTER, _SPEC_ALLOW, ctypes.addressof(header))
