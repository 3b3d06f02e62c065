"""A model behind an OpenAI-compatible endpoint: requests, refusals, what its answers look like.

    answer = endpoint("https://api.openai.com/v1", 16)
    replies = ask(questions, "pairs.jsonl", answer)     # questions.py

A reply's text is kept as it came, and beside the name asked for stand the model and the system
fingerprint that the server reports.
"""

import concurrent.futures
import json
import os
import re
import threading

from nanoaipo.errors import InputError, reason_of

# ------------------------------------------------------------------------------- asking questions

RETRIES = 20  # of a request that fails in passing
PASSING = (408, 409, 429)  # status of such a failure, beside 500 and above
TRIES = 4  # of a question that is answered with nothing in it
CANNOT_ANSWER = (400, 413, 422)  # status of a question that is refused: too long, filtered
SILENCE_SECONDS = 120  # without a byte, and a request has failed
NO_KEY = "none"  # what is sent where there is none


def endpoint(url, concurrency):
    """A way to answer questions: an OpenAI-compatible endpoint, the key from OPENAI_API_KEY.

    `concurrency` requests are under way at a time. The client repeats what fails in passing (no
    connection, 429, 5xx, two minutes of silence) up to 20 times, 8 seconds apart at most, and the
    first such failure is printed at once. A parameter that a refusal names is left out from then
    on, and a line says so. A question that the endpoint refuses to answer (400, 413, 422), or
    answers four times with nothing in it, has an error for a reply; any other refusal raises
    InputError. Before it raises or returns it waits for the requests under way and keeps their
    replies.
    """
    from openai import OpenAIError

    client = load_client(url)
    unsupported = set()  # parameters that this model does not take; all threads add to it
    first_failure = threading.Lock()  # taken, for good, by the thread that prints it

    def answer(questions, keep):
        def answer_one(n):
            keep({n: request(client, url, questions[n], unsupported, first_failure)})

        pool = concurrent.futures.ThreadPoolExecutor(concurrency)
        try:
            futures = [pool.submit(answer_one, n) for n in range(len(questions))]
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except OpenAIError as e:
            reason = without_key(client, str(e))[:300]
            raise InputError(
                f"{url}: {type(e).__name__}: {reason}; the replies that came are kept, "
                "the same command asks for the rest"
            ) from None  # the cause may spell the key
        finally:
            pool.shutdown(cancel_futures=True)

    return answer


def load_client(url):
    """The client of an endpoint; raises InputError for an address or a key that cannot be one."""
    from openai import OpenAI, Timeout

    if not re.match(r"https?://", url):  # the client would try again for minutes
        raise InputError(f"{url}: an endpoint's address begins with http:// or https://")
    key = os.environ.get("OPENAI_API_KEY", "").strip() or NO_KEY  # files end with a line break
    if not re.fullmatch(r"[!-~]+", key):
        raise InputError("OPENAI_API_KEY: has characters that no key has, such as a space in it")
    try:
        timeout = Timeout(SILENCE_SECONDS, connect=10)
        return OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=timeout)
    except Exception as e:  # the error is that of one of several packages that parse addresses
        raise InputError(f"{url}: no address of an endpoint: {reason_of(e)}") from e


def request(client, url, question, unsupported, first_failure):
    """Ask one question: {reply, finish, usage, ...} as read_completion has it, or an error.

    Adds to `unsupported` what the model does not take, and asks again without it. Raises what the
    client raises when the endpoint does not answer questions at all.
    """
    from openai import APIStatusError

    empty = 0  # answers with nothing in them
    while True:
        parameters = parameters_of(question, unsupported)
        try:
            response = create(client, url, parameters, first_failure)
        except APIStatusError as e:
            # a parameter: the same question without it
            name = refused_parameter(e, parameters)
            if name:
                drop_parameter(name, unsupported, f"{url}: {question['model']}")
                continue
            # a wrong key, a wrong address: no other question would fare better
            if e.status_code not in CANNOT_ANSWER:
                raise
            # this question alone
            return {"reply": "", "error": without_key(client, str(e))[:300]}

        # status 200; but a proxy's page or a JSON without an answer may come with it
        body = response.http_response.content.decode("utf-8", "replace")
        body = without_key(client, body)
        reply = read_completion(body)
        if reply is not None:  # the key may have been escaped in the body
            return json.loads(without_key(client, json.dumps(reply, ensure_ascii=False)))
        empty += 1
        if empty == TRIES:
            return {"reply": "", "error": f"no answer in it: {body[:200]}"}


