"""Who may import whom, and what the Hub's loader makes of the files that it copies.

Every rule is a function of source text, so that each is tried on a bad example as well as on the repository.
"""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# package -> those of our packages that it may import
ARROWS = {
    "configuration_interbert": set(),
    "modeling_interbert": {"configuration_interbert"},
    "processing": set(),
    "model_cards": set(),
}
HUB_FILES = [
    "configuration_interbert/configuration_interbert.py",
    "modeling_interbert/modeling_interbert.py",
    "processing/processing_interbert.py",
    "processing/pipelines_interbert.py",
    "processing/configuration_faster_rcnn.py",
    "processing/modeling_faster_rcnn.py",
    "processing/losses_faster_rcnn.py",
    "processing/image_processing_faster_rcnn.py",
    "processing/region_extractors.py",
    "processing/region_operators.py",
]
# Re-exports the real configuration to the modeling file; saving a configuration overwrites its copy.
STAND_IN = "modeling_interbert/configuration_interbert.py"
HUB_LIBRARIES = {"numpy", "torch", "transformers"}
# The decorator of typed configurations, and YAML; transformers itself depends on both.
HUB_EXTRA_IMPORTS = {"huggingface_hub.dataclasses.strict", "yaml.safe_load"}


class ImportedName(NamedTuple):
    line: int
    name: str  # dotted; of `from a.b import c`: "a.b.c"
    level: int  # number of leading dots

    @property
    def top(self) -> str:
        return self.name.split(".")[0]


def imported_names(source: str) -> list[ImportedName]:
    """Every import of a file, those inside functions and conditions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [ImportedName(node.lineno, alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            found += [ImportedName(node.lineno, prefix + alias.name, node.level) for alias in node.names]
    return found


def arrow_errors(package: str, source: str, script_modules: set[str]) -> list[str]:
    """Imports against the arrows: of another of our packages, or of scripts, tests or cards."""
    forbidden = (set(ARROWS) | script_modules) - ARROWS[package] - {package}
    return [
        f"line {imported.line}: {package} must not import {imported.name}"
        for imported in imported_names(source)
        if imported.level > 1 or (imported.level == 0 and imported.top in forbidden)
    ]


def hub_errors(source: str) -> list[str]:
    """Imports that a file copied to the Hub, where only torch and transformers are certain, must not have."""
    errors = []
    for imported in imported_names(source):
        if imported.level == 0:
            if imported.top not in sys.stdlib_module_names | HUB_LIBRARIES and imported.name not in HUB_EXTRA_IMPORTS:
                errors.append(f"line {imported.line}: {imported.name} may be missing where the Hub's copy runs")
        elif imported.level > 1 or imported.name.count(".") != 1:
            # The loader finds files by the pattern `from .module import`, in one flat folder.
            errors.append(f"line {imported.line}: relative imports must read `from .module import name`")
    return errors


def false_relative_imports(source: str) -> list[str]:
    """Lines that are no relative imports, but that the Hub's loader, which searches by pattern, takes for some."""
    true_lines = {imported.line for imported in imported_names(source) if imported.level}
    return [
        f"line {number}: {line.strip()}"
        for number, line in enumerate(source.splitlines(), start=1)
        if re.match(r"\s*(from\s+\.\S+\s+import|import\s+\.\S+\s*$)", line) and number not in true_lines
    ]


def shipped_files(root: Path, hub_file: str) -> list[Path]:
    """The Hub file and all that it imports relatively, directly or not; the stand-in is left out, as it is replaced."""
    shipped, waiting = [], [root / hub_file]
    while waiting:
        path = waiting.pop()
        if path in shipped or path == root / STAND_IN:
            continue
        shipped.append(path)
        waiting += [path.parent / f"{i.top}.py" for i in imported_names(path.read_text("utf-8")) if i.level == 1]
    return shipped


def layout_errors(root: Path) -> list[str]:
    """Files whose mere presence breaks saving to the Hub or hides a package."""
    errors = []
    if (root / "processing" / "configuration_interbert.py").exists():
        errors.append("processing/configuration_interbert.py overwrites the configuration when a processor is saved")
    for package in ARROWS:
        if (root / "tests" / package).exists():
            errors.append(f"tests/{package} hides the package {package} from the tests")
    return errors


SCRIPT_MODULES = {path.stem for path in (ROOT / "examples").glob("*.py")} | {"examples", "tests"}
PACKAGE_FILES = sorted(
    path.relative_to(ROOT).as_posix() for package in ARROWS for path in (ROOT / package).rglob("*.py")
)


def test_every_package_and_hub_file_is_present():
    for package in ARROWS:
        assert f"{package}/__init__.py" in PACKAGE_FILES
    for hub_file in [*HUB_FILES, STAND_IN]:
        assert hub_file in PACKAGE_FILES


@pytest.mark.parametrize("file", PACKAGE_FILES)
def test_package_imports_follow_the_arrows(file):
    source = (ROOT / file).read_text("utf-8")
    assert arrow_errors(file.split("/")[0], source, SCRIPT_MODULES) == []


