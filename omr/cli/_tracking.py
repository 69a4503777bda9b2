"""What the verbs that read tracked runs share: the --tracking-uri flag, and a run as a row of the table."""

from __future__ import annotations

import argparse
from typing import Any

from omr.config import default_tracking


def add_uri(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tracking-uri", help="MLflow URI; default: mlflow.db in OMR_HOME")


def uri_of(args: argparse.Namespace) -> str:
    return str(args.tracking_uri or default_tracking())


def summary_of(run: dict[str, Any]) -> dict[str, Any]:
    """A tracked run in the form of the summary that runs leave in their folder."""
    prefix = "choice."
    return {
        "run_id": run["id"],
        "status": run["status"],
        "reason": run["tags"].get("omr.reason", ""),
        "name": run["name"],
        "choices": {k.removeprefix(prefix): v for k, v in run["tags"].items() if k.startswith(prefix)},
        "metrics": run["metrics"],
        "tags": run["tags"],
    }
