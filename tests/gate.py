"""The one check before a change goes in: ``python -m tests.gate``.

Format, lint, types, then the tests, those of the README among them. Every step runs, so that one
run shows all that is wrong.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = {
    "format": ("ruff", "format", "--check", "."),
    "lint": ("ruff", "check", "."),
    "types": ("mypy",),
    # A process per core, each with one thread: side by side, threads of one process wait more.
    "tests": ("pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "loadfile"),
}


def main() -> int:
    """Run every step; returns 1 when one of them failed."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    failed = []
    for name, (module, *arguments) in STEPS.items():
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", module, *arguments]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            failed.append(name)
    print(f"gate: failed: {', '.join(failed)}" if failed else "gate: passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
