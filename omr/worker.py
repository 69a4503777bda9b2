"""The child side of `process.run_verb`: `python -m omr.worker CALL.json RESULT.json`."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from omr.errors import OmrError, is_disk_full
from omr.option import discover, from_fields

FIX = "free some disk, or set OMR_HOME to another"


def main(call_path: Path, result_path: Path) -> int:
    # Threads that spin while they wait for each other are five times slower on a machine that is busy with other work.
    # Read by OpenMP when torch is first imported, which no option module does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    call = json.loads(call_path.read_text())
    kwargs = {k: Path(v["path"]) if isinstance(v, dict) and "path" in v else v for k, v in call["kwargs"].items()}
    answer: dict[str, Any]
    try:
        option = from_fields(discover()[call["group"], call["name"]], call["fields"])
        answer = {"value": getattr(option, call["verb"])(**kwargs)}
    except OmrError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        answer = {"error": "ResourceError", "message": f"out of memory in {call['verb']}: {_where(call)}"}
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch here
            answer = {"error": "ResourceError", "message": f"out of GPU memory in {call['verb']}: {_where(call)}"}
        elif is_disk_full(error):
            answer = {"error": "ResourceError", "message": f"no space left for {_where(call)} {call['verb']}: {FIX}"}
        else:
            traceback.print_exc(file=sys.stdout)  # into the log alone; stderr is shown as it comes
            last = f"{type(error).__name__}: {error}".splitlines()[0]
            answer = {"error": "ChildError", "message": f"{_where(call)} {call['verb']} failed: {last}"}
    temporary = result_path.with_suffix(".tmp")
    temporary.write_text(json.dumps(answer))
    os.replace(temporary, result_path)
    return 0


def _where(call: dict[str, Any]) -> str:
    return f"{call['group']}={call['name']}"


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), Path(sys.argv[2]))
    gc.freeze()  # see omr/__main__.py
    sys.exit(code)
