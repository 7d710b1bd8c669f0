"""Talk to a model: hold a conversation, or answer one prompt.

python scripts/chat.py results/tiny/rlhf/actor
python scripts/chat.py results/tiny/rlhf/actor --prompt "how are you?"
"""

from __future__ import annotations

import argparse
import readline  # noqa: F401  (input() gets line editing)
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from rlhf import parallel
from rlhf.errors import UserError, run_main
from rlhf.generation import Sampling, generate, uniforms
from rlhf.models import load_actor
from rlhf.streams import Purpose
from rlhf.templates import load_tokenizer, prompt_texts
from rlhf.terminal import printable
from rlhf.tokens import pad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("--prompt", help="answer one prompt and exit")
    parser.add_argument("--max-new-tokens", type=at_least(int, 1), default=64)
    parser.add_argument("--temperature", type=at_least(float, 0), default=0.7, help="0 is greedy")
    parser.add_argument("--seed", type=at_least(int, 0), help="of sampling; drawn when not given")
    args = parser.parse_args()
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty: give it some text, or leave it out to hold a conversation")
    refuse_no_model(args.model)
    tokenizer = load_tokenizer(args.model)
    where = parallel.device()
    # CPUs are slow in 16 bits, and GPUs hold what was saved.
    model = load_actor(args.model, torch.float32 if where.type == "cpu" else "auto").eval().to(where)
    sampling = Sampling(args.max_new_tokens, args.temperature, tokenizer.eos_token_id, tokenizer.pad_token_id)
    seed = secrets.randbits(31) if args.seed is None else args.seed
    room(model, tokenizer, sampling)
    if args.prompt is not None:
        print(printable(answer(model, tokenizer, [args.prompt], sampling, seed)))
        return
    converse(model, tokenizer, sampling, seed)


def converse(model: Any, tokenizer: PreTrainedTokenizerFast, sampling: Sampling, seed: int) -> None:
    """Answer line by line, each with what was said before, to the end of input."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    turns: list[str] = []
    while (line := _read()) is not None:
        if not line.strip():
            continue
        try:
            reply = answer(model, tokenizer, [*turns, line], sampling, seed + len(turns))
        except UserError as error:  # the conversation goes on without the line
            print(f"error: {error}", file=sys.stderr)
            continue
        turns += [line, reply]
        print(printable(reply))


def at_least(kind: type, least: float) -> Callable[[str], float]:
    """Return a reader of an argument that refuses what is below `least`."""

    def number(text: str) -> float:
        if not (value := kind(text)) >= least:
            raise argparse.ArgumentTypeError(f"{text} should be a number from {least} up")
        return float(value) if kind is float else int(value)

    return number


def refuse_no_model(path: Path) -> None:
    """Raise UserError if `path` is no model's directory, naming the actors that lie in it."""
    if (path / "config.json").exists():
        return
    inside = sorted(found for depth in ("*", "*/*") for found in path.glob(f"{depth}/config.json"))
    actors = [str(found.parent) for found in inside if "ForCausalLM" in found.read_text(errors="replace")]
    made = "names under results/ lie below `pvc`, make them with snakemake"
    hint = f"give {' or '.join(actors)}" if actors else made
    raise UserError(f"{path} is not a model directory (no config.json): {hint}")


def room(model: Any, tokenizer: PreTrainedTokenizerFast, sampling: Sampling) -> int:
    """Return how many tokens a conversation may have.

    Raises:
        UserError: not even those of one letter.
    """
    positions, least = model.config.max_position_embeddings, len(_ids(tokenizer, ["x"]))
    if (left := positions - sampling.max_new_tokens) < least:
        raise UserError(
            f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt: the model has {positions}"
            f" positions, give at most {positions - least}"
        )
    return int(left)


def _ids(tokenizer: PreTrainedTokenizerFast, turns: Sequence[str]) -> Any:
    """Return the tokens of a conversation up to where the reply begins."""
    text = prompt_texts(tokenizer, [turns])[0]
    return tokenizer(text, add_special_tokens=False, return_tensors="np")["input_ids"][0]


def _read() -> str | None:
    """Return a line from the user, or None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def answer(
    model: Any, tokenizer: PreTrainedTokenizerFast, turns: Sequence[str], sampling: Sampling, seed: int
) -> str:
    """Return a reply to a conversation; its oldest turns are left out where it grows too long.

    Raises:
        UserError: even the last turn alone is too long for the model, or `room` has none.
    """
    most = room(model, tokenizer, sampling)
    for start in range(0, len(turns), 2):
        ids = _ids(tokenizer, turns[start:])
        if len(ids) <= most:
            noise = uniforms(seed, Purpose.CHAT, [0], sampling.max_new_tokens)
            made = generate(model, pad([ids], sampling.pad_id, side="left").to(model.device), sampling, noise)
            return str(tokenizer.decode(made.responses[0], skip_special_tokens=True)).strip()
    raise UserError(
        f"the last turn has {len(ids)} tokens; with {sampling.max_new_tokens} for the reply at most"
        f" {most} fit: shorten it, or lower --max-new-tokens"
    )


if __name__ == "__main__":
    run_main(main)
