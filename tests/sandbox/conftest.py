"""One zygote for all quick tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from omr.sandbox import Outcome
from omr.sandbox._client import LocalClient, start

from .host import Host, limits, open_host, secret_in_environment


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalClient]:
    """The best tier of this machine."""
    with secret_in_environment(), start(("namespace", "landlock"), limits(), tmp_path_factory.mktemp("log")) as client:
        yield client


@pytest.fixture
def run(client: LocalClient) -> Callable[..., list[Outcome]]:
    """run(block, block, ..., timeout_s=) in one new session."""

    def run(*blocks: str, timeout_s: float | None = None, kind: str = "notebook", **options: object) -> list[Outcome]:
        async def body() -> list[Outcome]:
            session = client.session(kind)  # type: ignore[arg-type]
            try:
                return [await session.execute(block, timeout_s, **options) for block in blocks]  # type: ignore[arg-type]
            finally:
                await session.close()

        return asyncio.run(body())

    return run


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with open_host(tmp_path_factory.mktemp("host")) as host:
        yield host
