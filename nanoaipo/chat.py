"""Messages to token ids by the model's own template.

Tokens in, tokens out: a prompt is rendered once, to ids; the engine returns ids; training sees exactly those, with the
end token if and only if the model produced it.
"""
import contextlib
import hashlib
import json
import re
import sys


def as_messages(value, role="user"):
    """A list of chat messages from a list of them or a text, or None if it is neither."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    good = isinstance(value, list) and value and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
    return value if good else None


def load_tokenizer(model, setting="model"):
    """(tokenizer, ids that end a turn) of a chat model; ends the program if it cannot be loaded or has no template."""
    from transformers import AutoTokenizer, GenerationConfig
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, mistral_format=False)     # vllm brings mistral_common, which has no template
    except (OSError, ValueError) as e:
        sys.exit(f"--{setting}={model}: no model folder and no hub model that can be loaded ({str(e).strip().splitlines()[0]})")
    tokenizer.chat_template or sys.exit(f"--{setting}={model}: its tokenizer has no chat template; take the instruction-tuned model")
    ends = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):                                  # Gemma and Llama 3 end turns with a token of their own
        eos = GenerationConfig.from_pretrained(model).eos_token_id
        ends |= set(eos if isinstance(eos, list) else [eos])
    return tokenizer, ends - {None}


def control_pattern(tokenizer):
    """A pattern that finds the text of any control token."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def encode(tokenizer, text, control):
    """Ids of plain text, no specials added; what the pattern `control` finds stays text, because it is cut inside."""
    cuts = [m.start() + 1 for m in control.finditer(text)]
    pieces = [text[a:b] for a, b in zip([0] + cuts, cuts + [len(text)])]
    return [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False).input_ids]


def render(tokenizer, messages, place, control=None, opens=True):
    """Ids of a conversation, with the mark that opens the assistant's turn unless `opens` is false; no second BOS.

    Text that spells a control token becomes that token, so prompts with such text are dropped before; with the pattern
    `control` it stays text: the message enters the template as a stand-in, and its ids take the stand-in's place.
    Ends the program, naming the place, if the model's template refuses it (Gemma-2: a system message).
    """
    from jinja2 import TemplateError
    name = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
    shown = [m | {"content": f"{name}{k}."} if control and control.search(m["content"]) else m for k, m in enumerate(messages)]
    try:
        text = tokenizer.apply_chat_template(shown, add_generation_prompt=opens, tokenize=False)
    except TemplateError as e:
        sys.exit(f"{place}: this model's chat template refuses the prompt: {e}")
    ids = []
    for n, piece in enumerate(re.split(rf"{name}(\d+)\.", text)):      # template, number, template, number, ...
        ids += encode(tokenizer, messages[int(piece)]["content"], control) if n % 2 else tokenizer(piece, add_special_tokens=False).input_ids
    return ids


def render_response(tokenizer, ends, control, prompt, prompt_ids, response):
    """Ids of a response that came as text, as this model's template writes it after the prompt, with one end of turn."""
    ids = None
    if not control.search(response[0]["content"]):
        text = tokenizer.apply_chat_template(prompt + response, tokenize=False)
        whole = tokenizer(text, add_special_tokens=False).input_ids
        if whole[:len(prompt_ids)] == prompt_ids:
            ids = whole[len(prompt_ids):]
    if ids is None:                                                     # the template rewrites earlier turns, or control text
        ids = encode(tokenizer, response[0]["content"], control)
    return ids if ends & set(ids) else ids + [tokenizer.eos_token_id]
