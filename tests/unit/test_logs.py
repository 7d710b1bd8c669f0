from __future__ import annotations

import pytest

from rlhf.logs import END, last_words

MISTAKE = "error: ./models/x: this is no model"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"WARNING: short\n{MISTAKE}\n", MISTAKE),
        (f"ValueError: of the first try\nstep 1\n{MISTAKE}\n\n", MISTAKE),
        ("Traceback (most recent call last):\n  File x\nKeyError: 'labels'\nbye\n", "KeyError: 'labels'"),
        (
            "[rank1]: huggingface_hub.errors.HfHubHTTPError: 500\n",
            "[rank1]: huggingface_hub.errors.HfHubHTTPError: 500",
        ),
        ("torch.OutOfMemoryError: CUDA\n", "torch.OutOfMemoryError: CUDA"),
        ("no error here\nlast\n", "last"),
        ("KeyError: 'survived'\n" + "step\n" * END, "step"),
        ("", "it said nothing"),
    ],
)
def test_the_last_error_of_a_log_is_found_or_its_last_line(tmp_path, text, said):
    (tmp_path / "log").write_text(text)
    assert last_words(tmp_path / "log") == said


def test_a_job_that_left_no_log_is_reported(tmp_path):
    assert last_words(tmp_path / "log") == "it left no log"
