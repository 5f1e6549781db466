"""The table of docs/models.md, made from the list that the tests run over.

python tests/families/table.py            print it
python tests/families/table.py --write    put it into docs/models.md
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.families.test_refusals import REFUSED
from tests.families.zoo import FAMILIES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- made by tests/families/table.py: do not edit -->\n", "<!-- end of what is made -->\n"

# By a word of what the refusal says.
WHY = {
    "latent": "latent attention (MLA)",
    "head_dim": "heads of different sizes in its layers",
    "inside the model": "no attention interface: attention is inside the model",
}


def table() -> str:
    """Both tables, in Markdown."""
    rows = [
        "| family | configuration | known as | beyond ordinary attention | a policy acts on |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        acts = "the layers that see the whole context"
        if len(family.policy_layers) == family.layers:
            acts = "every layer"
        elif family.in_windows:
            acts = "every layer, with `inside_windows`"
        rows.append(
            f"| {family.name} | `{family.config}` | {family.known} | {family.special or '-'} | {acts} |"
        )
    refused = ["| family | configuration | why |", "|---|---|---|"]
    for name, (config, _, reason) in REFUSED.items():
        why = next(why for word, why in WHY.items() if word in reason)
        refused.append(f"| {name} | `{config}` | {why} |")
    return "\n".join([*rows, "", "Refused, with the reason, before any weight is read:", "", *refused, ""])


def with_table(document: str) -> str:
    """The document with the table between its marks replaced."""
    before, rest = document.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
    else:
        print(table())
