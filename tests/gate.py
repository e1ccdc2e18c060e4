"""The one check before a change goes in: ``python -m tests.gate``.

Format, lint, types, then the tests, those of the README among them. Every step runs, so that one
run shows all that is wrong.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = {
    "format": ("ruff", "format", "--check", "."),
    "lint": ("ruff", "check", "."),
    "types": ("mypy",),
    "tests": ("pytest",),
}


def main() -> int:
    """Run every step; returns 1 when one of them failed."""
    failed = []
    for name, (module, *arguments) in STEPS.items():
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT).returncode:
            failed.append(name)
    print(f"gate: failed: {', '.join(failed)}" if failed else "gate: passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
