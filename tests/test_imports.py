"""Who may import whom (docs/design.md), read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "framework" / "kvsieve"


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, also inside functions; not those for type checking only."""
    package = (
        path.relative_to(PACKAGE.parent).with_suffix("").parts if PACKAGE in path.parents else (path.stem,)
    )
    if path.name == "__init__.py":
        package = (*package[:-1], "")
    names = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: -node.level]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def imports_of(*parts: str) -> set[str]:
    target = PACKAGE.joinpath(*parts)
    files = target.rglob("*.py") if target.is_dir() else [target.with_suffix(".py")]
    return set().union(*(imported(file) for file in files))


def touches(names: set[str], module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name in names)


def test_policies_use_public_names_only():
    import kvsieve

    for file in (ROOT / "policies" / "kvsieve_policies").glob("*.py"):
        for name in imported(file):
            if touches({name}, "kvsieve"):
                top = name.split(".")[1] if "." in name else None
                assert top is None or top in kvsieve.__all__ or top in {"hooks"}, (
                    f"{file.name} imports {name}"
                )


def test_the_framework_never_imports_the_policies():
    for file in PACKAGE.rglob("*.py"):
        assert not touches(imported(file), "kvsieve_policies"), file


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("policy", ["layer", "cache", "ops", "attention", "loop", "models", "compare", "bench", "plugins"]),
        ("ops", ["layer", "cache", "attention", "loop", "models", "compare", "bench", "plugins"]),
        ("layer", ["cache", "attention", "loop", "models", "compare", "bench", "plugins"]),
        ("transfer", ["layer", "cache", "ops", "attention", "loop", "models", "compare", "bench"]),
        ("cache", ["attention", "loop", "models", "compare", "bench", "plugins"]),
        ("attention", ["loop", "models", "compare", "bench", "plugins"]),
        ("loop", ["models", "compare", "bench", "plugins"]),
        ("models", ["loop", "compare", "bench"]),
        ("testing", ["loop", "models", "compare", "bench"]),
    ],
)
def test_what_is_below_does_not_import_what_is_above(low, high):
    names = imports_of(low)
    for module in high:
        assert not touches(names, f"kvsieve.{module}"), f"{low} imports {module}"


def test_the_reference_and_the_kernels_do_not_know_each_other():
    assert not touches(imports_of("ops", "reference"), "kvsieve.ops.triton")
    assert not touches(imports_of("ops", "triton"), "kvsieve.ops.reference")
    assert not touches(imports_of("ops", "triton"), "kvsieve.ops.cpu")


def test_the_walk_sees_imports():
    assert touches(imports_of("loop"), "kvsieve.cache")
    assert touches(imports_of("attention"), "kvsieve.ops")
