"""Attacks on the sandbox, as data: twelve categories. Each prints BREACHED once it got what it came for.

Names in capitals (CANARY, FOLDER, OWNER, SECRET, PORT, ...) are targets on the host, defined before the code runs;
SYS holds system-call numbers. The same text runs in a bare subprocess first, where it must succeed: an attack that
cannot is no test. Bombs are bounded, so that the bare run does no harm: they pass when they got more than a session's
limit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attack:
    category: int
    name: str
    code: str
    proof: str = "output"
    """How a breach shows: `output`: BREACHED is printed; `hang`: the code never ends; `death`: the process dies."""
    timeout_s: float = 3.0
    root_only: bool = False
    """Needs root to succeed in the bare run."""
    arch: str = ""
    """The only architecture that it is written for."""


CATEGORIES = {
    1: "reading host files",
    2: "the owner's environment and secrets",
    3: "other processes",
    4: "writing outside the scratch folder",
    5: "network",
    6: "processes and threads",
    7: "memory",
    8: "disk, inodes, descriptors",
    9: "endless work",
    10: "output",
    11: "privilege",
    12: "crash and exit",
}

_SYSCALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*args):
    result = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""

ATTACKS = [
    # 1 ---------------------------------------------------------------------------------------- reading host files
    Attack(1, "absolute", "if 'canary' in open(CANARY).read(): print('BREACHED')"),
    Attack(1, "passwd", "if 'root' in open('/etc/passwd').read(): print('BREACHED')"),
    Attack(
        1,
        "symlink",
        "import os\nos.path.lexists('l') and os.unlink('l')\nos.symlink(CANARY, 'l')\n"
        "if 'canary' in open('l').read(): print('BREACHED')\n",
    ),
    Attack(1, "dotdot", "if 'canary' in open('../' * 40 + CANARY[1:]).read(): print('BREACHED')"),
    Attack(
        1,
        "folder_descriptor",
        "import os\nroot = os.open('/', os.O_PATH)\nfd = os.open(CANARY[1:], os.O_RDONLY, dir_fd=root)\n"
        "if b'canary' in os.read(fd, 100): print('BREACHED')\n",
    ),
    Attack(1, "proc_root", "if 'canary' in open('/proc/self/root' + CANARY).read(): print('BREACHED')"),
    Attack(
        1,
        "hard_link",
        "import os\nos.path.lexists('h') and os.unlink('h')\nos.link(CANARY, 'h')\n"
        "if 'canary' in open('h').read(): print('BREACHED')\n",
    ),
    Attack(1, "home", "import os\nif os.listdir(os.path.dirname(CANARY)): print('BREACHED')"),
    Attack(1, "root_of_another", "if 'canary' in open(f'/proc/{OWNER}/root{CANARY}').read(): print('BREACHED')"),
    Attack(
        1,
        "file_handle",
        _SYSCALL + "handle = ctypes.create_string_buffer(b'\\x80\\0\\0\\0' + bytes(132))\n"
        "syscall(SYS['name_to_handle_at'], -100, b'/usr', handle, ctypes.create_string_buffer(4), 0)\n"
        "print('BREACHED')\n",
    ),
    # 2 ------------------------------------------------------------------------ the owner's environment and secrets
    Attack(2, "environ", "import os\nif SECRET in str(dict(os.environ)): print('BREACHED')"),
    Attack(2, "own_environ_file", "if SECRET in open('/proc/self/environ').read(): print('BREACHED')"),
    Attack(
        2,
        "owner_environ_file",
        "import os\nfor pid in (OWNER, os.getpid(), os.getppid(), 1):\n"
        "    try:\n        if SECRET in open(f'/proc/{pid}/environ').read(): print('BREACHED')\n"
        "    except OSError: pass\n",
    ),
    Attack(2, "command_lines", "if b'python' in open(f'/proc/{OWNER}/cmdline', 'rb').read(): print('BREACHED')"),
    Attack(
        2,
        "own_memory",
        "import ctypes\nlibc = ctypes.CDLL(None)\nenviron = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')\n"
        "i = 0\nwhile environ[i]:\n    if SECRET.encode() in environ[i]: print('BREACHED')\n    i += 1\n",
    ),
    # 3 ----------------------------------------------------------------------------------------- other processes
    Attack(3, "list", "import os\nif str(OWNER) in os.listdir('/proc'): print('BREACHED')"),
    Attack(3, "signal_owner", "import os\nos.kill(OWNER, 0)\nprint('BREACHED')"),
    Attack(3, "parent", "import os\nif os.getppid() > 1: os.kill(os.getppid(), 0); print('BREACHED')"),
    Attack(
        3,
        "pidfd_owner",
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(OWNER), 0)\nprint('BREACHED')",
    ),
    Attack(
        3,
        "trace_parent",
        _SYSCALL + "syscall(SYS['ptrace'], 0x4206, os.getppid(), 0, 0)\nprint('BREACHED')",
        root_only=True,
    ),
    Attack(
        3, "priority", "import os\nos.setpriority(os.PRIO_PROCESS, OWNER, os.getpriority(0, OWNER))\nprint('BREACHED')"
    ),
    # 4 ------------------------------------------------------------------------- writing outside the scratch folder
    Attack(4, "overwrite", "open(CANARY, 'w').write('gone')\nprint('BREACHED')"),
    Attack(4, "new_file", "open(FOLDER + '/new', 'w').write('x')\nprint('BREACHED')"),
    Attack(4, "truncate", "import os\nos.truncate(CANARY, 0)\nprint('BREACHED')"),
    Attack(4, "remove", "import os\nos.rename(CANARY, CANARY + '.moved')\nprint('BREACHED')"),
    Attack(
        4, "tmp", "import os\nopen(f'/tmp/omr-{OWNER}', 'w').close()\nos.unlink(f'/tmp/omr-{OWNER}')\nprint('BREACHED')"
    ),
    Attack(4, "mode", "import os\nos.chmod(CANARY, 0o600)\nos.chmod(CANARY, 0o666)\nprint('BREACHED')"),
    Attack(
        4,
        "installed_package",
        "import sympy, os\npath = os.path.join(os.path.dirname(sympy.__file__), 'omr-was-here')\n"
        "open(path, 'w').close()\nos.unlink(path)\nprint('BREACHED')\n",
    ),
    # 5 ------------------------------------------------------------------------------------------------- network
    Attack(5, "loopback", "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\nprint('BREACHED')"),
    Attack(5, "udp", "import socket\nsocket.socket(2, 2).sendto(b'x', ('127.0.0.1', UDP_PORT))\nprint('BREACHED')"),
    Attack(5, "unix", "import socket\nsocket.socket(1, 1).connect(UNIX)\nprint('BREACHED')"),
    Attack(5, "abstract", "import socket\nsocket.socket(1, 1).connect('\\0' + ABSTRACT)\nprint('BREACHED')"),
    Attack(5, "lookup", "import socket\nif socket.getaddrinfo('localhost', 80): print('BREACHED')"),
    Attack(5, "raw", "import socket\nsocket.socket(2, 3, 1)\nprint('BREACHED')", root_only=True),
    Attack(5, "netlink", "import socket\nsocket.socket(16, 3, 0).bind((0, 0))\nprint('BREACHED')"),
    Attack(5, "packet", "import socket\nsocket.socket(17, 3, 0)\nprint('BREACHED')", root_only=True),
    Attack(
        5,
        "abstract_listener",
        "import os, socket\nsocket.socket(1, 1).bind(f'\\0omr-{os.getpid()}')\nprint('BREACHED')",
    ),
    Attack(
        5,
        "datagram_pair",
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\nprint('BREACHED')",
    ),
    Attack(
        5,
        "descriptors_in_flight",
        "import array, socket\na, b = socket.socketpair()\n"
        "a.sendmsg([b'x'], [(1, 1, array.array('i', [0]))])\nprint('BREACHED')\n",
    ),
    # 6 ------------------------------------------------------------------------------------ processes and threads
    Attack(6, "fork", "import os\npid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)\nprint('BREACHED')"),
    Attack(6, "exec", "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)\nprint('BREACHED')"),
    Attack(6, "exec_self", "import os, sys\nos.execv('/bin/echo', ['echo', 'BREACHED'])", timeout_s=5),
    Attack(6, "spawn", "import os\nos.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)\nprint('BREACHED')"),
    Attack(
        6,
        "exec_of_memory",
        "import os\nfd = os.memfd_create('x')\nos.write(fd, open('/bin/echo', 'rb').read())\n"
        "os.execve(fd, ['echo', 'BREACHED'], {})\n",
        timeout_s=5,
    ),
    Attack(
        6,
        "exec_of_scratch",
        "import os\nopen('x.sh', 'w').write('#!/bin/sh\\necho BREACHED\\n')\nos.chmod('x.sh', 0o755)\n"
        "os.execv('./x.sh', ['x'])\n",
        timeout_s=5,
    ),
    Attack(
        6,
        "raw_clone",
        _SYSCALL + "pid = syscall(SYS['clone'], 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)\n"
        "print('BREACHED')\n",
    ),
    Attack(
        6,
        "threads",
        "import threading\nstop = threading.Event()\nthreading.stack_size(65536)\n"
        "try:\n    for count in range(200):\n        threading.Thread(target=stop.wait, daemon=True).start()\n"
        "    print('BREACHED')\nfinally:\n    stop.set()\n",
    ),
    Attack(
        6,
        "multiprocessing",
        "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print)\np.start()\np.join()\n"
        "if p.exitcode == 0: print('BREACHED')\n",
    ),
    # 7 -------------------------------------------------------------------------------------------------- memory
    Attack(7, "anonymous_map", "import mmap\nx = [mmap.mmap(-1, 100 << 20) for _ in range(7)]\nprint('BREACHED')"),
    Attack(7, "bytes", "x = bytearray(700 << 20)\nprint('BREACHED')"),
    Attack(7, "numpy", "import numpy\nx = numpy.ones(700 << 17)\nprint('BREACHED')", timeout_s=8),
    Attack(7, "private_map", "import mmap\nx = mmap.mmap(-1, 700 << 20, mmap.MAP_PRIVATE)\nprint('BREACHED')"),
    Attack(7, "memfd", "import os\nos.truncate(os.memfd_create('x'), 700 << 20)\nprint('BREACHED')"),
    Attack(
        7,
        "shm",
        "import os\nfd = os.open('/dev/shm/omr-test', os.O_CREAT | os.O_RDWR, 0o600)\nos.unlink('/dev/shm/omr-test')\n"
        "os.truncate(fd, 1 << 20)\nprint('BREACHED')\n",
    ),
    Attack(7, "sysv", _SYSCALL + "syscall(SYS['shmget'], 0, 1 << 20, 0o1600)\nprint('BREACHED')"),
    Attack(7, "sysv_queue", _SYSCALL + "syscall(SYS['msgget'], 0, 0o1600)\nprint('BREACHED')"),
    Attack(7, "sysv_semaphores", _SYSCALL + "syscall(SYS['semget'], 0, 1, 0o1600)\nprint('BREACHED')"),
    Attack(
        7,
        "posix_queue",
        _SYSCALL
        + "name = f'omr-{os.getpid()}'.encode()\nsyscall(SYS['mq_open'], name, 0o102, 0o600, 0)\nprint('BREACHED')",
    ),
    Attack(
        7,
        "zeroes_shared",
        "import mmap, os\nfd = os.open('/dev/zero', os.O_RDWR)\nx = [mmap.mmap(fd, 100 << 20) for _ in range(7)]\n"
        "print('BREACHED')\n",
    ),
    Attack(7, "pipes", "import fcntl, os\nfcntl.fcntl(os.pipe()[1], 1031, 1 << 20)\nprint('BREACHED')"),
    Attack(7, "list", "x = []\nfor _ in range(70):\n    x.append(bytes(10 << 20))\nprint('BREACHED')", timeout_s=8),
    # 8 ------------------------------------------------------------------------------- disk, inodes, descriptors
    Attack(
        8,
        "disk",
        "import os\nwith open('big', 'wb') as f:\n    for _ in range(64):\n        f.write(bytes(1 << 20))\n"
        "    f.flush()\nos.unlink('big')\nprint('BREACHED')\n",
    ),
    Attack(
        8, "sparse", "import os\nopen('s', 'wb').close()\nos.truncate('s', 64 << 20)\nos.unlink('s')\nprint('BREACHED')"
    ),
    Attack(
        8,
        "inodes",
        "import os, shutil\nos.makedirs('many', exist_ok=True)\ntry:\n    for i in range(3000):\n"
        "        open(f'many/{i}', 'w').close()\n    print('BREACHED')\nfinally:\n    shutil.rmtree('many')\n",
    ),
    Attack(8, "descriptors", "import os\nx = [os.open('/dev/null', 0) for _ in range(300)]\nprint('BREACHED')"),
    Attack(
        8,
        "hard_links",
        "import os, shutil\nos.makedirs('links', exist_ok=True)\ntry:\n    open('links/0', 'w').close()\n"
        "    for i in range(1, 3000): os.link('links/0', f'links/{i}')\n    print('BREACHED')\n"
        "finally:\n    shutil.rmtree('links')\n",
    ),
    Attack(
        8,
        "symbolic_links",
        "import os, shutil\nos.makedirs('links', exist_ok=True)\ntry:\n    for i in range(3000):\n"
        "        os.symlink('x' * 4000, f'links/{i}')\n    print('BREACHED')\nfinally:\n    shutil.rmtree('links')\n",
    ),
    Attack(8, "pipes", "import os\nx = [os.pipe() for _ in range(200)]\nprint('BREACHED')"),
    # 9 --------------------------------------------------------------------------------------------- endless work
    Attack(9, "loop", "while True: pass", proof="hang", timeout_s=0.3),
    Attack(9, "sleep", "import time\ntime.sleep(1000)", proof="hang", timeout_s=0.3),
    Attack(9, "big_integer", "x = 3 ** (7 ** 9)", proof="hang", timeout_s=0.3),
    Attack(9, "regex", "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')", proof="hang", timeout_s=0.3),
    Attack(
        9, "swallow", "while True:\n    try:\n        while True: pass\n    except BaseException: pass", "hang", 0.3
    ),
    Attack(
        9,
        "ignore_signals",
        "import contextlib, signal\nfor s in range(1, 65):\n    with contextlib.suppress(OSError, ValueError):\n"
        "        signal.signal(s, signal.SIG_IGN)\nwhile True: pass\n",
        proof="hang",
        timeout_s=0.3,
    ),
    Attack(
        9,
        "block_signals",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        proof="hang",
        timeout_s=0.3,
    ),
    Attack(
        9, "deadlock", "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()", proof="hang", timeout_s=0.3
    ),
    Attack(9, "stdin", "import os\nr, w = os.pipe()\nos.read(r, 1)", proof="hang", timeout_s=0.3),
    Attack(
        9,
        "slow_repr",
        "class X:\n    def __repr__(self):\n        while True: pass\n    __str__ = __repr__\nprint(X())\nX()",
        proof="hang",
        timeout_s=0.3,
    ),
    # 10 -------------------------------------------------------------------------------------------------- output
    Attack(10, "endless_print", "while True: print('x' * 1000)", proof="hang", timeout_s=0.3),
    Attack(10, "endless_raw", "import os\nwhile True: os.write(1, b'x' * 65536)", proof="hang", timeout_s=0.3),
    # 11 ----------------------------------------------------------------------------------------------- privilege
    Attack(11, "user_namespace", _SYSCALL + "syscall(SYS['unshare'], 0x10000000)\nprint('BREACHED')"),
    Attack(11, "mount_namespace", _SYSCALL + "syscall(SYS['unshare'], 0x00020000)\nprint('BREACHED')", root_only=True),
    Attack(
        11,
        "mount",
        _SYSCALL + "syscall(SYS['unshare'], 0x10020000)\nsyscall(SYS['mount'], b'none', b'/tmp', b'tmpfs', 0, 0)\n"
        "print('BREACHED')\n",
    ),
    Attack(
        11,
        "remount",
        _SYSCALL + "syscall(SYS['unshare'], 0x10020000)\nsyscall(SYS['mount'], 0, b'/', 0, 1 << 18 | 16384, 0)\n"
        "print('BREACHED')\n",
    ),
    Attack(11, "set_uid", "import os\nos.setuid(0)\nif os.getuid() == 0: print('BREACHED')", root_only=True),
    Attack(11, "set_groups", "import os\nos.setgroups([0])\nprint('BREACHED')", root_only=True),
    Attack(
        11,
        "device_node",
        "import os, stat\nos.path.lexists('d') and os.unlink('d')\n"
        "os.mknod('d', 0o600 | stat.S_IFCHR, os.makedev(1, 1))\n"
        "os.unlink('d')\nprint('BREACHED')\n",
        root_only=True,
    ),
    Attack(11, "chroot", "import os\nos.chroot('.')\nprint('BREACHED')", root_only=True),
    Attack(11, "personality", _SYSCALL + "syscall(SYS['personality'], 0x0040000)\nprint('BREACHED')"),
    Attack(11, "keyring", _SYSCALL + "syscall(SYS['keyctl'], 0, -4, 1)\nprint('BREACHED')"),
    Attack(11, "add_key", _SYSCALL + "syscall(SYS['add_key'], b'user', b'omr', b'x', 1, -2)\nprint('BREACHED')"),
    Attack(11, "trace_me", _SYSCALL + "syscall(SYS['ptrace'], 0, 0, 0, 0)\nprint('BREACHED')"),
    Attack(11, "page_faults", _SYSCALL + "syscall(SYS['userfaultfd'], 1)\nprint('BREACHED')"),
    Attack(11, "aio", _SYSCALL + "syscall(SYS['io_setup'], 8, ctypes.byref(ctypes.c_long(0)))\nprint('BREACHED')"),
    Attack(
        11,
        "bpf_map",
        _SYSCALL + "import struct\nattr = ctypes.create_string_buffer(struct.pack('=4I', 2, 4, 4, 1) + bytes(56))\n"
        "syscall(SYS['bpf'], 0, attr, 72)\nprint('BREACHED')\n",
        root_only=True,
    ),
    Attack(11, "watch_files", _SYSCALL + "syscall(SYS['inotify_init1'], 0)\nprint('BREACHED')"),
    Attack(
        11,
        "posix_timer",
        _SYSCALL + "syscall(SYS['timer_create'], 1, 0, ctypes.create_string_buffer(8))\nprint('BREACHED')",
    ),
    Attack(
        11,
        "splice",
        _SYSCALL
        + "r, w = os.pipe()\nos.write(w, b'x')\nsyscall(SYS['splice'], r, 0, os.pipe()[1], 0, 1, 0)\nprint('BREACHED')",
    ),
    Attack(
        11, "signals_of_descriptor", "import fcntl, os\nfcntl.fcntl(os.pipe()[0], 8, os.getpid())\nprint('BREACHED')"
    ),
    Attack(11, "affinity", "import os\nos.sched_setaffinity(0, os.sched_getaffinity(0))\nprint('BREACHED')"),
    Attack(
        11,
        "core_file",
        "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (1, 1))\nprint('BREACHED')",
        root_only=True,
    ),
    Attack(
        11,
        "host_name",
        _SYSCALL
        + "syscall(SYS['sethostname'], os.uname().nodename.encode(), len(os.uname().nodename))\nprint('BREACHED')",
        root_only=True,
    ),
    Attack(
        11,
        "kernel_log",
        _SYSCALL + "syscall(SYS['syslog'], 3, ctypes.create_string_buffer(9), 8)\nprint('BREACHED')",
        root_only=True,
    ),
    Attack(
        11,
        "io_uring",
        _SYSCALL + "syscall(SYS['io_uring_setup'], 8, ctypes.create_string_buffer(120))\nprint('BREACHED')",
    ),
    Attack(11, "dumpable", _SYSCALL + "syscall(SYS['prctl'], 4, 1, 0, 0, 0)\nprint('BREACHED')"),
    Attack(11, "parent_death", _SYSCALL + "syscall(SYS['prctl'], 1, 0, 0, 0, 0)\nprint('BREACHED')"),
    Attack(11, "raise_limits", "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint('BREACHED')"),
    Attack(11, "nice", "import os\nos.setpriority(os.PRIO_PROCESS, 0, -5)\nprint('BREACHED')", root_only=True),
    Attack(
        11,
        "namespace_by_clone3",
        _SYSCALL
        + "import struct\na = ctypes.create_string_buffer(struct.pack('=8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0))\n"
        "pid = syscall(SYS['clone3'], a, 64)\nif pid == 0: os._exit(0)\nprint('BREACHED')\n",
    ),
    Attack(
        11,
        "compat_call",
        "import ctypes, mmap\ncode = bytes.fromhex('b814000000cd80c3')  # mov eax, 20 (i386 getpid); int 0x80; ret\n"
        "m = mmap.mmap(-1, 4096, prot=7)\nm.write(code)\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "if f() > 0: print('BREACHED')\n",
        arch="x86_64",
    ),
    # 12 ------------------------------------------------------------------------------------------ crash and exit
    Attack(12, "segfault", "import ctypes\nctypes.string_at(0)", proof="death"),
    Attack(12, "abort", "import os\nos.abort()", proof="death"),
    Attack(12, "exit", "import os\nos._exit(7)", proof="death"),
    Attack(12, "kill_self", "import os\nos.kill(os.getpid(), 9)\nos._exit(9)", proof="death"),
]
