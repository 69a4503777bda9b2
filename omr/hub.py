"""The Hugging Face hub: downloads that resume, honour HF_TOKEN and HF_HUB_OFFLINE, and fail in one line.

Files go to the hub's own cache (HF_HOME), shared with every other program that uses it. A revision is always resolved
to the full commit hash, so that what was fetched can be named in an artifact key.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from omr.errors import ConfigError, InputError, OmrError, ResourceError

RepoType = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cache_folder(repo: str, repo_type: RepoType = "model") -> Path:
    """Where the hub's client keeps a repository: refs/BRANCH, snapshots/COMMIT/FILE."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{repo.replace('/', '--')}"


@functools.cache
def resolve_revision(repo: str, revision: str | None, repo_type: RepoType = "model") -> str:
    """The full commit hash of `revision` (a branch or tag; None is main). A full hash is returned as it is.

    Asked once a process: a branch that moves during a run does not split it. Offline, a branch is what the cache last
    saw it at. Raises InputError when nothing can tell.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision
    branch = revision or "main"
    reference = cache_folder(repo, repo_type) / "refs" / branch
    if is_offline():
        if reference.is_file() and COMMIT.fullmatch(reference.read_text().strip()):
            return reference.read_text().strip()
        raise InputError(f"{repo}@{branch} is not in the hub cache and HF_HUB_OFFLINE is set; unset it or set a path")
    from huggingface_hub import HfApi

    with one_line_errors(repo, repo_type):
        info = HfApi().repo_info(repo, revision=branch, repo_type=repo_type)
    assert info.sha is not None and COMMIT.fullmatch(info.sha), info.sha
    reference.parent.mkdir(parents=True, exist_ok=True)  # as the client does when it is given a branch
    reference.write_text(info.sha)
    return info.sha


def list_files(repo: str, commit: str, repo_type: RepoType) -> list[str]:
    """File names of a repository at a commit, sorted. Offline: those that are in the cache."""
    from huggingface_hub import HfApi

    if is_offline():
        root = cache_folder(repo, repo_type) / "snapshots" / commit
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    with one_line_errors(repo, repo_type):
        return sorted(HfApi().list_repo_files(repo, revision=commit, repo_type=repo_type))


def file(repo: str, commit: str, name: str, repo_type: RepoType) -> Path:
    """One file of a repository, downloaded if the cache lacks it."""
    from huggingface_hub import hf_hub_download

    with one_line_errors(repo, repo_type):
        return Path(hf_hub_download(repo, name, revision=commit, repo_type=repo_type, local_files_only=is_offline()))


def snapshot(repo: str, commit: str, patterns: Sequence[str], repo_type: RepoType = "model") -> Path:
    """The folder in the cache that holds the files of `commit` that match `patterns`, downloaded if need be."""
    from huggingface_hub import snapshot_download

    with one_line_errors(repo, repo_type):
        folder = snapshot_download(
            repo,
            revision=commit,
            repo_type=repo_type,
            allow_patterns=list(patterns),
            local_files_only=is_offline(),
        )
    assert isinstance(folder, str)
    return Path(folder)


@contextlib.contextmanager
def one_line_errors(repo: str, repo_type: RepoType = "model") -> Iterator[None]:
    """Turn whatever the hub client raises into one line that says what to do. Its warnings on retries are left out."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging as hub_logging

    what = f"{repo_type} {repo}"
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    except OmrError:
        raise
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
        raise InputError(f"{what} is gated: accept its terms at {page} and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{what} is not on the hub, or is private: check the name, or set HF_TOKEN") from None
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{what} has no such revision: {_first_line(error)}; check the full hash") from None
    except errors.HFValidationError as error:
        raise ConfigError(f"{repo!r} is not a hub id of the form owner/name: {_first_line(error)}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if is_offline():
            raise InputError(
                f"{what} is not in the hub cache and HF_HUB_OFFLINE is set; unset it, or set a path"
            ) from None
        raise InputError(f"{what} cannot be reached ({_first_line(error)}); check the network, or set a path") from None
    except errors.EntryNotFoundError as error:
        raise InputError(f"{what} lacks a file: {_first_line(error)}") from None
    except OSError as error:
        if error.errno == 28:
            raise ResourceError(
                f"no disk space left while fetching {what}; free some, or set HF_HOME elsewhere"
            ) from None
        raise InputError(f"{what} cannot be fetched ({_first_line(error)}); check the network, or set a path") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise InputError(
                f"{what} cannot be reached ({_first_line(error)}); check the network, or set a path"
            ) from None
        raise
    finally:
        hub_logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().removeprefix("Got: ")
    return text.splitlines()[0][:200] if text else type(error).__name__