@pytest.mark.parametrize("file", PACKAGE_FILES)
def test_no_text_reads_like_a_relative_import(file):
    assert false_relative_imports((ROOT / file).read_text("utf-8")) == []


@pytest.mark.parametrize("hub_file", HUB_FILES)
def test_hub_files_are_self_contained(hub_file):
    for path in shipped_files(ROOT, hub_file):
        assert hub_errors(path.read_text("utf-8")) == [], path.name


def test_the_stand_in_only_re_exports_the_configuration():
    imported = imported_names((ROOT / STAND_IN).read_text("utf-8"))
    assert {name.top for name in imported} == {"configuration_interbert"}
    # A relative import here would name this file itself.
    assert {name.level for name in imported} == {0}


def test_layout():
    assert layout_errors(ROOT) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("configuration_interbert", "from modeling_interbert import InterBERTModel"),
        ("configuration_interbert", "import processing.masking"),
        ("modeling_interbert", "from processing import InterBERTProcessor"),
        ("modeling_interbert", "def load():\n    import processing.region_dataset as regions"),
        ("processing", "from configuration_interbert import InterBERTConfig"),
        ("processing", "from modeling_interbert.modeling_interbert import InterBERTModel"),
        ("processing", "if True:\n    from ..modeling_interbert import InterBERTModel"),
        ("processing", "from training import train"),
        ("modeling_interbert", "import examples.training"),
        ("modeling_interbert", "import torch, tests.conftest"),
    ],
)
def test_arrow_errors_finds(package, source):
    assert len(arrow_errors(package, source, {"examples", "tests", "training"})) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("configuration_interbert", "from .configuration_interbert import InterBERTConfig"),
        ("modeling_interbert", "from configuration_interbert import InterBERTConfig\nimport modeling_interbert"),
        ("modeling_interbert", "from .configuration_interbert import InterBERTConfig"),
        ("processing", "import torch\nfrom .masking import mask_tokens\nfrom . import masking"),
        ("processing", "name = 'import modeling_interbert'  # import examples"),
    ],
)
def test_arrow_errors_admits(package, source):
    assert arrow_errors(package, source, {"examples", "tests", "training"}) == []


@pytest.mark.parametrize(
    "source",
    [
        "import datasets",
        "import os, PIL.Image",
        "from huggingface_hub import hf_hub_download",
        "import huggingface_hub",
        "from configuration_interbert import InterBERTConfig",
        "def read():\n    import pyarrow as pa",
        "from . import attention",
        "from .layers.attention import attend",
        "from ..layers import attend",
    ],
)
def test_hub_errors_finds(source):
    assert len(hub_errors(source)) == 1


def test_hub_errors_admits():
    source = (
        "from __future__ import annotations\n"
        "import math\n"
        "from collections.abc import Callable\n"
        "import numpy as np\n"
        "import torch.nn as nn\n"
        "from huggingface_hub.dataclasses import strict\n"
        "from transformers.modeling_utils import PreTrainedModel\n"
        "from .configuration_interbert import InterBERTConfig\n"
    )
    assert hub_errors(source) == []


@pytest.mark.parametrize(
    "source",
    [
        '"""Saved\nfrom .pooling import Pooler with the model."""',
        "def pool():\n    '''\n    from .pooling import Pooler\n    '''",
        "text = '''\nimport .pooling\n'''",
    ],
)
def test_false_relative_imports_finds(source):
    assert len(false_relative_imports(source)) == 1


def test_false_relative_imports_admits():
    source = (
        '"""Use `from .a import b`."""\n'
        "from .a import (\n    b,\n)\n"
        "if True:\n    from .c import d\n"
        "# from .e import f\n"
    )
    assert false_relative_imports(source) == []


def test_shipped_files_follows_relative_imports(tmp_path):
    (tmp_path / "modeling_interbert").mkdir()
    for name, source in {
        "modeling_interbert": "from .attention import attend\nfrom .configuration_interbert import InterBERTConfig",
        "attention": "import torch\nfrom .masks import joint_mask",
        "masks": "from .attention import attend",
        "conversion": "import safetensors",
        "configuration_interbert": "from configuration_interbert import InterBERTConfig",
    }.items():
        (tmp_path / "modeling_interbert" / f"{name}.py").write_text(source)
    shipped = shipped_files(tmp_path, "modeling_interbert/modeling_interbert.py")
    assert [path.stem for path in shipped] == ["modeling_interbert", "attention", "masks"]


@pytest.mark.parametrize("bad", ["processing/configuration_interbert.py", "tests/modeling_interbert/__init__.py"])
def test_layout_errors_finds(tmp_path, bad):
    assert layout_errors(tmp_path) == []
    (tmp_path / bad).parent.mkdir(parents=True)
    (tmp_path / bad).touch()
    assert len(layout_errors(tmp_path)) == 1
