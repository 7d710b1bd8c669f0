from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import catalog
from rlhf.config.sources import Columns
from rlhf.data.adapters import Preference, Prompt, Response, Unusable, adapt, has_turns, normalised
from rlhf.data.splits import stage_of

SAMPLES = Path(__file__).parents[2] / "data"
DIALOGUE = Columns(prompt="p", chosen="c", rejected="r", dialogue=True)
PLAIN = DIALOGUE.model_copy(update={"dialogue": False})
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
def test_a_dialogue_that_is_read_as_plain_text_is_noticed_and_one_that_was_split_is_not(turns):
    row = {"p": written(turns), "c": "x", "r": "y"}
    assert has_turns(adapt(row, PLAIN, "rlhf").turns[0])
    assert not any(map(has_turns, adapt(row, DIALOGUE, "rlhf").turns))


@given(conversations, st.sampled_from(["sft", "reward", "rlhf"]))
def test_messages_and_text_are_the_same_conversation(turns, stage):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
    responses = {"c": "good", "r": "bad"}
    rows = [adapt({"p": p, **responses}, DIALOGUE, stage) for p in (written(turns), messages)]
    assert rows[0].group == rows[1].group
    assert type(rows[0]) is type(rows[1])


@given(words, st.sampled_from([str.upper, str.lower, lambda t: f"  {t} ", lambda t: t.replace(" ", "\n ")]))
def test_spelling_moves_a_prompt_to_no_other_stage(prompt, spelt):
    if not spelt(prompt).strip() or normalised(spelt(prompt)) != normalised(prompt):
        return
    a, b = (adapt({"p": p, "c": "x", "r": "y"}, PLAIN, "reward").group for p in (prompt, spelt(prompt)))
    assert stage_of(a, SHARES, 0.1) == stage_of(b, SHARES, 0.1)


@given(st.lists(st.tuples(conversations, conversations), max_size=30))
def test_a_prompt_is_in_one_stage_over_all_datasets_and_however_a_conversation_continues(pairs):
    places = {}
    for first, more in pairs:
        for turns in (first, [first[0]], [first[0], "well", *more]):
            for columns, prompt in ((DIALOGUE, written(turns)), (PLAIN, turns[0])):
                group = adapt({"p": prompt, "c": "x", "r": "y"}, columns, "rlhf").group
                places.setdefault(normalised(turns[0]), set()).add(stage_of(group, SHARES, 0.1))
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
        ([{"from": "human"}], "a message without role and content"),
        (["hi"], "a message without role and content"),
        ([{"role": "user", "content": None}], "a message without text"),
        (None, "no prompt"),
        (5, "a prompt that is not text"),
        ({"role": "user", "content": "hi"}, "a prompt that is not text"),
    ],
)
def test_a_prompt_that_is_no_conversation_is_unusable_with_the_reason(prompt, why):
    with pytest.raises(Unusable, match=why):
        adapt({"p": prompt, "c": "good", "r": "bad"}, DIALOGUE, "reward")


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ("", "an empty response"),
        (None, "an empty response"),
        ([], "an empty response"),
        (5, "a response that is not text"),
        (["good"], "a message without role and content"),
        ([{"role": "assistant", "content": None}], "a message without text"),
        (" bad", "the same"),
    ],
)
def test_a_pair_that_teaches_nothing_is_unusable_with_the_reason(chosen, why):
    with pytest.raises(Unusable, match=why):
        adapt({"p": "hi", "c": chosen, "r": "bad"}, PLAIN, "reward")


def test_a_stage_takes_what_it_learns_from():
    row = {"p": "hi", "c": "good", "r": "bad"}
    assert adapt(row, PLAIN, "rlhf") == Prompt(("hi",), "hi")
    assert adapt(row, PLAIN, "sft") == Response(("hi",), "hi", "good")
    assert adapt(row, PLAIN, "reward") == Preference(("hi",), "hi", "good", "bad")
    assert adapt({**row, "a": "other"}, PLAIN.model_copy(update={"response": "a"}), "sft").response == "other"


@pytest.mark.parametrize("name", [n for n in catalog.COLUMNS if n.startswith("Dahoas/")])
@pytest.mark.parametrize("stage", ["sft", "reward", "rlhf"])
def test_deepspeed_chats_datasets_are_read_in_their_own_format(name, stage):
    for raw in json.loads((SAMPLES / f"{name.split('/')[1]}.json").read_text()):
        row = adapt(raw, Columns(**catalog.COLUMNS[name]), stage)
        assert all(t and t == t.strip() for t in (*row.turns, *row.texts()))
        assert not any("Human:" in t or "Assistant:" in t for t in row.turns)


@pytest.mark.parametrize("sample", json.loads((SAMPLES / "awkward.json").read_text()))
def test_awkward_rows_are_read_or_left_out_with_the_reason(sample):
    columns = Columns(**catalog.COLUMNS[sample["dataset"]])
    if sample["why"] is None:
        assert all(adapt(sample["row"], columns, "reward").texts())
    else:
        with pytest.raises(Unusable, match=sample["why"]):
            adapt(sample["row"], columns, "reward")


