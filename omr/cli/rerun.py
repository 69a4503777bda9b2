"""omr rerun RUN [OVERRIDES...]: run again what a tracked run was asked to do, with changes on top."""

from __future__ import annotations

import argparse
import shlex

from omr.cli._tracking import add_uri, uri_of
from omr.config import home
from omr.errors import ConfigError
from omr.sweep import run_all
from omr.tracker import get_run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omr rerun", description=__doc__)
    parser.add_argument("run", help="run id or a unique prefix; `omr ls STUDY` lists them")
    parser.add_argument("overrides", nargs="*")
    add_uri(parser)
    args = parser.parse_args(argv)
    tags = get_run(uri_of(args), args.run, home())["tags"]
    if "omr.overrides" not in tags:
        raise ConfigError(f"run {args.run} was not started by omr: it carries no overrides")
    return run_all([*shlex.split(tags["omr.overrides"]), *args.overrides], multirun=tags.get("omr.kind") == "sweep")
