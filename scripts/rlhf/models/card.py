"""Model cards: a model's title, inputs, metrics, configuration and use, as `README.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.store import provenance

TEXT = """---
{front}
---
# {title}

Trained by the `{stage}` stage of an RLHF pipeline (supervised fine-tuning, reward model, PPO).

## Inputs

{parents}

## Metrics

{measured}

{metrics}

## Configuration

```json
{config}
```

## Use

```python
from transformers import AutoTokenizer, {auto_class}

path = "."  # this directory
model, tokenizer = {auto_class}.from_pretrained(path), AutoTokenizer.from_pretrained(path)
{use}
```
"""

RESPONSE = """chat = [{"role": "user", "content": "how are you?"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
response = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(response, skip_special_tokens=True))"""

SCORE = """chat = [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "fine, thanks"}]
text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\\n")
text = text.removesuffix(tokenizer.eos_token) + tokenizer.eos_token  # some templates omit it
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
print(model(ids).logits.item())"""

HELD_OUT = "On held-out rows, at the end of the training."
LAST_TENTH = (
    "Means over the last tenth of PPO's iterations, on the responses that the actor was trained on."
    " `results/{scenario}/rlhf/eval` of the pipeline compares responses to held-out prompts before and after."
)


def write(path: Path, title: str, spec: dict[str, Any], metrics: dict[str, float], auto_class: str) -> None:
    """Write `README.md` into a model's directory. The text is the same for the same training.

    Args:
        spec: of the artefact that contains the model.
        metrics: of the training.
        auto_class: the class of transformers that loads the model.

    Raises:
        DataError: a parent has no provenance, or a damaged one.
    """
    stage, generates = spec["stage"], auto_class == "AutoModelForCausalLM"
    base = spec["parents"]["model" if stage != "rlhf" else "sft" if generates else "reward"]
    front = {
        "pipeline_tag": "text-generation" if generates else "text-classification",
        "tags": list(dict.fromkeys(["rlhf", stage])),
        "base_model": [name for name, on_hub in _sources("model", base).items() if on_hub],
        "datasets": [n for n, on_hub in _sources("dataset", *spec["parents"].values()).items() if on_hub],
    }
    text = TEXT.format(
        front="\n".join(f"{name}: {json.dumps(value)}" for name, value in front.items() if value),
        title=title,
        stage=stage,
        parents="\n".join(_inputs(spec["parents"])),
        measured=LAST_TENTH if stage == "rlhf" else HELD_OUT,
        metrics="\n".join(f"- {name}: {_number(value)}" for name, value in metrics.items()),
        config=json.dumps(spec["config"], indent=2, sort_keys=True),
        auto_class=auto_class,
        use=RESPONSE if generates else SCORE,
    )
    (path / "README.md").write_text(text, encoding="utf-8")


def _inputs(parents: dict[str, str]) -> Iterator[str]:
    """Yield lines with the parents of an artefact and the sources that they were built from."""
    yield from (f"- {role}: `{name}`" for role, name in sorted(parents.items()))
    for stage, title in (("model", "pretrained models"), ("dataset", "original datasets")):
        names = ", ".join(f"`{name}`" for name in _sources(stage, *parents.values()))
        yield f"- {title}: {names}"


def _sources(stage: str, *artefacts: str) -> dict[str, bool]:
    """Return name -> whether it is on the Hub, for the models or datasets behind some artefacts."""
    sources: dict[str, bool] = {}
    for artefact in sorted(artefacts):
        record = provenance.read(Path(artefact))
        if record["stage"] == stage:
            sources[record["config"][stage]] = "revision" in record["config"]  # only the Hub has revisions
        sources |= _sources(stage, *record["parents"].values())
    return sources


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.6g}"
