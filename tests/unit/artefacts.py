"""Small artefacts of text files."""

from __future__ import annotations

from rlhf.store import publishing


def make(path, spec=None, run=None, **files):
    """Publish an artefact of text files."""
    with publishing.publish(path, spec or {"stage": "test"}) as draft:
        for name, text in (files or {"a": "one", "b": "two"}).items():
            (draft.path / name).write_text(text)
        (draft.path / "deep").mkdir()
        (draft.path / "deep" / "c").write_text("three")
        draft.run |= run or {}
    return path
