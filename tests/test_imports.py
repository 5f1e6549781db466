"""Who may import whom (docs/design.md), read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "framework" / "kvsieve"


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, also inside functions; not those for type checking
    only.
    """
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


# Low to high: a module imports, beside its own folder, only what stands above it in this list. (`cache.` is
# the part of cache/ that knows no policy; types for annotations alone do not count.)
ORDER = [
    "errors",
    "arguments hooks",
    "processes",
    "corpus",
    "user_files values",
    "reference_model",
    "ops",
    "transfer",
    "cache.columns cache.layouts cache.packing cache.slots cache.traffic cache.forward cache.rotary",
    "cache.new_tokens cache.prompt cache.kv",
    "policy",
    "wrapper",
    "contract",
    "cache.layer cache.watch cache.windows cache.kv_cache",
    "attention",
    "hf",
    "graph",
    "token_tables",
    "prompts sampling",
    "plans",
    "reading",
    "recording",
    "loop",
    "scoring",
    "fingerprint calibration diagnostics",
    "entry_points registration",
    "plugins",
    "entries",
    "specs",
    "compare",
    "reference_model.card reference_model.data reference_model.exams reference_model.retrieval"
    " reference_model.tokenizer reference_model.train reference_model.words reference_model.calibrations",
    "testing",
    "lm_eval",
    "bench",
    "listing streaming",
    "cli",
]
RANK = {f"kvsieve.{module}": rank for rank, line in enumerate(ORDER) for module in line.split()}
NO_ROOM = {"kvsieve", "kvsieve.cache", "kvsieve.__main__"}  # doors: they only hand on


def room(name: str) -> str | None:
    """The entry of ORDER that a module belongs to; None for what is outside of the framework, or a door."""
    found = [known for known in RANK if touches({name}, known)]
    return max(found, key=len, default=None)


def modules() -> dict[str, Path]:
    return {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file
        for file in PACKAGE.rglob("*.py")
    }


def test_every_module_has_its_place_in_the_order():
    lost = {name.removesuffix(".__init__") for name in modules() if room(name) is None}
    assert lost == NO_ROOM
    assert all((PACKAGE / known.removeprefix("kvsieve.").replace(".", "/")).exists()
               or (PACKAGE / (known.removeprefix("kvsieve.").replace(".", "/") + ".py")).exists()
               for known in RANK)  # fmt: skip


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_what_is_below(name):
    here = room(name)
    for other in imported(modules()[name]):
        there = room(other)
        if here and there and there != here:
            assert RANK[there] <= RANK[here], (
                f"{name} imports {other}: {there} stands above {here} in the order"
            )


def test_the_reference_and_the_kernels_do_not_know_each_other():
    assert not touches(imports_of("ops", "reference"), "kvsieve.ops.triton")
    assert not touches(imports_of("ops", "triton"), "kvsieve.ops.reference")
    assert not touches(imports_of("ops", "triton"), "kvsieve.ops.cpu")


def test_the_walk_sees_imports():
    assert touches(imports_of("loop"), "kvsieve.cache")
    assert touches(imports_of("attention"), "kvsieve.ops")
