"""What is counted: plain functions, shared by the tasks and by the loop that checks them."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
NOT_STANDARD = {"site-packages", "dist-packages"}
COUNTED = ("lines", "functions", "classes", "imports", "unparsable")
KINDS: dict[type[ast.AST], str] = {
    ast.FunctionDef: "functions",
    ast.AsyncFunctionDef: "functions",
    ast.ClassDef: "classes",
    ast.Import: "imports",
    ast.ImportFrom: "imports",
}


def source_files() -> list[str]:
    """Every Python file of the running interpreter's standard library, relative to it."""
    paths = (path.relative_to(STANDARD_LIBRARY) for path in STANDARD_LIBRARY.rglob("*.py"))
    return sorted(str(path) for path in paths if not NOT_STANDARD.intersection(path.parts))


def count_file(path: str) -> Figures:
    """The figures of one file; a file that is no valid Python (tests have some) is unparsable."""
    source = (STANDARD_LIBRARY / path).read_bytes()
    figures = {"path": path, **dict.fromkeys(COUNTED, 0), "lines": len(source.splitlines())}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        figures["unparsable"] = 1
        return figures
    for node in ast.walk(tree):
        if kind := KINDS.get(type(node)):
            figures[kind] += 1
    return figures


def merge_figures(parts: Iterable[Figures]) -> Figures:
    """One report: totals, and the same for each top-level package or module."""
    total: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
    packages: dict[str, Counter[str]] = {}
    times_seen: Counter[str] = Counter()
    for part in parts:
        figures = {name: part[name] for name in COUNTED}
        package = Path(part["path"]).parts[0].removesuffix(".py")
        total.update(figures)
        packages.setdefault(package, Counter()).update({"files": 1, **figures})
        times_seen[part["path"]] += 1
    return {
        "files": times_seen.total(),
        "distinct files": len(times_seen),
        **total,
        "packages": {name: dict(figures) for name, figures in sorted(packages.items())},
    }
