"""Reading YAML without duplicate keys: PyYAML silently keeps the last of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import UserError


class _Unique(yaml.SafeLoader):
    """A loader that refuses duplicate keys, before merges (`<<`): keys may override merged ones."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _at(key, "a key should be a name, not a list or a mapping")
            if key.value in names:
                raise _at(
                    key,
                    f"{key.value} is twice in one mapping, the second would replace the first: remove one",
                )
            names.add(key.value)
        return node


def _at(key: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)


def read(path: Path) -> dict[str, Any]:
    """Return a file's mapping, empty for an empty file.

    Raises:
        UserError: the file cannot be read, is not a mapping in YAML, or has a duplicate or complex key.
    """
    try:
        # A subclass of the safe loader: it constructs plain values only.
        tree = yaml.load(path.read_text(encoding="utf-8"), _Unique) or {}
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} should be a mapping, it is {tree!r}")
    return tree
