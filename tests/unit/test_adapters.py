from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf import catalog
from rlhf.adapters import Preference, Prompt, Response, Unusable, adapt, has_turns, normalised
from rlhf.splits import phase_of

SAMPLES = Path(__file__).parents[1] / "data"
DIALOGUE = {"prompt": "p", "chosen": "c", "rejected": "r", "dialogue": True}
PLAIN = {**DIALOGUE, "dialogue": False}
SHARES = {"sft": 2.0, "reward": 4.0, "rlhf": 4.0}

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1).filter(
    lambda t: t.strip() and "Human:" not in t and "Assistant:" not in t
)
conversations = st.lists(words, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2 == 1)


def written(turns):
    """Return a conversation as Dahoas' sets hold it."""
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {t}" for i, t in enumerate(turns)) + "\n\nAssistant:"


@given(conversations, words, words)
def test_a_dialogue_gives_its_turns_back(turns, chosen, rejected):
    if chosen.strip() == rejected.strip():
        return
    row = adapt({"p": written(turns), "c": chosen, "r": rejected}, DIALOGUE, "reward")
    assert row.turns == tuple(t.strip() for t in turns)
    assert row.texts() == (chosen.strip(), rejected.strip())


@given(conversations)
def test_a_dialogue_that_is_read_as_plain_text_is_seen_and_one_that_was_split_is_not(turns):
    row = {"p": written(turns), "c": "x", "r": "y"}
    assert has_turns(adapt(row, PLAIN, "rlhf").turns[0])
    assert not any(map(has_turns, adapt(row, DIALOGUE, "rlhf").turns))


@given(conversations, st.sampled_from(["sft", "reward", "rlhf"]))
def test_messages_and_text_are_the_same_conversation(turns, phase):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
    replies = {"c": "good", "r": "bad"}
    told = [adapt({"p": p, **replies}, DIALOGUE, phase) for p in (written(turns), messages)]
    assert told[0].group == told[1].group
    assert type(told[0]) is type(told[1])


@given(words, st.sampled_from([str.upper, str.lower, lambda t: f"  {t} ", lambda t: t.replace(" ", "\n ")]))
def test_spelling_moves_a_prompt_to_no_other_phase(prompt, spelt):
    if not spelt(prompt).strip() or normalised(spelt(prompt)) != normalised(prompt):
        return
    a, b = (adapt({"p": p, "c": "x", "r": "y"}, PLAIN, "reward").group for p in (prompt, spelt(prompt)))
    assert phase_of(a, SHARES, 0.1) == phase_of(b, SHARES, 0.1)


@given(st.lists(st.tuples(conversations, conversations), max_size=30))
def test_a_prompt_is_in_one_phase_over_all_datasets_and_however_a_conversation_goes_on(pairs):
    places = {}
    for first, more in pairs:
        for turns in (first, [first[0]], [first[0], "well", *more]):
            for columns, prompt in ((DIALOGUE, written(turns)), (PLAIN, turns[0])):
                group = adapt({"p": prompt, "c": "x", "r": "y"}, columns, "rlhf").group
                places.setdefault(normalised(turns[0]), set()).add(phase_of(group, SHARES, 0.1))
    assert all(len(found) == 1 for found in places.values())


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("no turns at all", "does not begin with a Human: turn"),
        ("\n\nHuman: hi", "does not end where the Assistant: begins"),
        ("\n\nHuman: hi\n\nAssistant: hello", "does not end where the Assistant: begins"),
        ("\n\nHuman: hi\n\nHuman: ho\n\nAssistant:", "do not take turns"),
        ("\n\nAssistant: hi\n\nHuman: ho\n\nAssistant:", "do not take turns"),
        ("\n\nHuman:  \n\nAssistant:", "an empty turn"),
        ([{"role": "system", "content": "be nice"}, {"role": "user", "content": "x"}], "system message"),
        ([{"from": "human", "value": "x"}], "a message without role and content"),
        (["hi"], "a message without role and content"),
        ([{"role": "user", "content": None}], "a message without text"),
        (None, "no prompt"),
        (5, "a prompt that is no text"),
        ({"role": "user", "content": "hi"}, "a prompt that is no text"),
    ],
)
def test_a_prompt_that_is_no_conversation_is_unusable_with_the_reason(prompt, why):
    with pytest.raises(Unusable, match=why):
        adapt({"p": prompt, "c": "good", "r": "bad"}, DIALOGUE, "reward")


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ("", "an empty reply"),
        (None, "an empty reply"),
        ([], "an empty reply"),
        (5, "a reply that is no text"),
        (["good"], "a message without role and content"),
        ([{"role": "assistant", "content": None}], "a message without text"),
        (" bad", "the same"),
    ],
)
def test_a_pair_that_teaches_nothing_is_unusable_with_the_reason(chosen, why):
    with pytest.raises(Unusable, match=why):
        adapt({"p": "hi", "c": chosen, "r": "bad"}, PLAIN, "reward")


def test_a_phase_takes_what_it_learns_from():
    row = {"p": "hi", "c": "good", "r": "bad"}
    assert adapt(row, PLAIN, "rlhf") == Prompt(("hi",), "hi")
    assert adapt(row, PLAIN, "sft") == Response(("hi",), "hi", "good")
    assert adapt(row, PLAIN, "reward") == Preference(("hi",), "hi", "good", "bad")
    assert adapt({**row, "a": "other"}, {**PLAIN, "response": "a"}, "sft").response == "other"


@pytest.mark.parametrize("name", [n for n in catalog.COLUMNS if n.startswith("Dahoas/")])
@pytest.mark.parametrize("phase", ["sft", "reward", "rlhf"])
def test_the_seeds_datasets_are_read_in_their_own_format(name, phase):
    for raw in json.loads((SAMPLES / f"{name.split('/')[1]}.json").read_text()):
        row = adapt(raw, catalog.COLUMNS[name], phase)
        assert all(t and t == t.strip() for t in (*row.turns, *row.texts()))
        assert not any("Human:" in t or "Assistant:" in t for t in row.turns)


@pytest.mark.parametrize("sample", json.loads((SAMPLES / "awkward.json").read_text()))
def test_awkward_rows_are_read_or_left_out_with_the_reason(sample):
    columns = catalog.COLUMNS[sample["dataset"]]
    if sample["why"] is None:
        assert all(adapt(sample["row"], columns, "reward").texts())
    else:
        with pytest.raises(Unusable, match=sample["why"]):
            adapt(sample["row"], columns, "reward")