def create(client, url, parameters, first_failure):
    """The endpoint's response to a request, which the client repeats where it fails in passing.

    The first failure of all is printed before it is repeated, and takes the lock first_failure.
    """
    from openai import APIConnectionError, APIStatusError

    if not first_failure.locked():
        try:
            once = client.with_options(max_retries=0)
            return once.chat.completions.with_raw_response.create(**parameters)
        except (APIConnectionError, APIStatusError) as e:
            status = getattr(e, "status_code", 500)  # without a connection there is none
            if status not in PASSING and status < 500:
                raise
            reason = reason_of(without_key(client, str(e.__cause__ or e)))[:200]
            if first_failure.acquire(blocking=False):
                print(
                    f"{url}: {reason}: asked again up to {RETRIES} times, 8 seconds apart at "
                    "most, for two minutes or, if each try takes long, more; then this ends",
                    flush=True,
                )
    return client.chat.completions.with_raw_response.create(**parameters)


def without_key(client, text):
    """The text with the client's key made unreadable: endpoints quote it, in replies too.

    A short key is no secret, such as EMPTY for a server of one's own, but a word of replies.
    """
    if client.api_key == NO_KEY or len(client.api_key) < 8:
        return text
    return text.replace(client.api_key, "***")


# ------------------------------------------------------------ parameters that a model does not take

REQUIRED = ("model", "messages")
OPTIONAL = ("temperature", "top_p", "max_tokens", "logprobs", "top_logprobs")
REFUSES_PARAMETER = (400, 403, 404, 422)  # status of a refusal that may be about a parameter

# how refusals name what was sent and can be left out
PARAMETER_NAMES = {
    "temperature": r"temperature",
    "top_p": r"top[_ ]?p",
    "logprobs": r"log[_ ]?prob(?:abilitie)?s?",
    "top_logprobs": r"top[_ ]?log[_ ]?probs?",
    "max_tokens": r"max_?tokens",
    "max_completion_tokens": r"max_completion_tokens",
}
UNKNOWN = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|not permitted|not allowed|unexpected"
    r"|deprecated|invalid (?:parameter|argument)|use\W+max_completion_tokens",
    re.IGNORECASE,
)
TOO_MANY = re.compile(
    r"too (?:large|long|many)|greater|less|exceed|at most|up to|between|range|maximum|[<>≤≥]",
    re.IGNORECASE,
)
ECHO = re.compile(r"""input(?:_value)?\\?['"]?\s*[:=]""")  # pydantic: what was sent comes behind


def parameters_of(question, unsupported):
    """What a request sends of a question, in the names that this model takes."""
    parameters = {}
    for name in REQUIRED + OPTIONAL:
        if name in question and name not in unsupported:
            parameters[name] = question[name]
    # reasoning models have another name for it
    if "max_tokens" in question.keys() & unsupported:
        parameters["max_completion_tokens"] = question["max_tokens"]
    return {name: value for name, value in parameters.items() if name not in unsupported}


def refused_parameter(error, parameters):
    """The sent parameter that a refusal is about and that can be left out, or None.

    Servers have no common code or field for it; what they have in common is that they name it.
    """
    if error.status_code not in REFUSES_PARAMETER:
        return None
    text = f"{error.param} {ECHO.split(error.response.text)[0]}"

    # each name in the refusal, where it stands first
    named = {}
    for name, words in PARAMETER_NAMES.items():
        pattern = re.compile(rf"(?<![a-z_]){words}(?![a-z_])", re.IGNORECASE)
        match = pattern.search(without_messages(text, parameters["messages"], pattern))
        if name in parameters and match:
            named[name] = match.start()

    # a question that is too long names the limits too, and would be no shorter without them
    if TOO_MANY.search(text) or not UNKNOWN.search(text):
        named.pop("max_tokens", None)
        named.pop("max_completion_tokens", None)

    if not named:
        return None
    # "temperature and top_p cannot both be set": the first of them stays
    if re.search(r"\bboth\b", text):
        return max(named, key=named.get)
    return min(named, key=named.get)


def without_messages(text, messages, pattern):
    """A refusal without the messages that it quotes, as far as the pattern is found in them."""
    for message in messages:
        content = str(message["content"])
        if pattern.search(content):
            text = text.replace(content, "").replace(json.dumps(content)[1:-1], "")
    return text


