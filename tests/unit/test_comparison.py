from __future__ import annotations

import pytest

from rlhf import comparison


def rows(before, after):
    return [
        {
            when: {"judged": judged, "words": words, "score": 2 * judged}
            for when, (judged, words) in both.items()
        }
        for both in ({"before": b, "after": a} for b, a in zip(before, after, strict=True))
    ]


def test_wins_and_losses_add_up_to_one():
    before, after = [(0.1, 1), (0.2, 1), (0.3, 1), (0.4, 1)], [(0.5, 1), (0.2, 1), (0.1, 1), (0.6, 1)]
    won = comparison.win_rate(rows(before, after), "judged")
    assert won == 2.5 / 4
    assert won + comparison.win_rate(rows(after, before), "judged") == 1
    assert won == comparison.win_rate(rows(before, after), "score")


def test_a_judge_of_length_alone_sees_nothing_at_matched_length():
    before = [(0.1 * n, n) for n in (1, 2, 2, 3, 5)]
    after = [(0.1 * n, n) for n in (1, 2, 3, 5, 5)]
    pairs = rows(before, after)
    assert comparison.matched_length(pairs) == pytest.approx(0.1 * (1 + 2 + 2 + 3 + 5) / 5)


def test_bigrams_that_repeat_count_once():
    assert comparison.distinct_bigrams(["a b c", "d e"]) == 1
    assert comparison.distinct_bigrams(["a b a b", "a b"]) == 2 / 4
    assert comparison.distinct_bigrams(["one", ""]) == 0
