"""Everything that the gateway promises to OpenAI's own client, checked with it: BASE_URL is the argument."""

import asyncio
import json
import math
import sys
import time
import typing

import openai
import pydantic

from report import DEMO, MODEL, TIMEOUT_S, client, report, report_whole, user
from skills import FAQ

QUESTION = "What is a forebay?"


def ask(ai, question=QUESTION, **fields):
    fields = {"model": MODEL, "messages": user(question), "temperature": 0, "max_tokens": 40, **fields}
    answer = ai.chat.completions.create(**fields)
    report_whole(answer)
    return answer


def text_of(answer) -> str:
    return answer.choices[0].message.content


def whole_answer(ai):
    before = int(time.time())
    answer = ask(ai)
    assert answer.id.startswith("chatcmpl-") and len(answer.id) == len("chatcmpl-") + 32, answer.id
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert before - 1 <= answer.created <= time.time() + 1, answer.created
    assert answer.system_fingerprint.startswith("fb_")
    (choice,) = answer.choices
    assert choice.index == 0 and choice.finish_reason == "stop" and choice.logprobs is None
    assert choice.message.role == "assistant" and choice.message.content
    assert not choice.message.tool_calls and choice.message.refusal is None
    usage = answer.usage
    assert usage.prompt_tokens > 5 and usage.completion_tokens > 3
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    raw = ai.chat.completions.with_raw_response.create(model=MODEL, messages=user(QUESTION), temperature=0)
    assert "chatcmpl-" + raw.headers["x-request-id"] == raw.parse().id


def whole_conversation(ai):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "text", "text": "What is 2 plus 3?"}]},
        {"role": "assistant", "content": "2 plus 3 is 5."},
        *user(QUESTION),
    ]
    long, short = ask(ai, messages=messages), ask(ai)
    assert long.usage.prompt_tokens > short.usage.prompt_tokens + 15


def max_tokens(ai):
    full = text_of(ask(ai))
    for name in ("max_tokens", "max_completion_tokens"):
        for count in (1, 2, 5):
            answer = ask(ai, **{"max_tokens": openai.omit, name: count})
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage.completion_tokens == count
            assert full.startswith(text_of(answer)), (full, text_of(answer))
    assert ask(ai, max_tokens=400, extra_body={"ignore_eos": True}).usage.completion_tokens == 400


