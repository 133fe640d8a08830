"""The house: arrows of imports point down, heavy libraries are imported where used, the command line without torch."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# what each package may import of the project, itself apart; a name stands for all that is below it
ARROWS = {
    "samplers": (),
    "metrics": ("fewstep.samplers.compat",),
    "distill": ("fewstep.samplers", "fewstep.metrics"),
    "app": ("fewstep.distill", "fewstep.samplers", "fewstep.metrics", "fewstep.configs"),
    "configs": (),
}
# seconds each: imported inside the function that uses them
HEAVY = {
    "diffusers",
    "gradio",
    "open_clip",
    "peft",
    "timm",
    "torch_fidelity",
    "torchmetrics",
    "torchvision",
    "transformers",
}
TORCH_FREE = ["fewstep.app.main", "fewstep.distill.config"]  # and with it the package fewstep.distill

REFERENCE = re.compile(rf"fewstep\.({'|'.join(ARROWS)})(\.\w+)*(:\w+)?")

Import = tuple[str, int, bool]  # dotted name, line, runs when the module is imported


def imports(source: str, module: str) -> Iterator[Import]:
    """Imports of a module's source anywhere in it, and strings such as `fewstep.distill.methods.lcm:LCM` of its tables."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                yield from ((alias.name, node.lineno, at_import) for alias in node.names)
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:  # relative: `module` is the dotted name of the file, a package's without `.__init__`
                    base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
                # `from fewstep import distill` is an arrow to fewstep.distill
                yield from ((f"{base}.{alias.name}", node.lineno, at_import) for alias in node.names)
            case ast.Constant(value=str(text)) if REFERENCE.fullmatch(text):
                yield text.partition(":")[0], node.lineno, False
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for child in node.body:
                    yield from walk(child, False)
                for child in node.orelse:
                    yield from walk(child, at_import)
            case _:
                inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                for child in ast.iter_child_nodes(node):
                    yield from walk(child, at_import and not inside)

    yield from walk(ast.parse(source), True)


def sources(root: Path, package: str) -> Iterator[tuple[str, list[Import]]]:
    """(path, imports) of every module of a top-level folder."""
    for path in sorted((root / package).rglob("*.py")):
        relative = path.relative_to(root)
        module = ".".join(["fewstep", *relative.with_suffix("").parts])
        yield str(relative), list(imports(path.read_text(), module))


def below(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == other or name.startswith(other + ".") for other in allowed)


def test_the_reader_of_imports():
    """What the other tests rest on, by example."""
    source = """
import a.b as c
from typing import TYPE_CHECKING
from . import near
from ..metrics.emoji import far
if TYPE_CHECKING:
    import d
else:
    import e
try:
    from f import g
except ImportError:
    pass
class Deferred:
    import h
    def method(self):
        from fewstep import distill
TABLE = {"SD": "fewstep.samplers.denoisers.sd:SD", "manifest": "fewstep.json"}
"""
    found = {(name, at_import) for name, _, at_import in imports(source, "fewstep.samplers.module")}
    assert found == {
        ("a.b", True),
        ("typing.TYPE_CHECKING", True),
        ("fewstep.samplers.near", True),
        ("fewstep.metrics.emoji.far", True),
        ("d", False),
        ("e", True),
        ("f.g", True),
        ("h", True),
        ("fewstep.distill", False),
        ("fewstep.samplers.denoisers.sd", False),
    }


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_point_down(root: Path, package: str):
    allowed = (f"fewstep.{package}", *ARROWS[package])
    wrong = [
        f"{path}:{line} imports {name}"
        for path, found in sources(root, package)
        for name, line, _ in found
        if name.split(".")[0] == "fewstep" and not below(name, allowed)
    ]
    assert not wrong


@pytest.mark.parametrize("package", ARROWS)
def test_heavy_libraries_are_imported_where_used(root: Path, package: str):
    wrong = [
        f"{path}:{line} imports {name} at module level"
        for path, found in sources(root, package)
        for name, line, at_import in found
        if at_import and name.split(".")[0] in HEAVY
    ]
    assert not wrong


def test_every_import_is_a_declared_dependency(root: Path):
    """What comes only with another library today may be gone tomorrow."""
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    providers = packages_distributions()
    wrong = [
        f"{path}:{line} imports {name}"
        for package in ARROWS
        for path, found in sources(root, package)
        for name, line, _ in found
        if (top := name.split(".")[0]) not in {"fewstep", *sys.stdlib_module_names}
        and not names & {canonicalize_name(provider) for provider in providers.get(top, [top])}
    ]
    assert not wrong


def test_importing_a_package_is_cheap(root: Path, fresh_python: Callable[..., str]):
    """Every package of the distribution together: nothing heavier than torch."""
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    loaded = fresh_python(f"import sys, {', '.join(packages)}; print(*sys.modules)").split()
    assert set(packages) <= set(loaded)
    assert not (HEAVY | {"accelerate", "pandas", "scipy", "torch.distributed.tensor"}) & set(loaded)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_command_line_and_the_config_models_import_no_torch(fresh_python: Callable[..., str], module: str):
    """`fewstep --help` and a refused config answer at once; torch alone takes a second."""
    loaded = set(fresh_python(f"import sys, {module}; print(*sys.modules)").split())
    assert module in loaded
    assert not (HEAVY | {"torch", "accelerate", "numpy"}) & loaded
