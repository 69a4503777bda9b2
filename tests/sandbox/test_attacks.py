"""Every attack succeeds in a bare subprocess and fails in a session; owner, sibling and the next session live on."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from omr.sandbox import Outcome, _syscalls
from omr.sandbox._client import LocalClient, start
from omr.sandbox._session import LocalSession

from .attacks import ATTACKS, CATEGORIES, Attack
from .host import Host, limits, run_bare, secret_in_environment

WITHOUT_NAMESPACES = {"inodes", "hard_links", "symbolic_links"}
"""What the landlock tier is documented not to hold: no quota on the scratch folder but the size of a file."""


def possible() -> list[Attack]:
    """Attacks that can succeed in a bare subprocess of this user on this machine."""
    return [
        attack
        for attack in ATTACKS
        if (os.geteuid() == 0 or not attack.root_only) and attack.arch in ("", _syscalls.machine())
    ]


def parameters() -> list[object]:
    """The first attack of each category quickly, all of them in the slow run."""
    seen: set[int] = set()
    found: list[object] = []
    for attack in possible():
        marks = [pytest.mark.slow] if attack.category in seen else []
        seen.add(attack.category)
        found.append(pytest.param(attack, id=f"{attack.category}-{attack.name}", marks=marks))
    return found


def prepared(attack: Attack, host: Host) -> str:
    names = "".join(f"{name} = {value!r}\n" for name, value in host.names.items() if name in attack.code)
    return names + attack.code.replace("BREACHED", "BREACH' + 'ED")  # a traceback quotes the source


def test_every_category_has_an_attack() -> None:
    assert {attack.category for attack in possible()} == set(CATEGORIES)


@pytest.mark.parametrize("attack", parameters())
def test_attack_succeeds_without_a_sandbox(attack: Attack, host: Host, tmp_path: Path) -> None:
    host.reset()
    timeout_s = 0.4 if attack.proof == "hang" else 30.0
    output, status = run_bare(prepared(attack, host), tmp_path, timeout_s, keep_output=attack.proof != "hang")
    if attack.proof == "output":
        assert "BREACHED" in output
    elif attack.proof == "hang":
        assert status is None
    else:
        assert status not in (0, None)
    host.reset()


@pytest.mark.parametrize("attack", parameters())
def test_attack_fails(attack: Attack, client: LocalClient, host: Host) -> None:
    asyncio.run(besiege(client, attack, host))


@pytest.fixture(scope="module")
def landlock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalClient]:
    with secret_in_environment(), start(("landlock",), limits(), tmp_path_factory.mktemp("log")) as client:
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("attack", [a for a in possible() if a.name not in WITHOUT_NAMESPACES], ids=lambda a: a.name)
def test_attack_fails_without_namespaces(attack: Attack, landlock: LocalClient, host: Host) -> None:
    assert landlock.tier == "landlock"
    asyncio.run(besiege(landlock, attack, host))


async def besiege(client: LocalClient, attack: Attack, host: Host) -> None:
    """The attack in one session beside another; then see to all three: the host, the sibling, a new session."""
    host.reset()
    attacker, sibling = client.session(), client.session()
    try:
        assert (await sibling.execute("x = 41")).status == "completed"
        started = time.monotonic()
        outcome = await attacker.execute(prepared(attack, host), attack.timeout_s)
        seconds = time.monotonic() - started
        assert "BREACHED" not in outcome.stdout + outcome.stderr, outcome
        assert host.touched() == []
        if attack.proof == "hang":
            assert outcome.status == "timeout", outcome
        if attack.proof == "death":
            assert outcome.state_lost, outcome
        assert seconds < attack.timeout_s + 2.0  # interrupt, grace, kill
        await assert_alive(sibling, "x + 1", "42\n")
        await assert_alive(attacker, "1 + 1", "2\n")
        assert client.restarts == 0
    finally:
        await attacker.close()
        await sibling.close()


async def assert_alive(session: LocalSession, code: str, shown: str) -> None:
    outcome = await session.execute(code)
    assert (outcome.status, outcome.stdout) == ("completed", shown), outcome


def test_sessions_do_not_see_each_other(client: LocalClient) -> None:
    async def body() -> tuple[Outcome, Outcome]:
        a, b = client.session(), client.session()
        try:
            await a.execute("open('note', 'w').write('mine'); import builtins, sympy; builtins.x = sympy.x = 1")
            files = await b.execute("import os; print(os.listdir('.'), os.path.exists('note'))")
            state = await b.execute("import sympy; print(hasattr(sympy, 'x'), 'x' in dir(__builtins__))")
            return files, state
        finally:
            await a.close()
            await b.close()

    files, state = asyncio.run(body())
    assert files.stdout == "[] False\n"
    assert state.stdout == "False False\n"


def test_sessions_cannot_talk_through_locks(client: LocalClient) -> None:
    """Files of the root, and /dev/null, are the same for all: a lock that one holds another could ask for."""
    hold = "import fcntl\nshared = open('/dev/null', 'w')\nfcntl.lockf(shared, fcntl.LOCK_EX, 7, 3)"
    ask = (
        "import fcntl, struct\nasked = struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 3, 7, 0)\n"
        "held = struct.unpack('hhqqi4x', fcntl.fcntl(open('/dev/null', 'w'), fcntl.F_GETLK, asked))[0]\n"
        "print('seen' if held == fcntl.F_WRLCK else 'free')"
    )

    async def body() -> tuple[Outcome, Outcome]:
        a, b = client.session(), client.session()
        try:
            return await a.execute(hold), await b.execute(ask)
        finally:
            await a.close()
            await b.close()

    assert all("PermissionError" in outcome.stdout for outcome in asyncio.run(body()))


@pytest.mark.slow
def test_endless_recursion_ends(client: LocalClient) -> None:
    async def body() -> Outcome:
        session = client.session()
        try:
            return await session.execute("import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nf()", 2.0)
        finally:
            await session.close()

    outcome = asyncio.run(body())
    assert outcome.status in ("timeout", "error")


FORGERIES = {
    "done_early": 'import os, time\nos.write(3, (23).to_bytes(4, "big") + b\'{"status": "completed"}\')\ntime.sleep(9)',
    "huge_length": 'import os, time\nos.write(3, b"\\xff\\xff\\xff\\xff" + b"x" * 1000)\ntime.sleep(9)',
    "nested": 'import os, time\nos.write(3, (60000).to_bytes(4, "big") + b"[" * 60000)\ntime.sleep(9)',
    "not_an_object": 'import os, time\nos.write(3, (2).to_bytes(4, "big") + b"[]")\ntime.sleep(9)',
    "huge_integer": 'import os, time\nos.write(3, (60000).to_bytes(4, "big") + b"9" * 60000)\ntime.sleep(9)',
    "never_complete": 'import os, time\nos.write(3, (1000).to_bytes(4, "big") + b"{")\ntime.sleep(9)',
    "not_text": 'import os, time\nos.write(3, (4).to_bytes(4, "big") + b"\\xff\\xfe\\x00\\x01")\ntime.sleep(9)',
    "flood": 'import os\nwhile True: os.write(3, (2).to_bytes(4, "big") + b"{}")',
    "closed_socket": "import os, time\nos.close(3)\ntime.sleep(9)",
    "closed_everything": "import os, time\nos.closerange(0, 100)\ntime.sleep(9)",
    "wrong_status": 'import os, time\nos.write(3, (15).to_bytes(4, "big") + b\'{"status": {}} \')\ntime.sleep(9)',
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "huge_length" else [pytest.mark.slow]) for n in FORGERIES]
)
def test_forged_messages_harm_only_the_forger(name: str, client: LocalClient) -> None:
    async def body() -> None:
        forger, sibling = client.session(), client.session()
        try:
            await sibling.execute("x = 41")
            outcome = await forger.execute(FORGERIES[name], 0.5)
            assert outcome.seconds < 2.0
            await assert_alive(sibling, "x + 1", "42\n")
            await forger.execute("1", 0.5)  # whatever this says, it comes back
        finally:
            await forger.close()
            await sibling.close()

    asyncio.run(body())