def messages(*turns, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


SFT_COLUMNS = Columns(prompt="prompt", response="response")


@pytest.mark.parametrize(
    ("prompt", "response", "turns"),
    [
        ("hi", messages("hello", first="assistant"), ("hi",)),
        ("hi", messages("hi", "hello"), ("hi",)),
        (messages("hi"), messages("hi", "hey", "how are you?", "hello"), ("hi", "hey", "how are you?")),
        ("hi", messages("hey", "how are you?", "hello", first="assistant"), ("hi", "hey", "how are you?")),
    ],
)
def test_messages_before_a_response_become_part_of_the_prompt(prompt, response, turns):
    row = adapt({"prompt": prompt, "response": response}, SFT_COLUMNS, "sft")
    assert (row.turns, row.response) == (turns, "hello")


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (messages("hi", "hello", "thanks, bye"), "last message is not the assistant's"),
        (messages("ho", "hello"), "do not begin with the prompt"),
        (messages("a", "b", first="assistant")[:1] + messages("c", first="assistant"), "do not take turns"),
        ([{"role": "system", "content": "be kind"}, *messages("hi", "hello")], "system message"),
    ],
)
def test_messages_that_do_not_end_in_a_response_to_the_prompt_are_dropped(response, said):
    """huggingface/smol-course#260: what the user said is not learned as a response."""
    with pytest.raises(Unusable, match=said):
        adapt({"prompt": "hi", "response": response}, SFT_COLUMNS, "sft")


def test_a_pair_of_two_conversations_is_dropped():
    row = {"prompt": "hi", "chosen": messages("hi", "a"), "rejected": messages("hi", "b", "so?", "c")}
    with pytest.raises(Unusable, match="do not answer the same conversation"):
        adapt(row, Columns(prompt="prompt", chosen="chosen", rejected="rejected"), "reward")


@pytest.mark.parametrize("value", [None, ""])
def test_rows_without_a_group_are_not_one_group(value):
    row = {"prompt": "hi", "response": "hello", "group": value}
    columns = Columns(prompt="prompt", response="response", group="group")
    with pytest.raises(Unusable, match="no group in column 'group'"):
        adapt(row, columns, "sft")


def share_gpt(*turns):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


WHOLE = Columns(prompt="chats", response="chats")


@pytest.mark.parametrize("form", [messages, share_gpt])
def test_a_column_of_whole_conversations_is_prompt_and_response(form):
    row = {"chats": form("hi", "hey", "how are you?", " fine ")}
    expected = ("hi", "hey", "how are you?")
    assert adapt(row, WHOLE, "sft") == Response(expected, "hi", "fine")
    assert adapt(row, WHOLE, "rlhf") == Prompt(expected, "hi")


def test_a_conversation_that_ends_with_the_user_is_a_prompt_and_nothing_to_imitate():
    row = {"chats": messages("hi", "hey", "how are you?")}
    assert adapt(row, WHOLE, "rlhf").turns == ("hi", "hey", "how are you?")
    with pytest.raises(Unusable, match="does not end with a response"):
        adapt(row, WHOLE, "sft")


@pytest.mark.parametrize("dialogue", [True, False])
def test_pairs_of_whole_dialogues(dialogue):
    """huggingface/trl#2164: Anthropic's pairs, and UltraFeedback's, have no column of prompts."""

    def form(*turns):
        named = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(turns))
        return named if dialogue else messages(*turns)

    columns = Columns(prompt="chosen", chosen="chosen", rejected="rejected", dialogue=dialogue)
    row = {"chosen": form("hi", "hey", "so?", "yes"), "rejected": form("hi", "hey", "so?", "no")}
    assert adapt(row, columns, "reward") == Preference(("hi", "hey", "so?"), "hi", "yes", "no")
    other = {**row, "rejected": form("hi", "ho", "so?", "no")}
    with pytest.raises(Unusable, match="do not answer the same conversation"):
        adapt(other, columns, "reward")


@pytest.mark.parametrize(("value", "prompt"), [(" 2, 3 ", "Add\n\n2, 3"), ("", "Add"), (None, "Add")])
def test_an_input_is_added_to_its_instruction(value, prompt):
    columns = Columns(prompt="instruction", input="input", response="output")
    row = {"instruction": "Add", "input": value, "output": "5"}
    assert adapt(row, columns, "sft") == Response((prompt,), prompt.casefold().replace("\n\n", " "), "5")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "critic", "content": "x"}, "role 'critic', which is none of user, human"),
        ({"role": "user", "content": [{"type": "image"}]}, "a part that is not text"),
        ({"role": "user", "content": None}, "without text"),
        ({"from": "human"}, "without role and content"),
    ],
)
def test_messages_that_cannot_be_read_say_why(message, said):
    with pytest.raises(Unusable, match=said):
        adapt({"chats": [message, *messages("a")]}, WHOLE, "rlhf")


def test_text_parts_of_a_message_are_one_text():
    row = {
        "chats": [{"role": "User", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    }
    assert adapt(row, WHOLE, "rlhf").turns == ("ab",)
