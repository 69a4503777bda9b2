"""Any OpenAI-compatible endpoint that runs elsewhere: nothing is started, no weights are needed.

With `dialect=openai` bodies hold what OpenAI's API documents and nothing more, and a sampling parameter that it has not
is refused, because leaving it out would change what is drawn. `dialect=vllm` is for remote servers that take top_k,
min_p and repetition_penalty.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from omr.errors import ConfigError, RequestError
from omr.option import option
from omr.server import Endpoint, Server, ServeSpec, SpecCounts, _prometheus

_NOT_OPENAI = ("top_k", "min_p", "repetition_penalty")
_MAX_STOPS = 4


class Dialect(Enum):
    openai = "openai"
    vllm = "vllm"


@option("server", "openai")
@dataclass(kw_only=True)
class OpenAi(Server):
    """`server.url` names it, `server.model` what to ask it for."""

    runs_quant: ClassVar[frozenset[str]] = frozenset({"bf16"})
    runs_drafter: ClassVar[frozenset[str]] = frozenset({"none"})
    needs_weights: ClassVar[bool] = False

    url: str | None = None
    """With or without the trailing /v1."""
    model: str | None = None
    """Name of the model there; null is model.name."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; null for a server without keys."""
    dialect: Dialect = Dialect.openai
    start_timeout_s: float = 30.0

    def base_url(self) -> str:
        if not self.url or not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"server=openai needs server.url=http(s)://HOST[:PORT][/v1], got {self.url!r}")
        return self.url.rstrip("/").removesuffix("/v1")

    def api_key(self) -> str:
        if self.api_key_env is None:
            return "EMPTY"
        if not os.environ.get(self.api_key_env):
            raise ConfigError(
                f"server.api_key_env={self.api_key_env}: no such environment variable is set; "
                "set it, or server.api_key_env=null for a server without keys"
            )
        return os.environ[self.api_key_env]

    def preflight(self, spec: ServeSpec) -> None:
        self.base_url()
        self.api_key()

    @contextlib.contextmanager
    def launch(self, spec: ServeSpec, log_dir: Path) -> Iterator[Endpoint]:
        """Ask for the list of models once. Raises RequestError when it does not answer or has not the model."""
        yield self.reach(self.model or spec.model_name, "server.model")

    def reach(self, name: str | None, setting: str) -> Endpoint:
        """The endpoint's model `name`, the only one there for None; `setting` is the key that names it.

        Raises RequestError when it does not answer, has not the model, or has several and none is named.
        """
        base_url, key = self.base_url(), self.api_key()
        known = _models(base_url, key, self.start_timeout_s)
        if name is None:
            if len(known) != 1:
                raise RequestError(f"{base_url} lists {', '.join(known[:8]) or 'no model'}: set {setting}")
            name = known[0]
        if known and name not in known:
            raise RequestError(f"{base_url} has no model {name!r}; it has {', '.join(known[:8])}: set {setting}")
        return Endpoint(base_url=base_url, model=name, server=self, api_key=key)

    def request_body(self, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        if self.dialect is Dialect.vllm:
            return body
        for key in _NOT_OPENAI:
            if key in body:
                raise ConfigError(f"server=openai has no sampling.{key} ({body[key]}); server.dialect=vllm sends it on")
        if len(body.get("stop", ())) > _MAX_STOPS:
            raise ConfigError(f"server=openai takes at most {_MAX_STOPS} stop strings, got {len(body['stop'])}")
        plain = {k: v for k, v in body.items() if k != "skip_special_tokens"}
        plain["stream_options"] = {"include_usage": True}
        if chat:
            plain["max_completion_tokens"] = plain.pop("max_tokens")
        return plain

    def spec_counts(self, metrics_text: str) -> SpecCounts | None:
        """If the endpoint is a vLLM or one of ours with its metrics page open."""
        for prefix in ("vllm:spec_decode_num_", "omr:spec_decode_num_"):
            if counts := _prometheus.spec_counts(metrics_text, prefix):
                return counts
        return None


def _models(base_url: str, api_key: str, timeout_s: float) -> list[str]:
    import httpx

    try:
        reply = httpx.get(f"{base_url}/v1/models", headers={"authorization": f"Bearer {api_key}"}, timeout=timeout_s)
    except httpx.HTTPError as error:
        raise RequestError(f"{base_url} does not answer: {type(error).__name__}: {error}") from None
    if reply.status_code in (401, 403):
        raise RequestError(
            f"{base_url} refuses the key ({reply.status_code}); see server.api_key_env", reply.status_code
        )
    if reply.status_code != 200:
        return []  # a server without the route: the first request will tell
    try:
        return [str(card["id"]) for card in reply.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise RequestError(f"{base_url}/v1/models gave no list of models; is it an OpenAI-style server?") from None