def stream(ai):
    whole = ask(ai)
    for usage in (True, False):
        options = {"stream_options": {"include_usage": True}} if usage else {}
        fields = {"model": MODEL, "messages": user(QUESTION), "temperature": 0, "max_tokens": 40}
        chunks = list(ai.chat.completions.create(stream=True, **fields, **options))
        assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].id != whole.id
        assert len({(chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
        assert chunks[0].object == "chat.completion.chunk"
        if usage:
            *chunks, last = chunks
            assert last.choices == [] and last.usage == whole.usage
        assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
        choices = [chunk.choices[0] for chunk in chunks]
        assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
        # Exactly one reason to finish, in the last of them, which has no text.
        assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1].finish_reason == "stop" and not choices[-1].delta.content
        text = "".join(choice.delta.content or "" for choice in choices)
        assert text == text_of(whole)
        report(chunks[0].id, text, "stop", last.usage if usage else None)


def stream_comes_in_pieces(ai):
    fields = {"model": MODEL, "messages": user(QUESTION), "temperature": 0, "max_tokens": 500}
    chunks = list(ai.chat.completions.create(stream=True, **fields, extra_body={"ignore_eos": True}))
    report(chunks[0].id, "".join(chunk.choices[0].delta.content or "" for chunk in chunks), "length")
    assert len(chunks) > 10, len(chunks)


def stream_helper(ai):
    fields = {"model": MODEL, "messages": user(QUESTION), "temperature": 0}
    with ai.chat.completions.stream(**fields) as events:
        final = events.get_final_completion()
    report(final.id, text_of(final), final.choices[0].finish_reason)
    assert text_of(final) == text_of(ask(ai))


def seeds(ai):
    def drawn(seed):
        fields = {"temperature": 1.5, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
        return text_of(ask(ai, seed=seed, **fields))

    assert drawn(7) == drawn(7)
    assert len({drawn(seed) for seed in range(4)}) > 1, "seeds make no difference"
    assert len({drawn(openai.omit) for _ in range(4)}) > 1, "the gateway draws no seed"


def temperature_and_top_p(ai):
    fields = {"max_tokens": 40, "extra_body": {"ignore_eos": True}, "seed": 3}
    greedy = text_of(ask(ai, temperature=0, **fields))
    # The smallest nucleus holds one token, the likeliest, and so do the k likeliest for k = 1.
    assert text_of(ask(ai, temperature=1.5, **fields, top_p=1e-6)) == greedy
    fields["extra_body"] = {"ignore_eos": True, "top_k": 1}
    assert text_of(ask(ai, temperature=1.5, **fields)) == greedy


def logprobs(ai):
    plain = text_of(ask(ai))
    answer = ask(ai, logprobs=True, top_logprobs=3)
    assert text_of(answer) == plain, "what is told changes the answer"
    content = answer.choices[0].logprobs.content
    # The token that ends the answer is no part of it.
    assert len(content) == answer.usage.completion_tokens - 1
    assert bytes(byte for one in content for byte in one.bytes).decode() == plain
    for one in content:
        assert len(one.top_logprobs) == 3 and one.logprob <= 0
        assert [top.logprob for top in one.top_logprobs] == sorted((top.logprob for top in one.top_logprobs), reverse=True)
        # Greedily, the most probable one is taken.
        assert (one.token, one.logprob) == (one.top_logprobs[0].token, one.top_logprobs[0].logprob)
        assert sum(math.exp(top.logprob) for top in one.top_logprobs) < 1.0001
    fields = {"model": MODEL, "messages": user(QUESTION), "temperature": 0, "max_tokens": 40}
    chunks = list(ai.chat.completions.create(stream=True, logprobs=True, top_logprobs=3, **fields))
    choices = [chunk.choices[0] for chunk in chunks]
    streamed = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    report(chunks[0].id, "".join(choice.delta.content or "" for choice in choices), "stop")
    assert [one.token for one in streamed] == [one.token for one in content]
    assert all(abs(one.logprob - other.logprob) < 1e-3 for one, other in zip(streamed, content))
    assert ask(ai, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def token_id(text: str) -> str:
    """Of a token of printable ASCII: the tokenizer writes a space as another character."""
    return str(json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"][text.replace(" ", "\u0120")])


def penalties_and_bias(ai):
    fields = {"max_tokens": 120, "extra_body": {"ignore_eos": True}}

    def repeats(**more):
        words = text_of(ask(ai, **fields, **more)).split()
        return 1 - len(set(words)) / len(words)

    plain = repeats()
    assert plain > 0.2, "the model does not repeat itself, and nothing can be seen"
    for penalty in ("frequency_penalty", "presence_penalty"):
        assert repeats(**{penalty: 2}) < plain * 0.8, (penalty, plain, repeats(**{penalty: 2}))
    fields["extra_body"] = {"ignore_eos": True, "repetition_penalty": 1.8}
    assert repeats() < plain * 0.8, ("repetition_penalty", plain, repeats())

    first = ask(ai, logprobs=True, max_tokens=1)
    token = first.choices[0].logprobs.content[0].token
    assert text_of(ask(ai, max_tokens=1, logit_bias={token_id(token): -100})) != text_of(first)
    only = text_of(ask(ai, max_tokens=3, logit_bias={token_id("e"): 100}, extra_body={"ignore_eos": True}))
    assert only == "eee", only


def formats(ai):
    for temperature in (0, 1.5):
        answer = ask(ai, response_format={"type": "json_object"}, temperature=temperature, seed=1, max_tokens=400)
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text_of(answer)), dict), text_of(answer)

    class Basin(pydantic.BaseModel):
        kind: typing.Literal["river", "lake"]
        depth_m: typing.Annotated[int, pydantic.Field(ge=0, le=99)]
        full: bool

    for seed in range(3):
        fields = {"model": MODEL, "messages": user(QUESTION), "temperature": 1.5, "seed": seed}
        answer = ai.chat.completions.parse(response_format=Basin, **fields)
        report_whole(answer)
        assert 0 <= answer.choices[0].message.parsed.depth_m < 100
        # Streamed, it is the same.
        with ai.chat.completions.stream(response_format=Basin, **fields) as events:
            final = events.get_final_completion()
        report_whole(final)
        assert final.choices[0].message.parsed == answer.choices[0].message.parsed
    response = ai.responses.parse(model=MODEL, input=QUESTION, text_format=Basin, temperature=1.5, store=False)
    assert isinstance(response.output_parsed, Basin), response


def stop_strings(ai):
    full = text_of(ask(ai))
    middle = len(full) // 2
    stops = [
        # A word; a piece of two words; the first of several, in whatever order; all of it; nothing of it.
        full.split()[4],
        full[middle : middle + 5],
        [full[-3:], "never said", full[middle : middle + 4]],
        full,
        "never said",
    ]
    for stop in stops:
        answer = ask(ai, stop=stop)
        expected = min((full.partition(one)[0] for one in ([stop] if isinstance(stop, str) else stop)), key=len)
        assert text_of(answer) == expected, (stop, text_of(answer), expected)
        assert answer.choices[0].finish_reason == "stop"
        chunks = ai.chat.completions.create(
            model=MODEL, messages=user(QUESTION), temperature=0, max_tokens=40, stop=stop, stream=True
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == expected, (stop, streamed, expected)


def models(ai):
    (model,) = ai.models.list().data
    assert model.id == MODEL and model.object == "model" and model.created > 1_700_000_000
    assert ai.models.retrieve(MODEL) == model
    fails(openai.NotFoundError, "model_not_found", lambda: ai.models.retrieve("nobody/nothing"))


def together(ai):
    faq = [(questions[0], answer) for questions, answer in FAQ[:16]]
    alone = [text_of(ask(ai, question)) for question, _ in faq]

    async def all_at_once():
        ai_async = openai.AsyncOpenAI(base_url=ai.base_url, api_key="none", max_retries=0, timeout=TIMEOUT_S)
        async with ai_async:
            fields = {"model": MODEL, "temperature": 0, "max_tokens": 40}
            each = (ai_async.chat.completions.create(messages=user(question), **fields) for question, _ in faq)
            return await asyncio.gather(*each)

    answers = asyncio.run(all_at_once())
    for answer in answers:
        report_whole(answer)
    assert [text_of(answer) for answer in answers] == alone, "an answer depends on who else is served"
    assert len(set(alone)) == len(faq) and len({answer.id for answer in answers}) == len(faq)
    right = sum(text == answer for text, (_, answer) in zip(alone, faq))
    assert right >= 14, f"{right} of {len(faq)} answers are right"


def fails(kind, code, attempt, param=None):
    try:
        attempt()
    except openai.APIStatusError as error:
        assert type(error) is kind, (kind, error)
        assert error.code == code, (code, error.body)
        assert param is None or error.param == param, (param, error.body)
        if str(error.request.url).endswith("/chat/completions"):
            assert error.response.headers["x-request-id"]
        assert len(error.body["message"]) > 10, error.body
    else:
        raise AssertionError(f"no {kind.__name__} ({code})")


def errors(ai):
    bad = openai.BadRequestError
    fails(openai.NotFoundError, "model_not_found", lambda: ask(ai, model="gpt-none"), "model")
    fails(bad, "context_length_exceeded", lambda: ask(ai, "word " * 5000), "messages")
    fails(bad, "context_length_exceeded", lambda: ask(ai, max_tokens=5000))
    fails(bad, "invalid_value", lambda: ask(ai, temperature=3), "temperature")
    fails(bad, "invalid_value", lambda: ask(ai, top_p=0), "top_p")
    fails(bad, "invalid_value", lambda: ask(ai, max_tokens=0), "max_tokens")
    fails(bad, "invalid_value", lambda: ask(ai, messages=[]), "messages")
    fails(bad, "invalid_value", lambda: ask(ai, stop=["a", "b", "c", "d", "e"]), "stop")
    fails(bad, "invalid_type", lambda: ask(ai, temperature="warm"), "temperature")
    fails(bad, "unsupported_parameter", lambda: ask(ai, n=2), "n")
    fails(bad, "invalid_value", lambda: ask(ai, presence_penalty=3), "presence_penalty")
    fails(bad, "invalid_value", lambda: ask(ai, logit_bias={"99999999": 1}), "logit_bias")
    fails(bad, "invalid_value", lambda: ask(ai, top_logprobs=3), "top_logprobs")
    unknown = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "cloud"}}}
    fails(bad, "invalid_value", lambda: ask(ai, response_format=unknown), "response_format")
    # A request that was refused costs nothing, and a stream is refused before it begins.
    fails(openai.NotFoundError, "model_not_found", lambda: ask(ai, model="gpt-none", stream=True))
    fails(openai.NotFoundError, "not_found", lambda: ai.embeddings.create(model=MODEL, input="a"))


CASES = [
    whole_answer,
    whole_conversation,
    max_tokens,
    stream,
    stream_comes_in_pieces,
    stream_helper,
    seeds,
    temperature_and_top_p,
    logprobs,
    penalties_and_bias,
    formats,
    stop_strings,
    models,
    together,
    errors,
]

if __name__ == "__main__":
    with client(sys.argv[1]) as ai:
        for case in CASES:
            begun = time.monotonic()
            case(ai)
            print(f"{case.__name__}: ok after {time.monotonic() - begun:.2f} s", file=sys.stderr)
