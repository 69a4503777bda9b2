"""The command line: `python -m omr [GROUP=CHOICE | KEY=VALUE ...]` runs, `omr VERB ...` does something beside runs.

Reads: compose and check every cell (compose.py), open a Run for each (run.py), `cfg.job.run(run)`, end with a table.
Exit codes: 0, 1 for a failure, 2 for a mistake in the request, 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

from omr import __version__
from omr.errors import OmrError, Terminated, is_disk_full

HYDRA_ONLY = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--package", "-p")
"""Flags that ask Hydra to print something: nothing is run."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        if args and not args[0].startswith(("+", "-", "~")) and "=" not in args[0]:
            from omr.cli import jobs, verb

            if args[0] not in jobs():
                return verb(args[0])(args[1:])
            args = [f"job={args[0]}", *args[1:]]
        if {"--help", "-h"} & {*args}:
            from omr.compose import usage

            print(usage())
            return 0
        if "--version" in args:
            print(f"omr {__version__}")
            return 0
        if any(a.split("=")[0] in HYDRA_ONLY for a in args):
            from omr.sweep import hand_to_hydra

            hand_to_hydra(args)
            return 0
        from omr.sweep import run_all

        return run_all(
            [a for a in args if a not in ("--multirun", "-m")], multirun=bool({"--multirun", "-m"} & {*args})
        )
    except OmrError as error:
        print(f"omr: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("omr: interrupted; every child process has been ended", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if not is_disk_full(error):
            raise
        print("omr: no disk space left; free some, or set OMR_HOME to another disk", file=sys.stderr)
        return 1
    except Terminated:
        print("omr: terminated; every child process has been ended", file=sys.stderr)
        return 143
    finally:
        gc.freeze()  # or the interpreter's last collection would walk through every library: seconds on a busy machine


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; a second one must not break the clean-up
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
