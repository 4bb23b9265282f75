"""The package's metadata, its declared requirements and the files around it agree with one another."""

import ast
import configparser
import os
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["configuration_interbert", "modeling_interbert", "model_cards", "processing"]
SCRIPT_FOLDERS = ("examples", "benchmarks", "tests")
OUR_MODULES = {*PACKAGES} | {path.stem for folder in SCRIPT_FOLDERS for path in (ROOT / folder).glob("*.py")}
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


SETUP = configparser.ConfigParser()
SETUP.read_string(read("setup.cfg"))


def requirements(*extras: str) -> list[Requirement]:
    """The declared requirements of the packages themselves and of the named extras."""
    lists = [SETUP["options"]["install_requires"], *(SETUP["options.extras_require"][extra] for extra in extras)]
    return [Requirement(line) for text in lists for line in text.split("\n") if line.strip()]


def third_party_imports(source: str, module_level_only: bool = False) -> set[str]:
    """Top-level names imported from outside the standard library and this repository.

    With `module_level_only`, imports inside functions are left out: these need their library only when called. So are
    those for type checkers alone.
    """
    names, waiting = set(), [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (module_level_only and (is_function or is_for_types)):
            waiting += ast.iter_child_nodes(node)
    return names - sys.stdlib_module_names - OUR_MODULES


def undeclared(imports: set[str], declared: list[Requirement]) -> list[str]:
    """Imported names that no distribution in `declared` provides."""
    providers = packages_distributions()
    declared_names = {canonicalize_name(requirement.name) for requirement in declared}
    return sorted(
        name
        for name in imports
        if not declared_names & {canonicalize_name(distribution) for distribution in providers.get(name, [name])}
    )


def imports_below(*folders: str, without: tuple[str, ...] = (), module_level_only: bool = False) -> set[str]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    files = [path for path in files if not any(path.is_relative_to(ROOT / name) for name in without)]
    assert files
    return set().union(*(third_party_imports(path.read_text("utf-8"), module_level_only) for path in files))


def newest_change(changelog: str) -> str:
    return re.search(r"^## (\S+)", changelog, flags=re.MULTILINE).group(1)


def pinned_versions(constraints: str, python: str) -> dict[str, str]:
    """Distribution -> version, of the lines that hold on one Python version such as "3.11"."""
    pinned = {}
    for line in constraints.splitlines():
        if not line.split("#")[0].strip():
            continue
        requirement = Requirement(line)
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        (specifier,) = requirement.specifier
        name = canonicalize_name(requirement.name)
        if specifier.operator != "==" or name in pinned:
            raise ValueError(f"expected one `==` version of {name} for Python {python}, got {line!r}")
        pinned[name] = specifier.version
    return pinned


def test_version_is_the_newest_entry_of_the_changelog():
    assert newest_change(read("CHANGELOG.md")) == SETUP["metadata"]["version"]
    assert newest_change("# Changelog\n\n## 0.2.0\n- b\n\n## 0.1.0\n- a\n") == "0.2.0"


def test_packages_are_the_folders():
    inits = [init for package in PACKAGES for init in (ROOT / package).rglob("__init__.py")]
    folders = {".".join(init.parent.relative_to(ROOT).parts) for init in inits}
    assert set(PACKAGES) <= folders
    # Subpackages are named one by one: setuptools would leave out those that are not.
    assert sorted(SETUP["options"]["packages"].split()) == sorted(folders)
    assert SETUP["metadata"]["name"] == "interbert"


def test_packages_import_only_what_a_plain_install_brings():
    assert undeclared(imports_below(*PACKAGES, module_level_only=True), requirements()) == []


def test_every_import_is_declared_in_some_extra():
    extras = [extra for extra in SETUP["options.extras_require"] if extra != "dev"]
    assert undeclared(imports_below(*PACKAGES, *SCRIPT_FOLDERS), requirements(*extras)) == []


def test_examples_import_at_the_top_only_what_their_extra_brings():
    imports = imports_below("examples", without=("examples/metrics", "examples/app.py"), module_level_only=True)
    assert undeclared(imports, requirements("examples")) == []
    app = third_party_imports(read("examples/app.py"), module_level_only=True)
    assert undeclared(app, requirements("demo", "examples")) == []


def test_metrics_import_only_what_their_extra_brings():
    assert undeclared(imports_below("examples/metrics"), requirements("metrics")) == []


def test_tests_import_only_what_make_test_installs():
    extras = ("demo", "examples", "formats", "metrics", "negatives", "onnx", "streaming", "test", "tracking")
    assert undeclared(imports_below("tests"), requirements(*extras)) == []
    assert '".[dev]"' in read("Makefile")


def test_dev_is_every_other_extra():
    (dev,) = [Requirement(line) for line in SETUP["options.extras_require"]["dev"].split("\n") if line]
    assert dev.name == "interbert"
    assert dev.extras == set(SETUP["options.extras_require"]) - {"dev"}


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_requirement_within_its_range(python):
    pinned = pinned_versions(read("constraints.txt"), python)
    extras = [extra for extra in SETUP["options.extras_require"] if extra != "dev"]
    for requirement in requirements(*extras):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against the tested {version}"
        # `==2.13.0` also takes a local build such as 2.13.0+cpu; naming one would refuse all others.
        assert Version(version).local is None


def test_readme_names_the_two_commands():
    readme = read("README.md")
    assert "make quickstart" in readme
    assert "make test" in readme


def test_continuous_integration_calls_make_test():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in read(".ci/run").splitlines()


def test_license_is_the_declared_one():
    assert SETUP["metadata"]["license"] == "Apache-2.0"
    assert re.match(r"\s+Apache License\s+Version 2\.0, January 2004\n", read("LICENSE"))
    assert "END OF TERMS AND CONDITIONS" in read("LICENSE")


def test_undeclared_finds_what_is_missing():
    source = "import os, numpy.linalg\nfrom PIL import Image\nfrom . import a\ndef f():\n    import not_installed.b\n"
    source += "if TYPE_CHECKING:\n    import not_installed.c\n"
    assert third_party_imports(source) == {"numpy", "PIL", "not_installed"}
    assert third_party_imports(source, module_level_only=True) == {"numpy", "PIL"}
    assert undeclared({"numpy", "PIL", "not_installed"}, [Requirement("numpy >=1")]) == ["PIL", "not_installed"]
    assert undeclared({"numpy", "PIL"}, [Requirement("numpy"), Requirement("Pillow >=10")]) == []


def test_pinned_versions_reads_markers_and_refuses_what_is_not_one_version():
    constraints = (
        "# tested\n"
        "numpy==2.4.6 ; python_version >= '3.11'\n"
        "numpy==2.2.6 ; python_version < '3.11'\n"
        "huggingface_hub==2.4.0\n"
    )
    assert pinned_versions(constraints, "3.10") == {"numpy": "2.2.6", "huggingface-hub": "2.4.0"}
    assert pinned_versions(constraints, "3.13") == {"numpy": "2.4.6", "huggingface-hub": "2.4.0"}
    with pytest.raises(ValueError, match="numpy"):
        pinned_versions(constraints + "numpy==2.0.0\n", "3.11")
    with pytest.raises(ValueError, match="torch"):
        pinned_versions("torch>=2.4\n", "3.11")
