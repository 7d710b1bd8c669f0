"""Model cards: what a directory holds, what it was made from, how it did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf import store

TEXT = """---
{front}
---
# {title}

Made by the `{stage}` stage of an RLHF pipeline (supervised fine-tuning, reward model, PPO).

## Made from

{parents}

## Measured

{how}

{metrics}

## Configuration

```json
{config}
```

## Use

```python
from transformers import AutoTokenizer, {kind}

path = "."  # this directory
model, tokenizer = {kind}.from_pretrained(path), AutoTokenizer.from_pretrained(path)
{use}
```
"""

REPLY = """chat = [{"role": "user", "content": "how are you?"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
reply = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))"""

SCORE = """chat = [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "fine, thanks"}]
text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\\n")
text = text.removesuffix(tokenizer.eos_token) + tokenizer.eos_token  # some templates leave it out
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
print(model(ids).logits.item())"""

HELD_OUT = "On held-out rows, at the end of the training."
LAST_TENTH = (
    "Means over the last tenth of PPO's iterations, of the replies that were trained on. Replies to held-out"
    " prompts, before and after, are compared in `results/{scenario}/rlhf/eval` of the pipeline."
)


def write(path: Path, title: str, spec: dict[str, Any], metrics: dict[str, float], kind: str) -> None:
    """Write `README.md` into a model's directory; the same for the same training.

    Raises:
        DataError: a parent has no provenance.
    """
    stage, replies = spec["stage"], kind == "AutoModelForCausalLM"
    start = spec["parents"]["model" if stage != "rlhf" else "sft" if replies else "reward"]
    front = {
        "pipeline_tag": "text-generation" if replies else "text-classification",
        "tags": list(dict.fromkeys(["rlhf", stage])),
        "base_model": [name for name, hub in _named("model", start).items() if hub],
        "datasets": [n for n, hub in _named("dataset", *spec["parents"].values()).items() if hub],
    }
    text = TEXT.format(
        front="\n".join(f"{name}: {json.dumps(value)}" for name, value in front.items() if value),
        title=title, stage=stage, parents="\n".join(_made_from(spec["parents"])),
        how=LAST_TENTH if stage == "rlhf" else HELD_OUT,
        metrics="\n".join(f"- {name}: {_number(value)}" for name, value in metrics.items()),
        config=json.dumps(spec["config"], indent=2, sort_keys=True),
        kind=kind, use=REPLY if replies else SCORE,
    )  # fmt: skip
    (path / "README.md").write_text(text, encoding="utf-8")


def _made_from(parents: dict[str, str]) -> Iterator[str]:
    yield from (f"- {role}: `{name}`" for role, name in sorted(parents.items()))
    for what in ("model", "dataset"):
        names = ", ".join(f"`{name}`" for name in _named(what, *parents.values()))
        yield f"- {what}s at the beginning: {names}"


def _named(what: str, *artefacts: str) -> dict[str, bool]:
    """Return name -> whether it is the Hub's, of the models or datasets that artefacts began with."""
    found: dict[str, bool] = {}
    for artefact in sorted(artefacts):
        record = store.read_provenance(Path(artefact))
        if record["stage"] == what:
            found[record["config"][what]] = "revision" in record["config"]  # only the Hub has revisions
        found |= _named(what, *record["parents"].values())
    return found


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.6g}"
