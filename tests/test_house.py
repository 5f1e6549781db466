"""The house is as docs/design.md draws it, and its files are written as its style asks."""

import ast
import itertools
import re
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "framework/kvsieve/"
SOURCES = sorted(itertools.chain(*((ROOT / top).rglob("*.py") for top in ("framework", "policies"))))


# ---------------------------------------------------------------- the tree in docs/design.md
ENTRY = re.compile(r"[\w./{},]+(?:\.py|/)")
MENTION = re.compile(r"(?<![\w/.])[\w/]+(?:\.py|/)(?=[\s,;:)]|$)")


def drawn(document: str) -> tuple[set[str], set[tuple[str, str]]]:
    """Paths that the tree of "## The house" names, and (folder, name) for the names in its descriptions.

    A line is one or several names (`a.py`, `folder/`, `hf/{load,save}.py`) and a description; indented lines
    belong to the folder above.
    """
    tree = document.partition("## The house")[2].split("```")[1]
    paths, mentions, parents = set(), set(), [(-1, "")]
    for line in filter(str.strip, tree.splitlines()):
        words = line.split()
        names = list(itertools.takewhile(ENTRY.fullmatch, words))
        indent = len(line) - len(line.lstrip())
        while names and parents[-1][0] >= indent:
            parents.pop()
        parent = parents[-1][1]
        paths |= {parent + path for name in names for path in expanded(name)}
        if len(names) == 1 and names[0].endswith("/"):
            parents.append((indent, parent + names[0]))
        description = " ".join(words[len(names) :])
        mentions |= {(parents[-1][1], name) for name in MENTION.findall(description)}
    return paths, mentions


def expanded(name: str) -> list[str]:
    """`a/{b,c}.py` as a/b.py and a/c.py."""
    before, brace, rest = name.partition("{")
    inside, _, after = rest.partition("}")
    return [before + one + after for one in inside.split(",")] if brace else [name]


def folders(path: str) -> set[str]:
    return {f"{parent}/" for parent in PurePath(path).parents if str(parent) != "."}


def differences(document: str, files: set[str]) -> list[str]:
    """Say what the tree names but `files` (from the root) lack, and what of the package it leaves out."""
    paths, mentions = drawn(document)
    there = files.union(*map(folders, files))
    found = [f"{path} does not exist" for path in paths - there]
    found += [
        f"{folder}: {name} does not exist"
        for folder, name in mentions
        if not {folder + name, PACKAGE + name, name} & there
    ]
    # A folder's line stands for all that is in it, unless some of that has lines of its own.
    divided = set().union(*map(folders, paths))
    modules = {file for file in files if file.endswith(".py") and not PurePath(file).name.startswith("__")}
    for item in modules.union(*map(folders, modules)) - paths.union(*map(folders, paths)):
        if item.startswith(PACKAGE) and f"{PurePath(item).parent}/" in divided:
            found.append(f"{item} is not in the tree")
    return sorted(found)


def test_the_tree_in_the_design_names_what_there_is():
    tops = (
        ROOT / top for top in ("framework", "policies", "tests", "configs", "benchmarks", "examples", "docs")
    )
    paths = itertools.chain(*(top.rglob("*") for top in tops))
    files = {path.relative_to(ROOT).as_posix() for path in paths if path.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    assert differences((ROOT / "docs" / "design.md").read_text(), files) == []


TREE = """\
## The house

```
framework/kvsieve/        import kvsieve
    policy.py  loop.py    the contract; the loop, which uses ops/
    cache/{slots,kv}.py   storage
    ops/                  reference.py, triton/
    compare/              the harness:
        run.py            one cell after the other
```
"""
MODULES = [
    "policy.py",
    "loop.py",
    "cache/slots.py",
    "cache/kv.py",
    "ops/reference.py",
    "ops/triton/attend.py",
    "compare/run.py",
]


@pytest.mark.parametrize(
    ("gone", "new", "found"),
    [
        ("", "", []),
        ("", "ops/cpu.py", []),  # its folder's line stands for it
        ("", "compare/__main__.py", []),
        ("loop.py", "", ["framework/kvsieve/loop.py does not exist"]),
        ("cache/kv.py", "", ["framework/kvsieve/cache/kv.py does not exist"]),
        ("ops/reference.py", "", ["framework/kvsieve/ops/: reference.py does not exist"]),
        ("", "plan.py", ["framework/kvsieve/plan.py is not in the tree"]),
        ("", "plans/a.py", ["framework/kvsieve/plans/ is not in the tree"]),
        ("", "cache/layer.py", ["framework/kvsieve/cache/layer.py is not in the tree"]),
        ("", "compare/store.py", ["framework/kvsieve/compare/store.py is not in the tree"]),
    ],
)
def test_a_difference_between_the_tree_and_the_folders_is_found(gone, new, found):
    files = {PACKAGE + name for name in {*MODULES, new} - {gone, ""}}
    assert differences(TREE, files) == found


# ---------------------------------------------------------------- English
CLUMSY = re.compile(r"(?:What|How|As)\b")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_docstring_opens_with_its_subject_or_verb(source):
    """Neither "What ...", "How ..." nor "As ...": a sentence that a reader need not turn round."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    found = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, documented)]
    openings = [(getattr(node, "name", source.stem), ast.get_docstring(node) or "") for node in found]
    assert [name for name, opening in openings if CLUMSY.match(opening)] == []


WRAPPED = re.compile(
    r"^\s*[])}]+[:,]*  # (?!noqa|fmt|type:).*"  # `)  # a comment`
    r"|.*[=\s]\(\n\s+.*[^,\n]  # .*\n\s*\)$",  # `x = (`, a value with its comment, `)`
    re.MULTILINE,
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_comment_made_the_formatter_wrap_its_line(source):
    """A comment that did not fit behind a value belongs on the line above it."""
    assert [match[0] for match in WRAPPED.finditer(source.read_text())] == []
