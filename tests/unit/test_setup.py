"""Packaging: what is imported is declared, what is declared is pinned, and a wrong Python is told so."""

import ast
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def declared() -> dict:
    """The arguments `setup.py` calls setup with."""
    with pytest.MonkeyPatch.context() as patch:
        arguments: dict = {}
        patch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


@pytest.fixture(scope="module")
def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonical(r.name): r for r in parsed}


def names(requirements: list[str]) -> set[str]:
    return {canonical(Requirement(r).name) for r in requirements}


def test_everything_imported_is_declared(declared: dict) -> None:
    """A package that only happened to be installed with another one was missing on the next machine."""
    imported = set()
    for path in (ROOT / "ra3_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported.add(node.module.split(".")[0])
    imported -= {*sys.stdlib_module_names, "ra3_megatron"}
    known = names(declared["install_requires"]) | {n for e in declared["extras_require"].values() for n in names(e)}
    distributions = importlib.metadata.packages_distributions()
    for module in sorted(imported):
        owners = {canonical(d) for d in distributions.get(module, [module])}
        if module == "megatron":
            owners = {"megatron-core"}
        assert owners & known, f"{module} ({', '.join(owners)}) is imported but not in setup.py"


def test_everything_declared_is_pinned(declared: dict, pins: dict[str, Requirement]) -> None:
    """A fresh install took a newer release than the one that was tested."""
    for requirement in map(Requirement, declared["install_requires"] + declared["extras_require"]["dev"]):
        pin = pins[canonical(requirement.name)]
        [specifier] = pin.specifier
        assert specifier.operator == "=="
        assert specifier.version in requirement.specifier, f"{pin} does not satisfy {requirement}"


def test_apex_is_never_a_dependency(declared: dict, pins: dict[str, Requirement]) -> None:
    """The registry's apex is a package of another kind that breaks megatron-core."""
    for requirements in (declared["install_requires"], *declared["extras_require"].values()):
        assert "apex" not in names(requirements)
    assert str(pins["apex"].specifier) == "<0"


def test_every_package_and_template_is_shipped(declared: dict) -> None:
    """A folder without __init__.py, or a template, was in the checkout and not in the wheel."""
    package = ROOT / "ra3_megatron"
    with_code = {p.parent.relative_to(ROOT) for p in package.rglob("*.py")}
    assert {".".join(p.parts) for p in with_code} == set(declared["packages"])
    patterns = declared["package_data"]["ra3_megatron"]
    for path in package.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            place = path.relative_to(package)
            assert (
                any(place.full_match(p) for p in patterns)
                if sys.version_info >= (3, 13)
                else any(place.match(p.removeprefix("**/")) for p in patterns)
            ), place


def test_entry_point_leads_to_the_command(declared: dict) -> None:
    """The console script named a function that had moved."""
    [script] = declared["entry_points"]["console_scripts"]
    name, target = script.split("=")
    module, function = target.split(":")
    assert name == "ra3"
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_old_python_is_told_what_to_do() -> None:
    """On Python 3.11 pip quietly took megatron-core 0.16, whose results are wrong."""
    code = f"import sys, runpy; sys.version_info = (3, 11, 7); runpy.run_path({str(ROOT / 'setup.py')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "needs Python 3.12 or newer" in done.stderr
    assert "Traceback" not in done.stderr


def find_python(path: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", str(ROOT / "tools" / "find_python.sh")],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": str(path), "HOME": "/nonexistent", **extra},
        check=False,
    )


def fake(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH with `cat` and nothing else."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cat").symlink_to("/bin/cat")
    return tmp_path / "bin"


def test_shims_that_fail_are_passed_over(tools: Path) -> None:
    """pyenv's shim for a version that is not selected was taken for a Python."""
    fake(tools / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    fake(tools / "python3", f'exec {sys.executable} "$@"')
    done = find_python(tools)
    assert done.returncode == 0, done.stderr
    assert os.access(done.stdout.strip(), os.X_OK)


def test_python_under_pyenv_is_found(tools: Path, tmp_path: Path) -> None:
    """A machine whose only 3.12 lies under pyenv was told to install one."""
    fake(tmp_path / "pyenv/versions/3.12.9/bin/python", f'exec {sys.executable} "$@"')
    assert find_python(tools, PYENV_ROOT=str(tmp_path / "pyenv")).returncode == 0


def test_no_python_says_what_to_install(tools: Path) -> None:
    """`make` ended with 'python3.12: not found'."""
    done = find_python(tools)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python 3.12 or newer")
    assert done.stdout == ""


def test_asked_for_python_is_checked(tools: Path) -> None:
    """A wrong PYTHON= failed in the middle of the install."""
    fake(tools / "old", "exit 1")
    done = find_python(tools, PYTHON=str(tools / "old"))
    assert done.returncode == 2
    assert str(tools / "old") in done.stderr
