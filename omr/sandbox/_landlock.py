"""Landlock: a process gives up every file, TCP and signalling right that it does not list, for good (Linux 5.13).

Needs no privilege. Rights are added with the kernel's ABI: 1 files, 2 moving between folders, 3 truncation, 4 TCP,
5 device ioctls, 6 abstract sockets and signals to the outside. What a kernel does not know is left to seccomp, which
refuses sockets and foreign signals whatever the ABI.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from omr.sandbox._linux import StepError, call

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | 1 << 15  # the rights that mean something for a single file
_MAKE_CHAR, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 10, 1 << 11
_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP_BIND_CONNECT = 3
_SCOPE_ABSTRACT_SOCKET_SIGNAL = 3
_VERSION, _PATH_BENEATH = 1, 1

READ = READ_FILE | READ_DIR
RUN = READ | EXECUTE
SCRATCH = 0xFFFF & ~(EXECUTE | _MAKE_CHAR | _MAKE_SOCK | _MAKE_FIFO | _MAKE_BLOCK)
"""Everything one may do with ordinary files and folders, but run them."""


def abi() -> int:
    """The kernel's Landlock version; 0 where it is missing or switched off."""
    try:
        return call("landlock_create_ruleset", "landlock_create_ruleset", None, 0, _VERSION)
    except StepError:
        return 0


def restrict(grants: Iterable[tuple[str, int]]) -> None:
    """Confine this process, for good, to `grants`: (path, rights) pairs. Set no_new_privileges before.

    A path that does not exist is no grant. Raises StepError.
    """
    version = abi()
    handled = _RIGHTS_BY_ABI[min(version, 5)] if version else 0
    network = _TCP_BIND_CONNECT if version >= 4 else 0
    scoped = _SCOPE_ABSTRACT_SOCKET_SIGNAL if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attr = ctypes.create_string_buffer(struct.pack("=QQQ", handled, network, scoped))
    ruleset = call("landlock_create_ruleset", "landlock_create_ruleset", ctypes.addressof(attr), size, 0)
    try:
        for path, rights in grants:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                allowed = rights & handled
                if not os.path.isdir(path):
                    allowed &= _FILE_RIGHTS
                rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, fd))
                call(
                    f"landlock_add_rule({path})",
                    "landlock_add_rule",
                    ruleset,
                    _PATH_BENEATH,
                    ctypes.addressof(rule),
                    0,
                )
            finally:
                os.close(fd)
        call("landlock_restrict_self", "landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
