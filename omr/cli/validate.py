"""omr validate [--multirun] OVERRIDES...: compose and check every cell of a command line, run nothing."""

from __future__ import annotations

from omr.sweep import checked


def main(argv: list[str]) -> int:
    multirun = bool({"--multirun", "-m"} & set(argv))
    plan = checked([a for a in argv if a not in ("--multirun", "-m")], multirun=multirun)
    for cell in plan.cells:
        print("ok  " + (" ".join(cell.overrides) or "(the defaults)"))
    return 0
