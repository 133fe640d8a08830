"""The wheel: built once from a copy of the sources, installed where only the wheel's own fewstep can be seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGES = ("samplers", "metrics", "distill", "app", "configs")
# a user's own folder: its app.py and metrics.py are what `import app` and `import metrics` must give
SCRIPT = """
import app, metrics
assert (app.NAME, metrics.NAME) == ("my app", "my metrics")

import sys
from importlib.resources import files
import fewstep.app, fewstep.distill, fewstep.metrics, fewstep.samplers
from fewstep.metrics.emoji.drawings import SHEET

home = sys.prefix
for package in (fewstep.app, fewstep.distill, fewstep.metrics, fewstep.samplers):
    assert package.__file__.startswith(home), package.__file__
assert str(SHEET).startswith(home) and SHEET.is_file(), SHEET
print(files("fewstep.configs").joinpath("teachers/emoji.yaml").read_text())
"""


def run(*command: str | Path, cwd: Path, silent: bool = False) -> str:
    """What the command printed; its own words if it fails, or if it should say nothing beside."""
    # a PYTHONPATH of the caller's would lead past the wheel
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (silent and done.stderr), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: the build folder of an earlier build would add its files."""
    copy = tmp_path_factory.mktemp("sources")
    for name in PACKAGES:
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(root / name, copy)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "-w", "dist", ".", cwd=copy)
    return next((copy / "dist").glob("fewstep-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a clean environment with the wheel, which borrows the libraries of the running one."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*install, wheel, cwd=home)
    paths = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    # hooks of editable installs are .pth files, and a folder named by a .pth file has its own ignored
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    Path(purelib, "borrowed.pth").write_text("\n".join(dict.fromkeys(paths)) + "\n")
    return home / "bin"


def test_the_wheel_holds_every_module_config_and_asset(root: Path, wheel: Path):
    """And nothing else: a package or an ending that pyproject.toml forgets shows here."""
    kept = {
        f"fewstep/{path.relative_to(root)}"
        for name in PACKAGES
        for path in (root / name).rglob("*")
        if path.is_file() and (path.suffix in {".py", ".yaml"} or "assets" in path.parts)
    }
    found = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == kept


def test_the_wheel_carries_its_licences(wheel: Path):
    with ZipFile(wheel) as archive:
        texts = {Path(n).name: archive.read(n).decode() for n in archive.namelist() if "/licenses/" in n}
    assert "Apache License" in texts["LICENSE"]
    assert "Noto Emoji" in texts["NOTICE"]


def test_works_beside_a_users_own_app_and_metrics(root: Path, installed: Path, tmp_path: Path):
    (tmp_path / "app.py").write_text('NAME = "my app"\n')
    (tmp_path / "metrics.py").write_text('NAME = "my metrics"\n')
    (tmp_path / "script.py").write_text(SCRIPT)
    config = run(installed / "python", "script.py", cwd=tmp_path)
    assert config.strip() == (root / "configs/teachers/emoji.yaml").read_text().strip()


def test_the_command_finds_a_shipped_config_by_name(installed: Path, tmp_path: Path):
    """From an empty folder, with no network: the config, the teacher and the images are in the wheel.

    And no library says a word: their bars and warnings are settings of the process, hence one of its own.
    """
    printed = run(installed / "fewstep", "train", "quickstart", "--dry-run", cwd=tmp_path, silent=True)
    assert "embedded:emoji" in printed
    assert not list(tmp_path.iterdir())


def test_constraints_pin_every_dependency_inside_its_range(root: Path):
    """`make` installs a set that pyproject.toml allows, and leaves none of what it names to the day."""
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = project["dependencies"] + extras["data"] + extras["test"] + extras["dev"]
    wanted = [Requirement(line) for line in named]
    unpinned = [
        str(want)
        for want in wanted
        if (name := canonicalize_name(want.name)) != "fewstep"
        and (name not in pins or not want.specifier.contains(pins[name]))
    ]
    assert not unpinned
