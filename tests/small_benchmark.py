"""Not a test: where the tests of the benchmarks run a whole one."""
import pytest

from benchmarks import __main__ as command
from benchmarks import roofs
from lib import runs


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder in place of the checkout, a clean commit, ceilings that take no time."""
    for module in (command, runs):
        monkeypatch.setattr(module, "root", lambda: tmp_path)
    monkeypatch.setattr(runs, "git_state", lambda: {"commit": "c0ffee", "dirty": False})
    monkeypatch.setattr(roofs, "ceilings", lambda device: {"fp32": 1e12, "bf16": 2e12, "bytes": 1e11})
    return tmp_path
