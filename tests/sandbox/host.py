"""Targets on the host for attacks, the bare subprocess that they succeed in, and a look at processes from outside."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omr.sandbox import _syscalls
from omr.sandbox._client import SessionLimits
from omr.sandbox._memory import tree

SECRET = "swordfish-4711"
ROOT = Path(__file__).parents[2]


def limits(**changes: object) -> SessionLimits:
    values: dict[str, object] = {
        "timeout_s": 10.0,
        "output_chars": 1000,
        "session_s": 600.0,
        "memory_bytes": 512 << 20,
        "scratch_bytes": 8 << 20,
        "seed": 0,
    }
    return SessionLimits(**{**values, **changes})  # type: ignore[arg-type]


@contextlib.contextmanager
def secret_in_environment() -> Iterator[None]:
    before = os.environ.get("OMR_TEST_SECRET")
    os.environ["OMR_TEST_SECRET"] = SECRET
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMR_TEST_SECRET"]


@dataclass
class Host:
    """What attacks aim at. `names` are filled into an attack's code; `touched` says which of it an attack reached."""

    folder: Path
    tcp: socket.socket
    unix: socket.socket
    abstract: socket.socket
    udp: socket.socket
    connections: list[str] = field(default_factory=list)

    @property
    def names(self) -> dict[str, object]:
        return {
            "CANARY": str(self.folder / "canary.txt"),
            "FOLDER": str(self.folder),
            "OWNER": os.getpid(),
            "SECRET": SECRET,
            "PORT": self.tcp.getsockname()[1],
            "UDP_PORT": self.udp.getsockname()[1],
            "UNIX": str(self.folder / "socket"),
            "ABSTRACT": self.abstract.getsockname().decode().lstrip("\0"),
            "SYS": _syscalls.numbers(_syscalls.machine()),
        }

    def reset(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in ("canary.txt", "socket"):
                path.unlink()
        (self.folder / "canary.txt").write_text("canary-of-the-host")
        (self.folder / "canary.txt").chmod(0o666)
        self.connections.clear()

    def touched(self) -> list[str]:
        """Traces of an attack on this side: changed or new files, connections."""
        traces = list(self.connections)
        if (self.folder / "canary.txt").read_text() != "canary-of-the-host":
            traces.append("canary changed")
        traces += [f"new file {p.name}" for p in self.folder.iterdir() if p.name not in ("canary.txt", "socket")]
        return traces


@contextlib.contextmanager
def open_host(folder: Path) -> Iterator[Host]:
    """Files and listening sockets for attacks to reach."""
    for parent in (folder, *folder.parents[:-1]):
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
            parent.chmod(0o777)  # nothing but the sandbox shall keep an attack out
    with contextlib.ExitStack() as stack:

        def listen(family: int, address: object, kind: int = socket.SOCK_STREAM) -> socket.socket:
            sock = stack.enter_context(socket.socket(family, kind))
            sock.bind(address)  # type: ignore[arg-type]
            if kind == socket.SOCK_STREAM:
                sock.listen(16)
            return sock

        target = Host(
            folder=folder,
            tcp=listen(socket.AF_INET, ("127.0.0.1", 0)),
            unix=listen(socket.AF_UNIX, str(folder / "socket")),
            abstract=listen(socket.AF_UNIX, f"\0omr-test-{os.getpid()}"),
            udp=listen(socket.AF_INET, ("127.0.0.1", 0), socket.SOCK_DGRAM),
        )
        (folder / "socket").chmod(0o777)
        done = threading.Event()
        stack.callback(done.set)
        for name in ("tcp", "unix", "abstract", "udp"):
            sock: socket.socket = getattr(target, name)
            sock.settimeout(0.05)
            threading.Thread(target=_accept, args=(target, name, sock, done), daemon=True).start()
        target.reset()
        yield target


def _accept(target: Host, name: str, sock: socket.socket, done: threading.Event) -> None:
    while not done.is_set():
        try:
            if name == "udp":
                sock.recv(100)
            else:
                sock.accept()[0].close()
            target.connections.append(f"{name} connection")
        except TimeoutError:
            continue
        except OSError:
            return


def run_bare(code: str, cwd: Path, timeout_s: float = 20.0, *, keep_output: bool = True) -> tuple[str, int | None]:
    """The positive control: the same code in a subprocess with nothing around it. Its output, and its exit status
    (None: it had to be killed at the time limit, which counts from the code's first line)."""
    marker = cwd / "started"
    code = f"open({str(marker)!r}, 'w').close()\n{code}"
    with secret_in_environment():
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if keep_output else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while not marker.exists() and child.poll() is None:
        time.sleep(0.005)
    try:
        output, _ = child.communicate(timeout=timeout_s)
        return (output or b"").decode(errors="replace"), child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)
        output, _ = child.communicate()
        return (output or b"").decode(errors="replace"), None


def running(root: int) -> dict[int, str]:
    """A process and its descendants, each with its start time: pids are used again."""
    return {pid: start_time(pid) for pid in tree(root)}


def living(pids: dict[int, str]) -> list[int]:
    """Those of `pids` (with their start times) that still run."""
    return [pid for pid, before in pids.items() if before and start_time(pid) == before]


def start_time(pid: int) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def gone(pids: dict[int, str], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while living(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not living(pids)
