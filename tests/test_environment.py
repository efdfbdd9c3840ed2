"""pyproject.toml, requirements.txt and environment.yml describe one environment, workflow/requirements.txt another."""
import itertools
import re
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lib import root

PROJECT = tomllib.loads((root() / "pyproject.toml").read_text())
BOOK, WORKFLOW = ((root() / name).read_text() for name in ("requirements.txt", "workflow/requirements.txt"))
CONDA = yaml.safe_load((root() / "environment.yml").read_text())["dependencies"]
MACHINES = [{"python_version": python, "python_full_version": f"{python}.1", "sys_platform": system,
             "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system]}
            for python, system in itertools.product(("3.11", "3.12", "3.13"), ("linux", "darwin"))]


def pins(machine, lock=BOOK):
    """name -> pinned version of everything that a lock installs on a machine (marker values)."""
    lines = lock.replace("\\\n", " ").splitlines()
    found = [Requirement(re.sub(r"--hash=\S+", "", line)) for line in lines if line]
    wanted = [each for each in found if each.marker is None or each.marker.evaluate(machine)]
    versions = {canonicalize_name(each.name): next(iter(each.specifier)).version for each in wanted}
    assert len(versions) == len(wanted), "a package is pinned twice for one machine"
    return versions


def direct(lock=BOOK):
    groups = PROJECT["dependency-groups"]
    wanted = [groups["workflow"]] if lock is WORKFLOW else [
        PROJECT["project"]["dependencies"], *(groups[name] for name in groups if name != "workflow")]
    return [Requirement(line) for line in itertools.chain(*wanted)]


both = pytest.mark.parametrize("lock", [BOOK, WORKFLOW], ids=["book", "workflow"])


@both
@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: f"{m['python_version']}-{m['sys_platform']}")
def test_every_direct_requirement_is_pinned_within_its_range(machine, lock):
    have = pins(machine, lock)
    for requirement in direct(lock):
        version = have.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} has no pin in its requirements.txt: make lock"
        assert requirement.specifier.contains(version), f"{requirement} but {version} is pinned: make lock"


@both
def test_every_pin_is_exact_and_hashed(lock):
    for line in lock.replace("\\\n", " ").splitlines():
        assert re.match(r"[\w.-]+==[\w.+!]+ ", line), line[:80]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", line), line[:80]


@both
def test_the_lock_holds_no_address(lock):
    assert "://" not in lock and "--index" not in lock and "--find-links" not in lock


def test_what_runs_sweeps_is_no_part_of_the_books_environment():
    assert canonicalize_name("snakemake") not in pins(None) and "torch" not in pins(None, WORKFLOW)


def test_conda_gives_python_pip_and_node_and_pip_the_same_pins():
    assert [each for each in CONDA if isinstance(each, dict)] == [{"pip": ["-r requirements.txt"]}]
    conda = dict(re.fullmatch(r"([a-z]+)(.*)", each).groups() for each in CONDA if isinstance(each, str))
    assert set(conda) == {"python", "pip", "nodejs"}
    assert conda["python"].removeprefix("=") in {machine["python_version"] for machine in MACHINES}
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(conda["python"].removeprefix("="))


def test_this_environment_is_the_locked_one():
    installed = {canonicalize_name(each.name): each.version for each in metadata.distributions()}
    for requirement in direct():
        name = canonicalize_name(requirement.name)
        assert installed.get(name) == pins(None)[name], f"{name} differs from its pin: make setup"
