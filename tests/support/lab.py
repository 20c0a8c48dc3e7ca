"""Scripts of ``tests/lab``, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

LAB = Path(__file__).parents[1] / "lab"


def run_lab(script: str, *args: str) -> list[dict]:
    """Run a script of ``tests/lab`` in a process of its own; the JSON lines it printed."""
    # The kernels are read when they are first imported: the interpreter cannot be turned on later.
    done = subprocess.run([sys.executable, str(LAB / script), *args], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
