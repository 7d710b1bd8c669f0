"""Chat templates: from turns to text. A model's template is saved with its tokenizer.

Training, evaluation and chat all render with `prompt_texts` and `response_texts`, so a model reads the
same text everywhere. Turns are a list of strings; user and assistant alternate, the user begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rlhf.errors import DataError, one_line

USER, ASSISTANT = "<|user|>", "<|assistant|>"

# For built-in models: a special token begins each turn, EOS ends a response.
TURN_TOKENS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    + ASSISTANT
    + "{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)

# For published models without a template: the format of Anthropic's and Dahoas' dialogues. BOS once,
# at the start; no EOS between turns, because OPT's BOS is its EOS. Line breaks are inside expressions,
# because Jinja drops one that follows a block.
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
    except Exception as error:  # the tokenizers library raises no narrower type
        raise DataError(f"the tokenizer of {path} cannot be read: {one_line(error)}") from None
    if tokenizer.chat_template is None:
        raise DataError(f"the tokenizer of {path} has no chat template: choose a model that has one")
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise DataError(
            f"the tokenizer of {path} needs an EOS and a padding token that differ (EOS"
            f" {tokenizer.eos_token!r}, padding {tokenizer.pad_token!r}): choose another model"
        )
    return tokenizer


def prompt_texts(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[str]]) -> list[str]:
    """Return the text of each conversation, up to the beginning of the assistant's response.

    Args:
        prompts: the turns of each conversation.

    Raises:
        DataError: the last turn of a conversation is not the user's.
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
    """Return the text of each response, as it continues its prompt's text and ends with EOS.

    Args:
        texts: from `prompt_texts`, for the same `prompts`.

    Raises:
        DataError: the template changes the prompt when a response follows.
    """
    chats = [_messages([*turns, r]) for turns, r in zip(prompts, responses, strict=True)]
    conversations, continuations = tokenizer.apply_chat_template(chats, tokenize=False), []
    eos = str(tokenizer.eos_token)
    for prompt, conversation in zip(texts, conversations, strict=True):
        if not conversation.startswith(prompt):
            raise DataError(
                f"the chat template changes the prompt when a response follows ({conversation!r}): choose a"
                " model with another template"
            )
        text = conversation[len(prompt) :].rstrip("\n")
        continuations.append(text if text.endswith(eos) else text + eos)
    return continuations


def differences(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> list[str]:
    """Return the names of properties in which two tokenizers encode conversations differently."""
    properties = [
        {
            "vocabulary": t.get_vocab(),
            "chat template": t.chat_template,
            "BOS": t.bos_token_id,
            "EOS": t.eos_token_id,
            "padding": t.pad_token_id,
        }
        for t in (one, other)
    ]
    return [name for name in properties[0] if properties[0][name] != properties[1][name]]
