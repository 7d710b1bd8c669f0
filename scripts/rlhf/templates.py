"""Chat templates: how turns become text. A model's template is saved with its tokenizer.

Training, evaluation and chat all render through `prompt_texts` and `response_texts`, so that a model
meets the same text everywhere. Turns are a list of strings, the user's first, speakers in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rlhf.errors import DataError, one_line

USER, ASSISTANT = "<|user|>", "<|assistant|>"

# For models that are made here: a token of its own opens each turn, EOS closes a reply.
TURN_TOKENS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    + ASSISTANT
    + "{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)

# For published models without a template: the turns of Anthropic's and Dahoas' dialogues as they
# are written there. BOS once, at the start; no EOS between turns (OPT's BOS is its EOS). The line
# breaks stand in expressions: Jinja drops one that follows a block.
HUMAN_ASSISTANT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


def _messages(turns: Sequence[str]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer that was published with its model.

    Raises:
        DataError: it cannot be read, or has no chat template, no EOS, or no padding token of its own.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # the tokenizers' library raises no other kind
        raise DataError(f"the tokenizer of {path} cannot be read: {one_line(error)}") from None
    if tokenizer.chat_template is None:
        raise DataError(f"the tokenizer of {path} has no chat template")
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise DataError(f"the tokenizer of {path} needs an EOS and a padding token that differ")
    return tokenizer


def prompt_texts(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[str]]) -> list[str]:
    """Return the text of each conversation up to where the assistant's reply begins.

    Raises:
        DataError: a conversation's last turn is not the user's.
    """
    for turns in prompts:
        if len(turns) % 2 == 0:
            raise DataError(f"a prompt ends with the user's turn; this one does not: {turns}")
    chats = [_messages(turns) for turns in prompts]
    return list(tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True))


def response_texts(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[str]],
    texts: Sequence[str],
    responses: Sequence[str],
) -> list[str]:
    """Return each reply as it follows its prompt's text, with the EOS that ends it.

    Args:
        texts: what `prompt_texts` gave for `prompts`.

    Raises:
        DataError: the template does not continue a prompt with its reply.
    """
    chats = [_messages([*turns, r]) for turns, r in zip(prompts, responses, strict=True)]
    wholes, replies = tokenizer.apply_chat_template(chats, tokenize=False), []
    eos = str(tokenizer.eos_token)
    for prompt, whole in zip(texts, wholes, strict=True):
        if not whole.startswith(prompt):
            raise DataError(f"the chat template changes the prompt when a reply follows: {whole!r}")
        reply = whole[len(prompt) :].rstrip("\n")
        replies.append(reply if reply.endswith(eos) else reply + eos)
    return replies


def differences(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> list[str]:
    """Return in what two tokenizers differ, of that which makes one conversation other tokens."""
    sides = [
        {
            "vocabulary": t.get_vocab(), "chat template": t.chat_template, "BOS": t.bos_token_id,
            "EOS": t.eos_token_id, "padding": t.pad_token_id,
        }
        for t in (one, other)
    ]  # fmt: skip
    return [name for name in sides[0] if sides[0][name] != sides[1][name]]
