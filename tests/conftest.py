"""Puts the project on the path, keeps torch to one thread a process, and leaves out the slow tests.

    python -m pytest -q tests                   the fast tests, at most four minutes on two cores
    python -m pytest -q tests -m slow           the slow ones
    python -m pytest -q tests -m "slow or not slow"     all

A slow test that is named, as tests/test_train.py::test_frozen_weights_stay, runs without -m.
"""
import os
import sys
from fnmatch import fnmatchcase

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE, os.path.join(HERE, "bench")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

torch.set_num_threads(1)

# File and test (with * and ?) of what takes more than a few seconds and what a faster test covers less thoroughly.
# Tests may also be marked where they stand, by pytest.mark.slow.
SLOW = (
)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless -m slow is given, see conftest.py")


def is_slow(item):
    name = f"{os.path.basename(item.location[0])}::{item.name}"
    # [ begins a set of characters for fnmatch, but a parameter for pytest
    return any(fnmatchcase(name, pattern.replace("[", "[[]")) for pattern in SLOW)


def pytest_collection_modifyitems(config, items):
    """Mark what SLOW names; leave out the slow ones, unless -m or the name of a test asks for them."""
    for item in items:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
