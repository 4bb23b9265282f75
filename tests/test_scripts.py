"""Every script explains its arguments, and opens with commands that name it."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out
    assert f"examples/{script.name}" in script.read_text(encoding="utf-8")


def test_what_is_named_is_there():
    """Scripts, recipes and configurations that scripts, recipes and the README name."""
    texts = [
        path for pattern in ("*.py", "recipes/**/*.yaml", "accelerate_configs/*") for path in EXAMPLES.glob(pattern)
    ]
    for text in [*texts, EXAMPLES.parent / "README.md"]:
        for name in re.findall(r"examples/[\w./]+\.(?:py|yaml)", text.read_text(encoding="utf-8")):
            assert (EXAMPLES.parent / name).is_file(), f"{text} names {name}"


def test_the_scripts_are_found():
    assert {"run_pretrain.py", "generate_scenes.py", "quickstart.py"} <= {path.name for path in SCRIPTS}
