"""configs/schema.json: what the classes say today, and what an editor makes of it."""

import json
from pathlib import Path

import pytest
import yaml

from kvsieve import plugins
from kvsieve.compare.schema import schema

CONFIGS = Path(__file__).parents[2] / "configs"


def built_in(found):
    return [one for one in found.values() if one.distribution == "kvsieve"]


def test_the_shipped_schema_is_fresh():
    made = schema(built_in(plugins.policies()), built_in(plugins.tasks()))
    shipped = json.loads((CONFIGS / "schema.json").read_text())
    assert shipped == json.loads(json.dumps(made)), "run: kvsieve schema > configs/schema.json"


def test_it_accepts_the_quickstart_and_refuses_what_is_wrong():
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json.loads((CONFIGS / "schema.json").read_text()))
    quickstart = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    assert list(check.iter_errors(quickstart)) == []
    for key, wrong in [
        ("policies", [{"sparq": {"rr": 3}}]),
        ("policies", [{"sparq": {"compression": "most"}}]),
        ("policies", ["dense_layers"]),
        ("tasks", ["nedle"]),
        ("seed", "x"),
    ]:
        assert list(check.iter_errors(quickstart | {key: wrong})), (key, wrong)
