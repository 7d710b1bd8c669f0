"""Model cards: what a directory holds, what it was made from, how it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = """---
pipeline_tag: {tag}
tags: [rlhf, {stage}]
---
# {title}

Made by the `{stage}` stage of an RLHF pipeline (supervised fine-tuning, reward model, PPO).

## Made from

{parents}

## Measured

{metrics}

## Configuration

```json
{config}
```

## Use

```python
from transformers import AutoTokenizer, {kind}

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = {kind}.from_pretrained(PATH)
```

Prompts are rendered with the tokenizer's chat template: `tokenizer.apply_chat_template`.
"""


def write(path: Path, title: str, spec: dict[str, Any], metrics: dict[str, float], kind: str) -> None:
    """Write `README.md` into a model's directory; the same for the same training."""
    tag = {"AutoModelForCausalLM": "text-generation"}.get(kind, "text-classification")
    parents = "\n".join(f"- {role}: `{name}`" for role, name in sorted(spec["parents"].items()))
    measured = "\n".join(f"- {name}: {value}" for name, value in metrics.items())
    text = TEXT.format(
        tag=tag, stage=spec["stage"], title=title, parents=parents, metrics=measured,
        config=json.dumps(spec["config"], indent=2, sort_keys=True), kind=kind,
    )  # fmt: skip
    (path / "README.md").write_text(text, encoding="utf-8")
