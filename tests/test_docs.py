"""The documents hold what they include, link to what exists, and show code that runs.

`python -m tests.test_docs` writes the included files anew.
"""

import ast
import csv
import doctest
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import kvsieve
from kvsieve.compare.results import Row, bytes_range

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
INCLUDE = re.compile(r"(<!-- include: (\S+)[^\n]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)
# A fenced block, and the reason why it is not run: <!-- not run: REASON --> on the line above.
PYTHON = re.compile(r"(?:<!-- not run: (.+?) -->\n)?```python\n(.*?)```", re.DOTALL)
names = [document.name for document in DOCUMENTS]


def with_includes(text: str) -> str:
    def fresh(match: re.Match[str]) -> str:
        path = ROOT / match[2]
        tables = {".csv": by_policy, ".json": times_faster}
        content = tables[path.suffix](path) if path.suffix in tables else path.read_text().rstrip("\n") + "\n"
        if path.suffix == ".py":
            content = f"```python\n{content}```\n"
        return match[1] + content + match[4]

    return INCLUDE.sub(fresh, text)


def by_policy(summary: Path) -> str:
    """summary.csv with a line per policy and a column per task and context.

    A line is named as the harness names it, without the parameters of a policy within; where no budget was
    asked for, by those parameters in which a policy's lines differ.
    """
    table: dict[str, dict[str, str]] = {}
    measured: dict[str, list[Row]] = {}
    with summary.open() as file:
        rows = list(csv.DictReader(file))
        for row in rows:
            others = [set(other["parameters"].split()) for other in rows if other["policy"] == row["policy"]]
            differ = [
                part for part in row["parameters"].split() if not all(part in other for other in others)
            ]
            label = f"{row['policy']} {' '.join(differ)}".strip()
            if row.get("budget") or row.get("compression"):  # its name at first
                label = re.sub(r"\(.*\)", "", row["policy_label"])
            cells = table.setdefault(label, {})
            measured.setdefault(label, []).append(Row.parse(row))
            cells["bytes read"] = bytes_range(measured[label])
            cells[f"{row['task']} {row['context']}"] = f"{float(row['score']):.3g}"
    return in_markdown("policy", table)


def times_faster(run: Path) -> str:
    """A file of `kvsieve bench`: by batch and context, how many times faster than the best dense attention.

    Under the table stands, where it is so, that the machine was too busy for its numbers to be quoted.
    """
    table: dict[str, dict[str, str]] = {"best dense": {}}
    found = json.loads(run.read_text())
    for cell in found["cells"]:
        column = f"B={cell['batch']}, {cell['context'] // 1024} k"
        table["best dense"][column] = f"{cell['best_dense']['seconds']['median'] * 1e3:.1f} ms"
        policies = [row["policy"] for row in cell["rows"]]
        for row in cell["rows"]:
            label = re.sub(r" (compression=1/8|\w+=.*)", "", row["policy"])
            label += f" {inner[1]}" if (inner := re.search(r"inner=(\w+)", row["policy"])) else ""
            label += f" `{row['layout']}`" if policies.count(row["policy"]) > 1 else ""
            table.setdefault(label, {})[column] = f"{row['speedup']:.2f}x"
    why = found["not_to_be_quoted"]
    return in_markdown("", table) + (f"\nNot to be quoted: {why}.\n" if why else "")


def in_markdown(corner: str, table: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    lines = [[corner, *columns], ["---", *("---:" for _ in columns)]]
    lines += [[name, *(cells.get(column, "") for column in columns)] for name, cells in table.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def blocks(language: str) -> list[tuple[str, str]]:
    """(document, code) of every fenced block in this language that is not an included file."""
    found = []
    for document in DOCUMENTS:
        text = INCLUDE.sub("", document.read_text())
        found += [(document.name, code) for code in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_included_files_are_fresh(document):
    assert document.read_text() == with_includes(document.read_text()), "run: python -m tests.test_docs"


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_public_name_is_in_the_documents():
    text = "".join(document.read_text() for document in DOCUMENTS)
    public = {*kvsieve.__all__, *kvsieve.testing.__all__}
    assert {name for name in public if not re.search(rf"\b{name}\b", text)} == set()


@pytest.fixture(scope="module")
def space():
    """Names that examples use without defining them; each document or docstring gets a copy."""
    return {
        **{name: getattr(kvsieve, name) for name in kvsieve.__all__},
        "kvsieve": kvsieve,
        "model": kvsieve.load("reference", device="cpu"),
        "policy": kvsieve.make_policy("sparq", r=8, k=64, local=16),
        "prompts": [kvsieve.corpus.held_out_text()[:200], "def main("],
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_the_python_of_a_document_runs(document, space, capsys):
    """In order, as a reader would: each block may use what the ones before it made."""
    space = dict(space)
    for reason, code in PYTHON.findall(INCLUDE.sub("", document.read_text())):
        if not reason:
            exec(compile(code, document.name, "exec"), space)
    if document.name == "policy.md":
        prompts = [kvsieve.corpus.held_out_text()[:2500], "def main("]  # in one segment each
        for kind in (space["LastWordsVote"], space["AsksOften"]):
            cache = kvsieve.KVCache(model := space["model"], kind())
            assert len([*kvsieve.decode(model, prompts, cache=cache, max_new_tokens=3)]) == 3
            assert cache.slots_by_row()[0] < 550
    if document.name == "README.md":
        ratio = re.search(r"(0\.\d+) of dense attention's bytes", capsys.readouterr().out)
        assert float(ratio[1]) < 0.15


def docstrings_with_examples():
    """(module, docstring) of every docstring that shows what a call returns."""
    for root, file in [
        (top, file) for top in ("framework", "policies") for file in (ROOT / top).rglob("*.py")
    ]:
        module = ".".join(file.relative_to(ROOT / root).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if ">>>" in text:
                    yield pytest.param(module, text, id=f"{module}.{getattr(node, 'name', '')}".strip("."))


@pytest.mark.parametrize(("module", "docstring"), list(docstrings_with_examples()))
def test_the_examples_of_a_docstring_give_what_they_show(module, docstring, space):
    names = {**vars(importlib.import_module(module)), **space}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    example = doctest.DocTestParser().get_doctest(docstring, names, module, None, None)
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=flags).run(example, out=said.append).failed
    assert not failed, "".join(said)


def test_shown_commands_exist():
    from typer.main import get_command

    from kvsieve.cli import app

    shown = get_command(app)
    lines = [line for _, code in blocks("console") for line in code.splitlines() if line.startswith("$ ")]
    assert any("kvsieve compare" in line for line in lines)
    for line in lines:
        words = shlex.split(line[2:], comments=True)
        if words[0] == "kvsieve":
            assert words[1] in shown.commands, line
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


def test_shown_yaml_is_a_comparison(tmp_path):
    from kvsieve import UserError
    from kvsieve.compare import config

    for document, code in blocks("yaml"):
        if "policies:" in code and "model:" in code:
            path = tmp_path / "shown.yaml"
            path.write_text(code)
            try:
                config.load(path, trust_task_code=True)
            except UserError as error:
                pytest.fail(f"{document}: {error}")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_configs_are_valid(path):
    from kvsieve import UserError
    from kvsieve.compare import config

    try:
        config.load(path)
    except (
        UserError
    ) as error:  # a policy of a package that is not installed here may be missing, nothing else
        assert "key_norm" in str(error), error
        assert path.name == "my_policy.yaml"


def test_nothing_names_the_machine_it_was_written_on():
    private = re.compile(r"/(?:home|root|work|Users)/\w")
    for folder in ("framework", "policies", "tests", "docs", "configs", "examples", "benchmarks"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in {".py", ".md", ".yaml", ".toml", ".json", ".csv"} and file != Path(__file__):
                assert not private.search(file.read_text(errors="ignore")), file


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(with_includes(document.read_text()))
        sys.stdout.write(f"{document.relative_to(ROOT)}\n")
