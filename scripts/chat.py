"""Chat with a model: a conversation, or the response to one prompt.

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
from rlhf.data.streams import Purpose, Stream
from rlhf.data.templates import load_tokenizer, prompt_texts
from rlhf.errors import UserError, run_main
from rlhf.generation.sampler import Sampler
from rlhf.generation.sampling import Sampling, uniforms
from rlhf.models.loading import load_actor
from rlhf.terminal import printable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("--prompt", help="respond to one prompt and exit")
    parser.add_argument("--max-new-tokens", type=at_least(int, 1), default=64)
    parser.add_argument("--temperature", type=at_least(float, 0), default=0.7, help="0 is greedy")
    parser.add_argument("--seed", type=at_least(int, 0), help="of sampling; default: random")
    args = parser.parse_args()
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty: give it some text, or omit it to hold a conversation")
    refuse_no_model(args.model)
    tokenizer = load_tokenizer(args.model)
    # CPUs are slow in 16 bits; GPUs use the dtype of the saved weights.
    dtype = torch.float32 if parallel.device().type == "cpu" else "auto"
    sampling = Sampling(args.max_new_tokens, args.temperature, tokenizer.eos_token_id, tokenizer.pad_token_id)
    sampler = Sampler(load_actor(args.model, dtype).eval(), sampling)
    seed = secrets.randbits(31) if args.seed is None else args.seed
    longest_prompt(sampler.model, tokenizer, sampling)
    sampler.refresh()
    if args.prompt is not None:
        print(printable(respond(sampler, tokenizer, [args.prompt], seed)))
        return
    converse(sampler, tokenizer, seed)


def converse(sampler: Sampler, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Respond to each line of input, with the conversation so far, until the input ends."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    turns: list[str] = []
    while (line := _read()) is not None:
        if not line.strip():
            continue
        try:
            response = respond(sampler, tokenizer, [*turns, line], seed + len(turns))
        except UserError as error:  # the conversation continues without the line
            print(f"error: {error}", file=sys.stderr)
            continue
        turns += [line, response]
        print(printable(response))


def at_least(number_type: type, minimum: float) -> Callable[[str], float]:
    """Return a function that parses an argument, and refuses numbers below `minimum`."""

    def number(text: str) -> float:
        if not (value := number_type(text)) >= minimum:
            raise argparse.ArgumentTypeError(f"{text} should be a number from {minimum} up")
        return float(value) if number_type is float else int(value)

    return number


def refuse_no_model(path: Path) -> None:
    """Raise UserError if `path` is not a model's directory; the text names actors inside it."""
    if (path / "config.json").exists():
        return
    configs = sorted(config for depth in ("*", "*/*") for config in path.glob(f"{depth}/config.json"))
    actors = [str(config.parent) for config in configs if "ForCausalLM" in config.read_text(errors="replace")]
    remedy = "results/ is below `pvc`; build the model with snakemake"
    hint = f"give {' or '.join(actors)}" if actors else remedy
    raise UserError(f"{path} is not a model directory (no config.json): {hint}")


def longest_prompt(model: Any, tokenizer: PreTrainedTokenizerFast, sampling: Sampling) -> int:
    """Return how many tokens a conversation may have before the response.

    Raises:
        UserError: not even a conversation of one letter fits.
    """
    positions, least = model.config.max_position_embeddings, len(_ids(tokenizer, ["x"]))
    if (left := positions - sampling.max_new_tokens) < least:
        raise UserError(
            f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt: the model has {positions}"
            f" positions, give at most {positions - least}"
        )
    return int(left)


def _ids(tokenizer: PreTrainedTokenizerFast, turns: Sequence[str]) -> Any:
    """Return (P,) int64: the tokens of a conversation, up to the beginning of the response."""
    text = prompt_texts(tokenizer, [turns])[0]
    return tokenizer(text, add_special_tokens=False, return_tensors="np")["input_ids"][0]


def _read() -> str | None:
    """Return a line from the user, or None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def respond(sampler: Sampler, tokenizer: PreTrainedTokenizerFast, turns: Sequence[str], seed: int) -> str:
    """Return the response to a conversation; if it is too long, its oldest turns are left out.

    Raises:
        UserError: the last turn alone is too long, or as `longest_prompt`.
    """
    sampling = sampler.sampling
    longest = longest_prompt(sampler.model, tokenizer, sampling)
    for start in range(0, len(turns), 2):
        ids = _ids(tokenizer, turns[start:])
        if len(ids) <= longest:
            noise = uniforms(Stream(seed, Purpose.CHAT), [0], sampling.max_new_tokens)
            (generated,) = sampler.generate([ids], noise, rows=1)
            return str(tokenizer.decode(generated.responses[0], skip_special_tokens=True)).strip()
    raise UserError(
        f"the last turn has {len(ids)} tokens; with {sampling.max_new_tokens} for the response at most"
        f" {longest} fit: shorten it, or lower --max-new-tokens"
    )


if __name__ == "__main__":
    run_main(main)
