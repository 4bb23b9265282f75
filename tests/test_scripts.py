"""Every script explains its arguments, and opens with commands that name it."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_help(script):
    result = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: " in result.stdout
    assert f"examples/{script.name}" in script.read_text(encoding="utf-8")


def test_the_scripts_are_found():
    assert {"run_pretrain.py", "generate_scenes.py", "quickstart.py"} <= {path.name for path in SCRIPTS}
