"""Samples in rounds: until the widest interval is narrow enough, the same ones whatever was there before."""

import pytest
import yaml

from kvsieve import UserError
from kvsieve.compare import config, results, rounds, samples
from kvsieve.compare.config import Until

TEXT = """\
    batch_size: 8
    tasks:
      - needle: {context: 80, samples: {width: 0.3, at_most: 24}}
      - perplexity: {context: 80, samples: 2, tokens: 2}
    policies: [dense, h2o: {tokens: 20}]
    """


def counts(outcome):
    return [(row.task, row.policy, row.samples) for row in outcome.rows]


def test_an_interval_is_narrowed_round_by_round(compare):
    # The tiny model answers nothing: nothing differs from dense, and intervals shrink with the number alone.
    outcome = compare(TEXT)
    row = outcome.rows[1]
    assert row.samples == row.pairs == 21  # 16 * (0.341 / 0.3) ** 2
    assert 0.25 < row.difference_high - row.difference_low < 0.3
    printed = compare.console.export_text()
    assert "needle 80: the widest interval is 0.341, and 0.3 is asked for: 5 samples more" in printed
    assert counts(outcome)[2:] == [("perplexity", "dense", 2), ("perplexity", "h2o", 2)]
    assert outcome.missing == 0


def test_a_run_that_stopped_in_a_round_ends_with_the_same_samples(compare, tmp_path):
    whole = compare(TEXT)
    lines = (whole.folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "samples.jsonl").write_text("".join(lines[:38]))  # in the second round
    again = compare(TEXT, out="stopped")
    assert counts(again) == counts(whole)
    assert [row.score for row in again.rows] == [row.score for row in whole.rows]


def test_samples_beyond_the_last_round_are_kept_and_do_not_count(compare):
    more = compare(TEXT.replace("{width: 0.3, at_most: 24}", "24"))
    stored = samples.read(more.folder / "samples.jsonl")
    outcome = compare(TEXT)
    assert samples.read(outcome.folder / "samples.jsonl") == stored
    assert [row.samples for row in outcome.rows] == [21, 21, 2, 2]


def test_a_policy_that_failed_does_not_keep_the_others_waiting(compare, monkeypatch):
    from kvsieve.compare.execute.cell import Measurement

    def batch(self, *arguments, measured=Measurement.batch):
        if self.cell.policy_name == "h2o":
            raise RuntimeError("no luck")
        return measured(self, *arguments)

    monkeypatch.setattr(Measurement, "batch", batch)
    outcome = compare(TEXT)
    assert len(outcome.failures) == 2
    # Without another policy the interval is that of dense's own score.
    assert [row.samples for row in outcome.rows if not row.error] == [16, 2]


@pytest.mark.parametrize(
    ("so_far", "width", "needed"),
    [(16, 0.05, 16), (16, 0.2, 32), (16, 0.06, 24), (400, 0.2, 512), (512, 0.2, 512), (32, 0.0, 32)],
)
def test_a_round_is_as_large_as_its_interval_asks_for(so_far, width, needed):
    assert rounds.more(so_far, width, Until(width=0.05, at_most=512)) == needed


def test_without_dense_the_scores_own_interval_counts():
    def row(policy, **values):
        given = {"model": "m", "task": "t", "task_parameters": {}, "context": 9, "metric": "", "chance": None,
                 "higher_is_better": True, "policy_label": policy, "parameters": "", "not_default": "",
                 "budget": ""}  # fmt: skip
        return results.Row(policy=policy, **given | values)

    alone = [row("a", score_low=0.1, score_high=0.4), row("b", score_low=0.2, score_high=0.25)]
    assert list(rounds.widest(alone).values()) == [pytest.approx(0.3)]
    paired = [row("dense", score_low=0.1, score_high=0.9),
              row("a", difference=0.0, difference_low=-0.1, difference_high=0.1),
              row("b", difference=0.0)]  # all equal  # fmt: skip
    assert list(rounds.widest(paired).values()) == [pytest.approx(0.2)]


def test_the_resolved_file_asks_for_the_same(load, tmp_path):
    found = load(TEXT)
    (tmp_path / "again.yaml").write_text(found.resolved())
    again = config.load(tmp_path / "again.yaml")
    assert again.rounds == found.rounds
    assert yaml.safe_load(found.resolved())["tasks"][0]["needle"]["samples"] == {"width": 0.3, "at_most": 24}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{width: 0.05}", "tasks.0.needle.samples: at_most is missing"),
        ("{width: 0, at_most: 9}", "tasks.0.needle.samples.width: must be a number above 0 (got 0)"),
        ("{width: 1, at_most: 9.5}", "tasks.0.needle.samples.at_most: must be an integer"),
        ("{width: 1, at_most: 9, most: 3}", "unknown key 'most'; did you mean 'at_most'"),
    ],
)
def test_mistakes_have_their_place(load, given, message):
    with pytest.raises(UserError) as caught:
        load(TEXT.replace("{width: 0.3, at_most: 24}", given))
    (line,) = str(caught.value).splitlines()
    assert message in line
