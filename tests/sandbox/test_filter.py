"""The system-call tables against the kernel's own lists, and the filter against an interpreter of its language."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omr.sandbox import _seccomp, _syscalls

LISTS = Path(__file__).parents[1] / "data" / "sandbox"
ARCHITECTURES = ("x86_64", "aarch64")
ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050001, 0x00050026
THREAD_FLAGS = 0x3D0F00  # what pthread_create passes to clone
FORK_FLAGS = 0x01200011


def kernel_list(arch: str) -> dict[str, int]:
    lines = (LISTS / f"{arch}.txt").read_text().splitlines()
    return {name: int(number) for name, number in (line.split() for line in lines if not line.startswith("#"))}


def judge(code: list[_seccomp.Instruction], nr: int, args: tuple[int, ...] = (), arch: int = 0) -> int:
    """What the kernel would return for one call: classic BPF over struct seccomp_data, by the book."""
    args = (*args, *[0] * (6 - len(args)))
    data = struct.pack("=IIQ6Q", nr & 0xFFFFFFFF, arch, 0, *(a & (1 << 64) - 1 for a in args))
    accumulator, pc = 0, 0
    for _ in range(len(code)):
        op, jt, jf, k = code[pc]
        pc += 1
        if op == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif op == 0x06:
            return k
        else:
            taken = {0x15: accumulator == k, 0x35: accumulator >= k, 0x25: accumulator > k, 0x45: bool(accumulator & k)}
            pc += jt if taken[op] else jf
    raise AssertionError("the program does not end in a return")


class Filter:
    def __init__(self, arch: str, kind: str = "python", own_pid: int | None = None, own_space: bool = True) -> None:
        self.numbers = kernel_list(arch)
        self.arch = _syscalls.AUDIT_ARCH[arch]
        self.code = _seccomp.program(kind, arch=arch, own_pid=own_pid, own_space=own_space)

    def __call__(self, name: str, *args: int) -> int:
        return judge(self.code, self.numbers[name], args, self.arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_is_the_kernels(arch: str) -> None:
    kernel, ours = kernel_list(arch), _syscalls.numbers(arch)
    assert ours == {name: kernel[name] for name in ours}
    assert len(set(ours.values())) == len(ours)
    assert max(ours.values()) <= _syscalls.HIGHEST_KNOWN
    absent = {entry.split(":")[0] for entry in _syscalls._TABLE.split()} - ours.keys()
    assert not absent & kernel.keys()


def test_anchors_of_aarch64() -> None:
    numbers = _syscalls.numbers("aarch64")
    anchors = {"read": 63, "openat": 56, "clone": 220, "execve": 221, "mmap": 222, "unshare": 97, "seccomp": 277}
    assert {name: numbers[name] for name in anchors} == anchors
    assert "open" not in numbers and "fork" not in numbers


REFUSED = (
    "socket connect bind sendmsg recvmsg ptrace process_vm_readv bpf keyctl add_key userfaultfd perf_event_open "
    "io_uring_setup memfd_create memfd_secret shmget msgget semget mq_open unshare setns mount umount2 pivot_root "
    "chroot mknodat setuid setresuid setgroups capset personality init_module kexec_load open_by_handle_at pidfd_open "
    "pidfd_getfd pidfd_send_signal setpriority sched_setaffinity seccomp open_tree move_mount fsopen syslog reboot "
    "execveat vmsplice sync tkill rt_sigqueueinfo process_madvise sethostname mlock quotactl setsockopt flock"
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["python", "shell"])
def test_what_is_refused_whatever_the_arguments(arch: str, kind: str) -> None:
    call = Filter(arch, kind)
    for name in REFUSED.split():
        assert call(name) == EPERM, name
        assert call(name, 1, 1, 1, 1, 1, 1) == EPERM, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_allowed_names_exist_and_pass(arch: str) -> None:
    call = Filter(arch)
    for name in (_seccomp._ALLOWED + _seccomp._OWN_SPACE_ALLOWED).split():
        assert name in kernel_list("x86_64"), name
        if name in call.numbers:
            assert call(name) == ALLOW, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_processes_and_threads(arch: str) -> None:
    python, shell = Filter(arch), Filter(arch, "shell")
    assert (python("clone", THREAD_FLAGS), python("clone", FORK_FLAGS)) == (ALLOW, EPERM)
    assert (shell("clone", THREAD_FLAGS), shell("clone", FORK_FLAGS)) == (ALLOW, ALLOW)
    assert (python("execve"), shell("execve")) == (EPERM, ALLOW)
    assert python("clone3") == shell("clone3") == ENOSYS
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert python("clone", THREAD_FLAGS | flag) == shell("clone", FORK_FLAGS | flag) == EPERM
    if arch == "x86_64":
        assert (python("fork"), python("vfork"), shell("vfork")) == (EPERM, EPERM, ALLOW)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_signals(arch: str) -> None:
    anyone, itself = Filter(arch), Filter(arch, own_pid=77)
    assert anyone("kill", 5, 9) == anyone("tgkill", 5, 5, 9) == ALLOW
    assert (itself("kill", 77, 9), itself("tgkill", 77, 78, 9)) == (ALLOW, ALLOW)
    for pid in (1, 76, 78, 0, 0xFFFFFFFF, (1 << 32) - 77):
        assert itself("kill", pid, 9) == itself("tgkill", pid, pid, 9) == EPERM
    leaves = [Filter(arch, "shell", own_space=own)("setsid") for own in (True, False)]
    assert leaves == [ALLOW, EPERM]
    assert Filter(arch)("setsid") == EPERM


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_arguments_decide(arch: str) -> None:
    call = Filter(arch)
    assert [call("ioctl", 1, request) for request in (0x5401, 0x5412, 0x541B)] == [ALLOW, EPERM, ALLOW]
    assert [call("fcntl", 1, command) for command in (3, 8, 1024, 1030, 1031)] == [ALLOW, EPERM, EPERM, ALLOW, EPERM]
    assert {call("fcntl", 1, lock) for lock in (5, 6, 7, 36, 37, 38)} == {EPERM}
    assert [call("prctl", option) for option in (1, 4, 15, 22, 24, 38)] == [EPERM, EPERM, ALLOW, EPERM, EPERM, EPERM]
    assert [call("prlimit64", pid) for pid in (0, 1, 4711)] == [ALLOW, EPERM, EPERM]
    assert [call("sendto", 3, 0, 1, 0, address) for address in (0, 1, 1 << 40)] == [ALLOW, EPERM, EPERM]
    stream, datagram, packet = 1, 2, 5
    assert [call("socketpair", 1, kind) for kind in (stream, stream | 0o2004000, datagram, packet, 0)] == [
        *(ALLOW, ALLOW, EPERM, EPERM, EPERM)
    ]
    assert call("socketpair", 2, stream) == EPERM
    private, shared, validated, anonymous = 2, 1, 3, 0x20
    shell = Filter(arch, "shell")
    for flags, result in (
        (private, ALLOW),
        (private | anonymous, ALLOW),
        (shared | anonymous, EPERM),
        (validated, EPERM),
    ):
        assert (call("mmap", 0, 1, 3, flags), shell("mmap", 0, 1, 3, flags)) == (ALLOW, result)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_without_an_own_root_modes_and_times_stay(arch: str) -> None:
    call = Filter(arch, own_space=False)
    assert [call(name) for name in ("fchmod", "fchmodat", "utimensat", "fchownat", "setxattr")] == [EPERM] * 5


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_other_abis_and_later_calls(arch: str) -> None:
    call = Filter(arch)
    read = call.numbers["read"]
    for other in (0x40000003, 0x40000028, *(a for a in _syscalls.AUDIT_ARCH.values() if a != call.arch), 0):
        assert judge(call.code, read, (), other) == KILL
    assert judge(call.code, read | 0x40000000, (), call.arch) == EPERM
    assert judge(call.code, _syscalls.HIGHEST_KNOWN + 1, (), call.arch) == ENOSYS


@settings(max_examples=50, deadline=None)
@given(
    arch=st.sampled_from(ARCHITECTURES),
    kind=st.sampled_from(["python", "shell"]),
    nr=st.integers(0, (1 << 32) - 1) | st.integers(0, 460),
    args=st.tuples(*[st.integers(0, (1 << 64) - 1) | st.integers(0, 100)] * 6),
)
def test_only_listed_calls_ever_pass(arch: str, kind: str, nr: int, args: tuple[int, ...]) -> None:
    call = Filter(arch, kind)
    names = {number: name for name, number in call.numbers.items()}
    verdict = judge(call.code, nr, args, call.arch)
    assert verdict in (ALLOW, EPERM, ENOSYS)
    if verdict == ALLOW:
        allowed = f"{_seccomp._ALLOWED} {_seccomp._SHELL_ALLOWED} {_seccomp._OWN_SPACE_ALLOWED}".split()
        by_arguments = ["clone", "ioctl", "fcntl", "prctl", "prlimit64", "sendto", "socketpair", "kill", "tgkill"]
        assert names[nr] in [*allowed, *by_arguments, "setsid", "setpgid"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_program_fits(arch: str) -> None:
    code = _seccomp.program("shell", arch=arch, own_pid=5, own_space=False)
    assert len(code) < 4096
    assert len(_seccomp.assemble(code)) == 8 * len(code)
    for pc, (op, jt, jf, _) in enumerate(code):
        if op not in (0x20, 0x06):
            assert max(jt, jf) < 256 and pc + 1 + max(jt, jf) < len(code)


def test_an_unknown_architecture_has_no_filter() -> None:
    with pytest.raises(KeyError):
        _seccomp.program("python", arch="riscv64", own_pid=None, own_space=True)
