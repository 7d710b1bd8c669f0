"""The sentiment of a text."""

from __future__ import annotations

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


@cache
def vader(text: str) -> float:
    """Return VADER's compound sentiment, -1 to 1.

    Source: Hutto and Gilbert, VADER, ICWSM 2014.
    """
    return float(_analyzer().polarity_scores(text)["compound"])
