"""Messages to token ids by the model's own template.

Tokens in, tokens out: a prompt is rendered once, to ids; the engine returns ids; training sees
exactly those, with the end token if and only if the model produced it.
"""

import contextlib
import datetime
import hashlib
import json
import re

from nanoaipo.errors import InputError, reason_of


def load_tokenizer(model, setting="model"):
    """(tokenizer, ids that end a turn) of a chat model.

    Raises InputError, which names the setting, if it cannot be loaded or has no chat template.
    """
    from transformers import AutoTokenizer, GenerationConfig

    try:
        # not mistral_common's, which comes with vllm and has no template
        tokenizer = AutoTokenizer.from_pretrained(model, mistral_format=False)
    except (OSError, ValueError) as e:
        raise InputError(
            f"--{setting}={model}: no model folder and no hub model that can be loaded "
            f"({reason_of(e)})"
        ) from e
    if not tokenizer.chat_template:
        raise InputError(
            f"--{setting}={model}: its tokenizer has no chat template; "
            "take the instruction-tuned model"
        )

    # Gemma and Llama 3 end turns with a token of their own, which their generation config names
    eos_ids = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):  # a model may have no such config
        configured = GenerationConfig.from_pretrained(model).eos_token_id
        if isinstance(configured, list):
            eos_ids.update(configured)
        else:
            eos_ids.add(configured)
    return tokenizer, eos_ids - {None}


# ------------------------------------------------------------------------- text of control tokens


def control_pattern(tokenizer):
    """A pattern that finds the text of any control token."""
    tokens = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in tokens if token.special}
    longest_first = sorted(texts, key=len, reverse=True)  # of two with one beginning, the longer
    nothing = "(?!)"  # a tokenizer without such tokens
    return re.compile("|".join(map(re.escape, longest_first)) or nothing)


def token_ids(tokenizer, text):
    """Ids of a text as the tokenizer reads it, no special token added."""
    return tokenizer(text, add_special_tokens=False).input_ids


def encode(tokenizer, text, control):
    """Ids of plain text: what the pattern `control` finds stays text."""
    # cut behind its first character, so that no piece holds the whole text of a control token
    ids = []
    start = 0
    for match in control.finditer(text):
        cut = match.start() + 1
        ids += token_ids(tokenizer, text[start:cut])
        start = cut
    return ids + token_ids(tokenizer, text[start:])


# ------------------------------------------------------------------------------------- rendering


def template_arguments(template_kwargs, date):
    """What a run hands to every chat template, as keyword arguments.

    template_kwargs: a JSON object such as {"enable_thinking": false}, or empty. date: YYYY-MM-DD,
    what a template that asks for the day is told; empty: today. Raises InputError for other texts.
    """
    arguments = {}
    if template_kwargs:
        try:
            arguments = json.loads(template_kwargs)
        except ValueError as e:
            raise InputError(f"--template_kwargs={template_kwargs}: not JSON: {e}") from e
        if not isinstance(arguments, dict):
            raise InputError(f"--template_kwargs={template_kwargs}: has to be a JSON object")

    # templates call strftime_now("%d %B %Y"); a variable of that name hides transformers' function
    if date:
        try:
            day = datetime.datetime.strptime(date, "%Y-%m-%d")
        except ValueError as e:
            raise InputError(f"--date={date}: has to be a day such as 2026-11-27") from e
        arguments["strftime_now"] = day.strftime
    return arguments


def render(tokenizer, messages, where, control=None, opens=True, arguments=None):
    """Ids of a conversation, with the assistant's turn opened at its end if `opens`.

    arguments: of the template, from template_arguments and the row's own columns.

    The template writes the BOS, and none is added. Text of a message that spells a control token
    becomes that token, so callers drop such prompts, or pass the pattern `control`: then it stays
    text, because a stand-in goes through the template and the message's ids take its place. Raises
    InputError, which names `where`, if the template refuses the messages (Gemma-2: a system one).
    """
    from jinja2 import TemplateError

    # the stand-in of message k is NAME, k and a full stop; NAME is a text that no message holds
    name = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
    shielded = []
    for k, message in enumerate(messages):
        if control and control.search(message["content"]):
            message = message | {"content": f"{name}{k}."}
        shielded.append(message)

    try:
        text = tokenizer.apply_chat_template(
            shielded, add_generation_prompt=opens, tokenize=False, **(arguments or {})
        )
    except TemplateError as e:
        raise InputError(f"{where}: this model's chat template refuses the prompt: {e}") from e

    # the template's own text is read with its control tokens, the messages' without any
    ids = []
    pieces = re.split(rf"{name}(\d+)\.", text)  # template, number, template, number, ..., template
    for n, piece in enumerate(pieces):
        if n % 2 == 0:
            ids += token_ids(tokenizer, piece)
        else:
            ids += encode(tokenizer, messages[int(piece)]["content"], control)
    return ids


def render_response(tokenizer, eos_ids, control, prompt, prompt_ids, response, arguments=None):
    """Ids of a response that came as text, with one end of turn.

    They are what this model's template writes after the prompt, unless it rewrites earlier turns
    or the response spells a control token: then those of the plain text.
    """
    # what the template adds behind the prompt: some write more than text and end token
    content = response[0]["content"]
    ids = None
    if not control.search(content):
        text = tokenizer.apply_chat_template(prompt + response, tokenize=False, **(arguments or {}))
        conversation = token_ids(tokenizer, text)
        if conversation[: len(prompt_ids)] == prompt_ids:
            ids = conversation[len(prompt_ids) :]
    # elsewhere the text itself
    if ids is None:
        ids = encode(tokenizer, content, control)

    if not eos_ids & set(ids):
        ids = ids + [tokenizer.eos_token_id]
    return ids
