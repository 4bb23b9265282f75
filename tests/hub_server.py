"""A Hub-compatible server for the tests that push and load over HTTP.

It is a script of its own, named by the environment variable INTERBERT_LOCAL_HUB; without it those tests are skipped.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LOCAL_HUB = Path(os.environ.get("INTERBERT_LOCAL_HUB", REPOSITORY.parent / "shared" / "tools" / "local_hub.py"))

needs_hub = pytest.mark.skipif(not LOCAL_HUB.is_file(), reason="INTERBERT_LOCAL_HUB names no Hub-compatible server")


def start_hub(folder: Path):
    """A context manager; what it returns has `env(home=...)`, the environment of a client process."""
    spec = importlib.util.spec_from_file_location("local_hub", LOCAL_HUB)
    module = importlib.util.module_from_spec(spec)
    sys.modules["local_hub"] = module  # dataclasses in it look their module up
    spec.loader.exec_module(module)
    return module.LocalHub(folder)


# The beginning of a script that runs where the packages cannot be imported.
WITHOUT_PACKAGES = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("configuration_interbert", "modeling_interbert", "processing", "model_cards"):
            raise ModuleNotFoundError(f"{name} must not be needed")

sys.meta_path.insert(0, Blocker())
"""
