"""The --tracking-uri flag that the verbs which read runs share."""

from __future__ import annotations

import argparse

from omr.config import default_tracking


def add_uri(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tracking-uri", help="MLflow URI; default: mlflow.db in OMR_HOME")


def uri_of(args: argparse.Namespace) -> str:
    return str(args.tracking_uri or default_tracking())