def drop_parameter(name, unsupported, model):
    """Leave a parameter out from now on, and print so the first time."""
    is_new = name not in unsupported
    unsupported.add(name)
    if "logprobs" in name:  # neither is of use without the other
        unsupported.update(("logprobs", "top_logprobs"))
    if is_new:
        print(f"{model} does not take this {name}, asked without it from now on", flush=True)


# ------------------------------------------------------------------------- what an endpoint answers

THOUGHT_FIELDS = ("reasoning_content", "reasoning")  # of a message, beside its content
THOUGHT_PARTS = ("thinking", "reasoning")  # types of a content's parts
SERVED_FIELDS = ("model", "system_fingerprint")  # of a completion: who answered

# words of the reasons that servers give: max_tokens cut a response, or it has ended by itself
CUT = {"length", "max", "limit", "truncated"}
FINISHED = {"stop", "eos", "end", "endoftext", "complete", "completed", "finished"}
NEITHER = {"error", "not"}


def read_completion(body):
    """What the body of an endpoint's answer says, or None where no answer is in it.

    {reply, finish, usage} and, where it has them, the thought before the reply, the model that
    answered, its system_fingerprint and logprobs. finish is "stop" for a response that ended by
    itself, "length" for one that was cut.
    """
    try:
        completion = json.loads(body)
        choice = completion["choices"][0]
        message = choice["message"]
        content = message.get("content")
    except (ValueError, LookupError, TypeError, AttributeError):  # no JSON, or one of another form
        return None
    if not isinstance(content, (str, list, type(None))):
        return None

    # where a model refuses, some servers have its words in a field of their own
    text = content_text(content) or content_text(message.get("refusal"))
    finish = finish_of(choice.get("finish_reason"))
    reply = {"reply": as_unicode(text), "finish": finish, "usage": {}}
    thought = thought_of(message)
    if thought:
        reply["thought"] = as_unicode(thought)
    if isinstance(completion.get("usage"), dict):
        reply["usage"] = completion["usage"]
    for field in SERVED_FIELDS:
        name = as_name(completion.get(field))
        if name:
            reply[field] = name
    if is_log_probs(choice.get("logprobs")):
        reply["logprobs"] = choice["logprobs"]
    return reply


def is_log_probs(value):
    """Whether these are log-probs as OpenAI has them, with the likeliest first tokens."""
    try:
        for top in value["content"][0]["top_logprobs"]:
            if not isinstance(top["token"], str) or not isinstance(top["logprob"], (int, float)):
                return False
    except (LookupError, TypeError):  # none, of the chosen token alone, or of another form
        return False
    return True


def content_text(content):
    """The text of a content, which may come in parts; a part that is no text is left out."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in ("text", "output_text"):
            texts.append(content_text(part.get("text")))
    return "".join(texts)


def thought_of(message):
    """What stands beside or among a message's content as its thought; empty where there is none."""
    for field in THOUGHT_FIELDS:
        thought = content_text(message.get(field)).strip()
        if thought:
            return thought

    # Mistral's reasoning models have it in a part of the content
    content = message.get("content")
    if not isinstance(content, list):
        return ""
    thoughts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in THOUGHT_PARTS:
            thoughts.append(content_text(part.get("thinking") or part.get("text")))
    return "".join(thoughts).strip()


def finish_of(reason):
    """A server's finish reason as "stop" or "length" where it means that, else in lower case."""
    if isinstance(reason, dict):  # SGLang's own form
        reason = reason.get("type")
    if not isinstance(reason, str):
        return None

    # FINISH_REASON_MAX_TOKENS, end_turn, maxTokens
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", reason).lower()
    words = re.sub(r"^(?:finish|stop)_reason_", "", words)
    words = set(re.findall(r"[a-z]+", words))
    if words & NEITHER:
        return reason.lower()
    if words & CUT:
        return "length"
    if words & FINISHED:
        return "stop"
    return reason.lower()


def as_unicode(text):
    """A text that can be written as UTF-8: half of a surrogate pair is none."""
    return text.encode(errors="replace").decode()


def as_name(value):
    """A name that a server gives, on one line; empty where it gives none."""
    if not isinstance(value, str):
        return ""
    return " ".join(as_unicode(value).split())
