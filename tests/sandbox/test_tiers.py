"""Tiers: what is taken when something is missing, what is said about it, and the same for users who are not root."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from omr.errors import MissingBackend
from omr.sandbox import _client

from .host import ROOT

PROLOGUE = """
import asyncio, errno, os, sys
from pathlib import Path
from omr.errors import OmrError
from omr.sandbox import _linux, _seccomp, _syscalls
from omr.sandbox._client import SessionLimits, start

NUMBERS = _syscalls.numbers(_syscalls.machine())

def deny(**calls):
    '''Make this process and its children fail these system calls.'''
    code = [(0x20, 0, 0, 0)]
    for name, reason in calls.items():
        code += [(0x15, 0, 1, NUMBERS[name]), (0x06, 0, 0, 0x00050000 | reason)]
    _linux.no_new_privileges()
    _seccomp.install(_seccomp.assemble([*code, (0x06, 0, 0, 0x7FFF0000)]))

def try_tiers(*tiers, code="1 + 1", spares=0):
    limits = SessionLimits(
        timeout_s=20, output_chars=1000, session_s=0, memory_bytes=1 << 29, scratch_bytes=1 << 22, seed=0
    )
    async def body(client):
        session = client.session()
        try:
            return await session.execute(code)
        finally:
            await session.close()
    try:
        with start(tiers, limits, Path(sys.argv[1]), spares=spares) as client:
            outcome = asyncio.run(body(client))
            print("tier:", client.tier)
            print("refused:", client.refused)
            print("output:", "|".join(outcome.stdout.splitlines()) or outcome)
    except OmrError as error:
        print("error:", type(error).__name__, error)
"""

AS_ANOTHER_USER = """
import os, sys
from omr.sandbox import _linux
uid, gid = os.getuid(), os.getgid()
_linux.unshare(_linux.CLONE_NEWUSER)
for name, text in (("setgroups", "deny"), ("uid_map", f"{sys.argv[1]} {uid} 1"), ("gid_map", f"{sys.argv[1]} {gid} 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[2:]])  # another uid than 0 loses every capability here
"""


def run_python(body: str, log: Path, *, as_uid: int | None = None) -> dict[str, str]:
    code = PROLOGUE + textwrap.dedent(body)
    argv = [sys.executable, "-c"]
    argv += [code, str(log)] if as_uid is None else [AS_ANOTHER_USER, str(as_uid), code, str(log)]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)


@pytest.mark.slow
def test_namespaces_refused_falls_back_and_says_why(tmp_path: Path) -> None:
    said = run_python("deny(unshare=errno.EPERM)\ntry_tiers('namespace', 'landlock')", tmp_path)
    assert (said["tier"], said["output"]) == ("landlock", "2")
    assert said["refused"].startswith("namespace: unshare(") and said["refused"].endswith("EPERM")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "reason", "step"),
    [
        ("mount", "EACCES", "mount("),
        ("mount_setattr", "ENOSYS", "mount_setattr("),
        ("pivot_root", "EPERM", "pivot_root"),
        ("setns", "EINVAL", "setns(pid namespace)"),
    ],
)
def test_the_failing_step_is_named(call: str, reason: str, step: str, tmp_path: Path) -> None:
    said = run_python(f"deny({call}=errno.{reason})\ntry_tiers('namespace')", tmp_path)
    assert "error" in said
    assert said["error"].startswith(f"MissingBackend process isolation is not available here: namespace: {step}")
    assert reason in said["error"]
    assert "\n" not in said["error"]


@pytest.mark.slow
def test_nothing_works_is_a_refusal_that_names_both(tmp_path: Path) -> None:
    body = "deny(unshare=errno.EPERM, landlock_create_ruleset=errno.ENOSYS)\ntry_tiers('namespace', 'landlock')"
    error = run_python(body, tmp_path)["error"]
    assert "namespace: unshare(" in error and "EPERM" in error
    assert "landlock: landlock_create_ruleset: ENOSYS" in error


@pytest.mark.slow
def test_without_landlock_namespaces_still_hold(tmp_path: Path) -> None:
    body = (
        "deny(landlock_create_ruleset=errno.EOPNOTSUPP)\n"
        "try_tiers('namespace', 'landlock', code='import os; print(os.path.exists(\"/etc\"))')"
    )
    said = run_python(body, tmp_path)
    assert (said["tier"], said["output"]) == ("namespace", "False")


@pytest.mark.slow
@pytest.mark.parametrize("uid", [1000, 0])
@pytest.mark.parametrize("tier", ["namespace", "landlock", "process"])
def test_a_user_who_is_not_root(tier: str, uid: int, tmp_path: Path) -> None:
    """Also the root of a container that has no other uid, nor any right outside."""
    probe = """
import os, sympy

def can(f, *a):
    try:
        f(*a)
        return 1
    except OSError:
        return 0

print(can(open, '/etc/passwd'), can(open, sympy.__file__, 'a'), can(os.listdir, '/proc'), can(open, 'own', 'w'))
print(can(os.kill, OWNER, 0))
"""
    body = f"assert os.getuid() == {uid}\ntry_tiers({tier!r}, code={probe!r}.replace('OWNER', str(os.getpid())))"
    said = run_python(body, tmp_path, as_uid=uid)
    assert said["tier"] == tier
    expected = {"namespace": "0 0 0 1", "landlock": "0 0 0 1", "process": "1 1 1 1"}
    assert said["output"].split("|") == [expected[tier], expected[tier][0]]


@pytest.mark.slow
def test_a_checkout_under_any_path(tmp_path: Path) -> None:
    home = tmp_path / "a b" / "ünï" / "tmp"
    home.mkdir(parents=True)
    (home / "omr").symlink_to(ROOT / "omr")
    result = subprocess.run(
        [sys.executable, "-c", PROLOGUE + "\ntry_tiers('namespace')", str(home / "log")],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "output: 2\n" in result.stdout, result.stderr


def test_refusals_are_one_line() -> None:
    text = _client.explain(
        [{"tier": "a", "step": "mount", "errno": 1}, {"tier": "b", "step": "Odd: thing", "errno": 0}]
    )
    assert text == "a: mount: EPERM; b: Odd: thing"
    assert "\n" not in str(MissingBackend("process isolation", why=text))
