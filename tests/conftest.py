"""Settings shared by all tests: the scripts' folder on the path, no network, caches of their own, a fixed seed."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

# Scripts import one another by plain name (`from training import ...`), as Python allows from the folder of a script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

# Both are read when huggingface_hub, transformers and datasets are imported, which the test modules do after this file.
# A fresh HF_HOME for each worker keeps copies of remote code and datasets apart, and out of the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="interbert-tests-")


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
