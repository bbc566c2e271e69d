"""English prose that every Python has: the docstrings of its standard library, and the language reference that `help` shows.

Much more text than the documents that ship with sparsesearch (about 20,000 different sentences), for what needs many tokens and no
particular ones. It belongs to the Python that runs: another minor version words some of it differently.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}


@cache
def stdlib_documents() -> tuple[str, ...]:
    """One text per module that has docstrings and per topic of the reference, in the order of their names; tests are left out."""
    from pydoc_data.topics import topics  # a literal of 0.7 MB, for those who ask

    root = Path(sysconfig.get_path("stdlib"))
    files = (file for file in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(file.relative_to(root).parts))
    found = ["\n\n".join(_docstrings(file)) for file in files]
    return tuple(text for text in (*found, *(topics[name] for name in sorted(topics))) if text)


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules escape what need not be escaped
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates that only look like Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
