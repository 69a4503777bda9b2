"""What each policy of the study saved, and what it did to the votes.

    python experiments/early_stopping/votes.py multirun/early_stopping/TIME

The cell without a policy is the reference: all votes of the same seeds. For every other cell: the tokens that its
server really wrote (kept and cancelled generations) against the reference's, and the problems whose voted answer is
another one, by the reason for which the vote ended. A kept generation must read as in the reference, character for
character; those that do not are counted.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from omr.solve.answer import vote_key


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def problems(cell: Path) -> dict[str, dict[str, str]]:
    with (cell / "problems.csv").open(encoding="utf-8", newline="") as lines:
        return {row["id"]: row for row in csv.DictReader(lines)}


def policy(cell: Path) -> str:
    job = yaml.safe_load((cell / "config.yaml").read_text())["job"]
    parts = ["decided"] if job["stop_when_decided"] else []
    if job["stop_at_agreement"] is not None:
        parts.append(f"{job['stop_at_agreement']:.0%} agree after {job['agreement_after']}")
    return " or ".join(parts)


def key(answer: str) -> str:
    return vote_key(answer) if answer else ""


def main(study: Path) -> None:
    cells = {policy(cell): cell for cell in sorted(study.iterdir()) if (cell / "problems.csv").is_file()}
    full = cells.pop("")
    reference, texts = problems(full), {(r["id"], r["sample"]): r["generation"] for r in rows(full / "samples.jsonl")}
    all_tok = sum(int(p["tokens"]) for p in reference.values())
    print(f"all {len(texts)} generations: {all_tok:,} tokens, maj {score(reference)}")
    for name, cell in cells.items():
        table, kept = problems(cell), rows(cell / "samples.jsonl")
        tok = sum(int(p["tokens"]) + int(p["spent_tok"]) for p in table.values())
        reasons = Counter(reason(p) for p in table.values())
        changed = Counter(
            reason(p) for i, p in table.items() if key(p["voted_answer"]) != key(reference[i]["voted_answer"])
        )
        other = sum(r["generation"] != texts[r["id"], r["sample"]] for r in kept)
        estimate = sum(float(p["saved_tok"]) for p in table.values())
        print(
            f"{name}: {len(kept)} kept, {sum(int(p['cancelled']) for p in table.values())} cut off; {tok:,} tokens "
            f"({sum(int(p['spent_tok']) for p in table.values()):,} of them cut off), {1 - tok / all_tok:.1%} saved "
            f"(the run's own estimate: {estimate / (estimate + tok):.1%}); maj {score(table)}; "
            f"kept generations that read otherwise: {other}"
        )
        for why, count in sorted(reasons.items()):
            print(f"    {why}: {count} problems, voted answer changed in {changed[why]}")


def reason(problem: dict[str, str]) -> str:
    return problem["stopped"].split(" after ")[0] or "all 16"


def score(table: dict[str, dict[str, str]]) -> str:
    return f"{sum(p['vote_right'] == '1' for p in table.values())}/{len(table)}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
