"""What the built-in datasets promise; on their first rows, which are of some hundred chats."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import islice

import pytest

from rlhf.data.sentiment import vader
from rlhf.sources import builtin_chats


@pytest.fixture(scope="module")
def pairs():
    return list(islice(builtin_chats.pairs(Counter()), 4000))


@pytest.fixture(scope="module")
def responses(pairs):
    """Rows of at least the blocks that `pairs` are of."""
    return list(islice(builtin_chats.responses(Counter()), 8000))


def test_the_same_pairs_are_drawn_every_time(pairs):
    assert list(islice(builtin_chats.pairs(Counter()), 400)) == pairs[:400]


def test_a_pair_is_a_prompts_own_response_and_one_of_another_conversation_of_its_block(pairs, responses):
    own, others = defaultdict(set), defaultdict(set)
    for row in responses:
        own[row["conversation"], row["prompt"]].add(row["response"])
        others[row["group"]].add((row["conversation"], row["response"]))
    for pair in pairs:
        both = {pair["chosen"], pair["rejected"]}
        of_its_own = both & own[pair["conversation"], pair["prompt"]]
        assert of_its_own
        rival = (both - of_its_own or both).pop()
        assert any(text == rival and name != pair["conversation"] for name, text in others[pair["group"]])


def test_the_chosen_response_is_the_more_positive_one_by_a_margin(pairs):
    gaps = [vader(pair["chosen"]) - vader(pair["rejected"]) for pair in pairs]
    assert min(gaps) >= builtin_chats.MIN_GAP


def test_a_conversation_is_of_one_group_in_both_datasets(pairs, responses):
    """And a group has one stage: none sees another's conversations."""
    groups = defaultdict(set)
    for row in (*responses, *pairs):
        groups[row["conversation"]].add(row["group"])
    assert len(groups) > 200
    assert all(len(found) == 1 for found in groups.values())
    chats = Counter(group for (group,) in groups.values())
    assert max(chats.values()) <= builtin_chats.BLOCK


def test_turns_are_short_and_not_empty(responses):
    lengths = {len(row[part].split()) for row in responses for part in ("prompt", "response")}
    assert min(lengths) > 0
    assert max(lengths) == builtin_chats.MAX_WORDS


def test_what_is_left_out_is_counted_and_nothing_else_is_lost():
    counts: Counter[str] = Counter()
    rows = sum(1 for _ in builtin_chats.responses(counts))
    turns = sum(max(0, len(turns) - 1) for _, turns in builtin_chats.chats())
    assert rows + counts.total() == turns
