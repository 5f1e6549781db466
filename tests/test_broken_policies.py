"""Each law catches a policy that breaks it. Every policy here looks plausible; one law finds it out."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvsieve import Observe, Policy, Selection, Tail, ops, testing


@dataclass(frozen=True)
class Base(Policy):
    """Reads the `k` newest tokens; keeps everything."""

    k: int = 8
    name: ClassVar[str] = "broken"

    def select(self, query, kv):
        slots, counts = ops.top_slots(kv.positions.float(), kv, min(self.k, kv.slots_in_use))
        return Selection(slots, counts)


@dataclass(frozen=True)
class Evicting(Policy):
    """Keeps the `k` newest tokens."""

    k: int = 8
    name: ClassVar[str] = "broken"

    @property
    def keeps(self):
        return self.k

    def priority(self, kv):
        return kv.positions.float()


class ChoosesDeadSlots(Base):
    """The last slots of the tensor instead of the last live ones: wrong for short rows."""

    def select(self, query, kv):
        slots = torch.arange(kv.slots_in_use - self.k, kv.slots_in_use).expand(*kv.lengths.shape, -1)
        return Selection(slots.contiguous(), torch.full_like(kv.lengths, self.k))


class RanksWithNaN(Evicting):
    """Divides by zero at the first token."""

    def priority(self, kv):
        return kv.positions / kv.positions


class NeverDense(Base):
    """Has a tail even where nothing is left out."""

    def select(self, query, kv):
        chosen = super().select(query, kv)
        return chosen._replace(tail=Tail(torch.full(query.shape[:3], 0.1), torch.zeros_like(query[:, :, 0])))


class CountsInAQuestion(Evicting):
    """Ages its column when it is asked, so that being asked twice changes the answer."""

    columns = {"age": torch.float32}

    def priority(self, kv):
        kv["age"] += 1
        return kv.positions - kv["age"] * 1e-3


REMEMBERED: list[int] = []


class RemembersOutsideTheCache(Base):
    """Alternates between two choices by a list that outlives the sequence."""

    def select(self, query, kv):
        REMEMBERED.append(0)
        ranking = kv.positions.float() * (1 if len(REMEMBERED) // 6 % 2 else -1)
        return Selection(*ops.top_slots(ranking, kv, self.k))


class LooksAtItsNeighbours(Evicting):
    """Normalises by the batch."""

    columns = {"norm": torch.float32}

    def on_append(self, kv, new):
        kv.write("norm", new, new.keys.norm(dim=-1))

    def priority(self, kv):
        norm = torch.where(kv.live(), kv["norm"], 0)
        return (norm - norm.mean(dim=(0, 2), keepdim=True)).abs()


class AveragesOverPadding(Evicting):
    """Ranks by the distance from the mean of all that came, zeros behind a short row included."""

    columns = {"distance": torch.float32}

    def on_append(self, kv, new):
        mean = new.keys.mean(2, keepdim=True)
        kv.write("distance", new, (new.keys - 20 * mean).norm(dim=-1))

    def priority(self, kv):
        return kv["distance"]


class SwitchesTheMeterOff(Base):
    """Reads for nothing."""

    def select(self, query, kv):
        kv._traffic.meter = None
        return super().select(query, kv)


class LastPieceOnly(Evicting):
    """A natural TOVA: the mass of the last forward, which is the last piece of a prompt, not its end."""

    columns = {"last": torch.float32}
    observes = Observe.MASS

    def on_attend(self, kv, mass):
        kv["last"] = mass

    def priority(self, kv):
        return kv["last"].masked_fill(kv.newest(1), torch.inf)


class RenumbersItsTokens(Evicting):
    """Counts positions backwards once the prompt is complete."""

    def on_prefill(self, kv):
        kv.positions.copy_(kv.seen[:, None, None] - 1 - kv.positions)


class KeepsACopyOfTheContext(Evicting):
    """Drops tokens, and holds the keys of all of them in a summary."""

    summaries = {"all": (torch.float32, "S")}
    capturable = False

    def on_prefill(self, kv):
        kv["all"] = kv.keys.flatten(2)


class ReadsRawKeys(Base):
    """Scores with all keys, behind the meter."""

    def select(self, query, kv):
        scores = torch.einsum("bkgd,bktd->bkt", query, kv._slots.keys)
        return Selection(*ops.top_slots(scores, kv, min(self.k, kv.slots_in_use)))


class ReadsRawColumns(Base):
    """Ranks by a column, behind the meter."""

    columns = {"norm": torch.float32}

    def on_append(self, kv, new):
        kv.write("norm", new, new.keys.norm(dim=-1))

    def select(self, query, kv):
        return Selection(*ops.top_slots(kv._slots.column("norm"), kv, min(self.k, kv.slots_in_use)))


class WritesRawColumns(Base):
    """Writes to a column, behind the meter."""

    columns = {"norm": torch.float32}

    def on_append(self, kv, new):
        kv._slots.column("norm").add_(1)


class ReadsTheOpsInside(Base):
    """Calls an implementation itself, which counts nothing."""

    def select(self, query, kv):
        _, mass = ops.reference.attend(
            query, kv._slots.keys, kv._slots.values, kv.lengths, scale=1.0, want_mass=True
        )
        return Selection(*ops.top_slots(mass, kv, min(self.k, kv.slots_in_use)))


class CostsMoreThanDense(Base):
    """Leaves tokens out, and reads more than dense attention to find out which: a Quest made of columns."""

    columns = {"low": (torch.float32, 16), "high": (torch.float32, 16)}

    def on_append(self, kv, new):
        kv.write("low", new, new.keys)
        kv.write("high", new, new.keys)

    def select(self, query, kv):
        bound = torch.maximum(query[:, :, 0, None] * kv["low"], query[:, :, 0, None] * kv["high"]).sum(-1)
        return Selection(*ops.top_slots(bound, kv, min(self.k, kv.slots_in_use)))


class LooksAtTheDevice(Base):
    """Asks for a number on the host."""

    def select(self, query, kv):
        if int(kv.lengths.max()) <= self.k:
            return None
        return super().select(query, kv)


class DependsOnTheData(Base):
    """Chooses as many slots as a threshold lets through."""

    def select(self, query, kv):
        slots = (kv.positions[0, 0] > 30).nonzero()[:, 0][: self.k]
        counts = torch.minimum(kv.lengths, torch.tensor(len(slots))) * 0
        return Selection(slots.expand(*kv.lengths.shape, -1).contiguous(), counts)


class DividesByTheQuery(Base):
    """Is lost where a query is zero, as that of a pad token may be."""

    def select(self, query, kv):
        chosen = super().select(query, kv)
        share = query.abs().amax(-1) / query.abs().sum(-1)
        return chosen._replace(tail=Tail(share, torch.zeros_like(query[:, :, 0])))


class KeepsASecret(Evicting):
    """Has a parameter that its spec does not tell."""

    def spec(self):
        return {"broken": {}}


CAUGHT = {
    ChoosesDeadSlots: "answers_fit_the_contract",
    RanksWithNaN: "answers_fit_the_contract",
    NeverDense: "a_loose_budget_is_dense",
    RenumbersItsTokens: "the_cut_is_what_is_held",
    KeepsACopyOfTheContext: "memory_is_for_what_is_held",
    CountsInAQuestion: "questions_change_nothing",
    RemembersOutsideTheCache: "same_run_same_result",
    LooksAtItsNeighbours: "rows_do_not_meet",
    AveragesOverPadding: "rows_do_not_meet",
    SwitchesTheMeterOff: "traffic_is_what_was_read",
    LastPieceOnly: "pieces_of_a_prompt_change_nothing",
    ReadsRawKeys: "nothing_is_read_behind_the_meter",
    ReadsRawColumns: "nothing_is_read_behind_the_meter",
    WritesRawColumns: "nothing_is_read_behind_the_meter",
    ReadsTheOpsInside: "nothing_is_read_behind_the_meter",
    CostsMoreThanDense: "leaving_out_saves_bytes",
    LooksAtTheDevice: "a_step_never_waits_for_the_device",
    DependsOnTheData: "a_step_never_waits_for_the_device",
    DividesByTheQuery: "odd_inputs_stay_finite",
    KeepsASecret: "the_spec_round_trips",
}


@pytest.mark.parametrize(
    ("cls", "law"), CAUGHT.items(), ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_a_broken_policy_is_caught_by_its_law(cls, law):
    made = dataclass(frozen=True)(cls)
    (found,) = [known for known in testing.LAWS if known.__name__ == law]
    with pytest.raises((AssertionError, ValueError)):
        found(tight=made(k=8), loose=made(k=64))


def named(cls, law, **sizes):
    """The complaint of a law about a policy."""
    made = cls if "__dataclass_fields__" in vars(cls) else dataclass(frozen=True)(cls)
    (found,) = [known for known in testing.LAWS if known.__name__ == law]
    with pytest.raises((AssertionError, ValueError)) as caught:
        found(tight=made(k=sizes.get("tight", 8)), loose=made(k=64))
    return str(caught.value)


class Nameless(Policy):
    pass


def test_a_class_that_cannot_be_registered_is_caught():
    (law,) = [known for known in testing.LAWS if known.__name__ == "it_can_be_registered"]
    with pytest.raises(AssertionError, match="Nameless cannot be registered: Nameless must be a frozen dat"):
        law(Nameless(), Nameless())
    frozen = dataclass(frozen=True)(Nameless)
    with pytest.raises(AssertionError, match="needs a class attribute name: ClassVar.str., an identifier"):
        law(frozen(), frozen())


def test_a_tight_one_that_leaves_nothing_out_is_caught():
    for cls in (Base, Evicting):
        assert "`tight` must leave something out" in named(cls, "tight_leaves_something_out", tight=64)


class IndexesTooFar(Base):
    def select(self, query, kv):
        return [0, 1, 2][self.k]


class TakesTooLittle(Base):
    def on_append(self, kv):
        pass


class AnswersAList(Base):
    def select(self, query, kv):
        return [0]


def test_a_complaint_names_the_policy_the_law_and_the_hook():
    law = "questions_change_nothing"  # one that looks through a spy
    assert f"{law}: broken raised IndexError, in IndexesTooFar.select (line " in named(IndexesTooFar, law)
    said = named(TakesTooLittle, law)
    assert f"{law}: broken raised TypeError" in said
    assert "TakesTooLittle.on_append() takes 2 positional arguments but 3 were given" in said
    assert named(AnswersAList, law).startswith("policy broken, layer 0: select must return a kvsieve.Selecti")
    made = AnswersAList(k=8)
    with pytest.raises(AssertionError, match="^tight_leaves_something_out: policy broken, layer 0: select"):
        testing.check_policy(made, made)


@pytest.mark.parametrize("cls", [Base, Evicting])
@pytest.mark.parametrize("law", testing.LAWS, ids=lambda law: law.__name__)
def test_what_they_are_made_from_breaks_none(cls, law):
    law(tight=cls(k=8), loose=cls(k=64))
