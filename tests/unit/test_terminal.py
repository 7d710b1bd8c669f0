from __future__ import annotations

from rlhf.terminal import printable


def test_what_a_terminal_would_obey_is_replaced_and_all_else_stays():
    assert printable("a\x1b[31mb\x1ec\x9bd\x00\r") == "a\ufffd[31mb\ufffdc\ufffdd\ufffd\ufffd"
    assert printable("Zoë,\n\t“ok” 🙂\u200d") == "Zoë,\n\t“ok” 🙂\u200d"
