"""The register of vLLM names against a tree of vLLM's sources: read, never imported, so any version can be checked.

``python -m vllm_jdlora.serving.touchpoint_sources DIR…``, where DIR holds the package ``vllm`` (an unpacked wheel or
sdist, site-packages, a checkout). The check of a running vLLM is :func:`.touchpoints.check`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.touchpoints import REGISTER, Touchpoint

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Found = tuple["_Module", ast.stmt]


def check_sources(root: Path, register: Sequence[Touchpoint] = REGISTER) -> list[str]:
    """Every difference between the register and the sources below ``root``, one sentence each; empty if it fits.

    Raises:
        JDLoRAError: there is no package ``vllm`` in ``root``, or a file of it is not Python.
    """
    if not (root / "vllm" / "__init__.py").is_file():
        raise JDLoRAError(f"{root}: no package vllm in it; give the folder that vllm/ lies in")
    sources = _Sources(root)
    return [difference for point in register if (difference := _difference(sources, point))]


class _Sources:
    """Modules by import path, parsed once."""

    def __init__(self, root: Path):
        self._root = root
        self._modules: dict[str, _Module | None] = {}

    def module(self, name: str) -> _Module | None:
        if name not in self._modules:
            base = self._root.joinpath(*name.split("."))
            file = next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)
            self._modules[name] = None if file is None else _Module(self, name, file)
        return self._modules[name]


class _Module:
    """What one file defines, and what it takes from others."""

    def __init__(self, sources: _Sources, name: str, file: Path):
        self._sources = sources
        self._package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        try:
            body = ast.parse(file.read_text(encoding="utf-8")).body
        except (SyntaxError, UnicodeDecodeError) as error:
            raise JDLoRAError(f"{file}: not readable as Python ({error})") from error
        self._defined: dict[str, ast.stmt] = {}
        self._imported: dict[str, tuple[str, str]] = {}
        for statement in _statements(body):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    self._imported[alias.asname or alias.name] = (self._absolute(statement), alias.name)
            for defined in _names_of(statement):
                self._defined.setdefault(defined, statement)

    def find(self, path: str) -> _Found | None:
        """The definition of ``Class.method``, ``function`` or ``NAME``, here, where it comes from, or inherited."""
        first, _, rest = path.partition(".")
        if first in self._defined:
            found: _Found | None = (self, self._defined[first])
        elif first in self._imported:
            origin, name = self._imported[first]
            module = self._sources.module(origin)
            found = module.find(name) if module is not None else None
        else:
            found = None
        if found is None or not rest:
            return found
        module, definition = found
        return module.member(definition, rest) if isinstance(definition, ast.ClassDef) else None

    def member(self, owner: ast.ClassDef, name: str) -> _Found | None:
        """A class's own attribute, or the first that a base class has."""
        for statement in _statements(owner.body):
            if name in _names_of(statement):
                return self, statement
        for module, base in self.bases(owner):
            if (found := module.member(base, name)) is not None:
                return found
        return None

    def bases(self, owner: ast.ClassDef) -> Iterator[tuple[_Module, ast.ClassDef]]:
        """Base classes that are defined in these sources."""
        for base in owner.bases:
            found = self.find(ast.unparse(base).partition("[")[0])
            if found is not None and isinstance(found[1], ast.ClassDef):
                yield found[0], found[1]

    def _absolute(self, statement: ast.ImportFrom) -> str:
        if statement.level == 0:
            return statement.module or ""
        package = self._package.split(".")
        parts = package[: len(package) - statement.level + 1]
        return ".".join([*parts, statement.module] if statement.module else parts)


def _difference(sources: _Sources, point: Touchpoint) -> str | None:
    module = sources.module(point.module)
    found = module.find(point.name) if module is not None else None
    if found is None:
        return f"{point.module}.{point.name} is missing"
    where, definition = found
    mentioned = set(_mentioned(definition))
    if missing := [name for name in point.uses if name not in mentioned]:
        return f"{point.module}.{point.name} no longer uses {', '.join(missing)}"
    if point.parameters:
        present = list(_parameters(where, definition))
        if [name for name in present if name in point.parameters] != list(point.parameters):
            return f"{point.module}.{point.name} takes ({', '.join(present)}), not ({', '.join(point.parameters)})"
    return None


def _parameters(module: _Module, definition: ast.stmt) -> Iterator[str]:
    """Of a function, without ``cls``; of a class what it is made with: ``__init__``, or annotated fields."""
    if isinstance(definition, _FUNCTIONS):
        arguments = definition.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        bound = any(ast.unparse(d) == "classmethod" for d in definition.decorator_list)
        yield from names[1:] if bound else names
    elif isinstance(definition, ast.ClassDef):
        made = module.member(definition, "__init__")
        if made is not None:
            yield from list(_parameters(*made))[1:]
            return
        for origin, base in module.bases(definition):
            yield from _parameters(origin, base)
        yield from (
            s.target.id for s in definition.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
        )


def _mentioned(definition: ast.stmt) -> Iterator[str]:
    for node in ast.walk(definition):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, those under ``if`` and ``try`` as well."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try)):
                yield from _statements(getattr(statement, part, []))
        if isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from _statements(handler.body)


def _names_of(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, ast.AnnAssign):
        return [statement.target.id] if isinstance(statement.target, ast.Name) else []
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return []


def main(folders: Sequence[str]) -> int:
    """Print what differs in each folder; 0 if nothing does, 1 if something, 2 without folders or sources."""
    if not folders:
        print("usage: python -m vllm_jdlora.serving.touchpoint_sources DIR…", file=sys.stderr)
        return 2
    differing = False
    for folder in folders:
        try:
            differences = check_sources(Path(folder))
        except JDLoRAError as error:
            print(error, file=sys.stderr)
            return 2
        differing |= bool(differences)
        for difference in differences or [f"all {len(REGISTER)} names are as the register says"]:
            print(f"{folder}: {difference}")
    return int(differing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
