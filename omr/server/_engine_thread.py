"""The engine in a thread of its own, and the mailboxes through which requests hear from it.

The engine thread owns the engine: nobody else calls it. Requests and aborts reach it through a queue that it empties
between steps; what a step produced goes back to the event loop in one wake-up, whatever the number of requests, and is
sorted into one mailbox per HTTP request there. So the engine never waits for a slow client and never sees asyncio.

If the engine raises, the thread ends, every mailbox gets the error, and the service stays up to say so on /health.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from omr.engine.request import Output, Request
from omr.server import SpecCounts


class Refused(Exception):
    """The engine would not take a request; others are not touched."""


class EngineDead(Exception):
    """The engine raised in the middle of its work and is gone."""


class EngineLike(Protocol):
    """The part of `omr.engine.engine.Engine` that is used here."""

    counts: SpecCounts

    def add(self, request: Request) -> Any: ...
    def step(self) -> list[Output]: ...
    def abort(self, request_id: str) -> Any: ...


class Mailbox:
    """What the engine has said about the sequences of one HTTP request. Lives in the event loop's thread."""

    def __init__(self) -> None:
        self._items: list[Output] = []
        self._event = asyncio.Event()
        self.error: Exception | None = None
        self.gone = False
        """The client has hung up, or the service is stopping."""

    def put(self, item: Output) -> None:
        self._items.append(item)
        self._event.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self._event.set()

    def close(self) -> None:
        self.gone = True
        self._event.set()

    def wake(self) -> None:
        """Let `take` return although nothing has come."""
        self._event.set()

    async def take(self) -> list[Output]:
        """All outputs since the last call; none when woken or `gone`. Raises Refused, EngineDead."""
        await self._event.wait()
        self._event.clear()
        if self.error is not None:
            raise self.error
        items, self._items = self._items, []
        return items


class EngineThread:
    """Runs an engine. Every method but the thread's own body is called from the event loop's thread."""

    def __init__(self, load: Callable[[], Any], engine_of: Callable[[Any], EngineLike]) -> None:
        """`load` builds what the service needs (minutes, perhaps); `engine_of` finds the engine in it."""
        self._load = load
        self._engine_of = engine_of
        self._commands: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._mailboxes: dict[str, Mailbox] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.ready = asyncio.Event()
        self.loaded: Any = None
        self.error: EngineDead | None = None
        """Why the engine is dead; None while it loads or runs."""
        self.closing = False
        """All open requests have been ended and no new ones are wanted."""
        self.on_load_error: Callable[[BaseException], None] = lambda error: None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, request: Request, mailbox: Mailbox) -> None:
        """Queue a request; its outputs come to `mailbox` as they are."""
        if self.error is not None:
            raise self.error
        assert request.id not in self._mailboxes, request.id
        self._mailboxes[request.id] = mailbox
        self._commands.put(("add", request))

    def abort(self, request_id: str) -> None:
        """Forget a request: nothing more comes to its mailbox, the engine frees what it held. Idempotent."""
        if self._mailboxes.pop(request_id, None) is not None:
            self._commands.put(("abort", request_id))

    @property
    def num_open(self) -> int:
        return len(self._mailboxes)

    def close_all(self) -> None:
        """Tell every open request that it is over, and stay closed."""
        self.closing = True
        for mailbox in set(self._mailboxes.values()):
            mailbox.close()

    def stop(self, timeout_s: float) -> None:
        """End the thread after its current step, at most `timeout_s` seconds later."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # the event loop's side of a step

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            mailbox = self._mailboxes.get(output.id)
            if mailbox is None:
                continue  # aborted while the step ran
            if output.finish_reason is not None:
                del self._mailboxes[output.id]
            mailbox.put(output)

    def _refused(self, request_id: str, error: Exception) -> None:
        mailbox = self._mailboxes.pop(request_id, None)
        if mailbox is not None:
            mailbox.fail(Refused(str(error)))

    def _loaded(self, loaded: Any) -> None:
        self.loaded = loaded
        self.ready.set()

    def _crashed(self, error: BaseException) -> None:
        self.error = EngineDead(f"{type(error).__name__}: {error}")
        for mailbox in set(self._mailboxes.values()):
            mailbox.fail(self.error)
        self._mailboxes.clear()
        if self.loaded is None:
            self.on_load_error(error)
        else:
            traceback.print_exception(error)

    # the engine thread

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        try:
            loaded = self._load()
            self._post(self._loaded, loaded)
            self._serve(self._engine_of(loaded))
        except BaseException as error:  # handed to the event loop, which reports it
            self._post(self._crashed, error)

    def _serve(self, engine: EngineLike) -> None:
        live: set[str] = set()
        while True:
            wait = not live
            while True:
                try:
                    command = self._commands.get(block=wait)
                except queue.Empty:
                    break
                wait = False
                if command is None:
                    return
                verb, value = command
                if verb == "abort":
                    if value in live:
                        live.discard(value)
                        engine.abort(value)
                    continue
                try:
                    engine.add(value)
                except Exception as error:  # this request's fault: the engine is as it was
                    self._post(self._refused, value.id, error)
                else:
                    live.add(value.id)
            if live:
                outputs = engine.step()
                live.difference_update([o.id for o in outputs if o.finish_reason is not None])
                if outputs:
                    self._post(self._deliver, outputs)
