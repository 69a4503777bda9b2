"""Loading a tokenizer from several threads at once: the first import of transformers must be one thread's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LOAD_IN_THREADS = """
import sys, threading
from pathlib import Path
from omr.text import load_tokenizer
errors = []
def load():
    try:
        load_tokenizer(Path(sys.argv[1]))
    except BaseException as error:
        errors.append(repr(error))
threads = [threading.Thread(target=load) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(errors)
"""


def test_threads_may_load_a_tokenizer_at_once(tokenizer_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD_IN_THREADS, str(tokenizer_dir)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
