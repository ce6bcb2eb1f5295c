"""What outlives a connection, through OpenAI's own client: BASE_URL OTHER_URL, of two gateways. Workers simulate."""

import sys
import time

import openai

from report import MODEL, client, report, report_whole, user

ENDS = {"completed": "stop", "incomplete": "length"}


def chat(ai, question="Say something.", tokens=20, **fields):
    body = {"ignore_eos": True}
    return ai.chat.completions.create(
        model=MODEL, messages=user(question), max_tokens=tokens, seed=1, extra_body=body, **fields
    )


def respond(ai, question="Say something.", tokens=20, **fields):
    body = {"ignore_eos": True, "seed": 1}
    return ai.responses.create(model=MODEL, input=question, max_output_tokens=tokens, extra_body=body, **fields)


def report_response(response):
    report(response.id, response.output_text, ENDS[response.status])


def ended(ai, response):
    while response.status in ("queued", "in_progress"):
        time.sleep(0.02)
        response = ai.responses.retrieve(response.id)
    return response


def fails(kind, code, attempt):
    try:
        attempt()
    except openai.APIStatusError as error:
        assert type(error) is kind and error.code == code, error
    else:
        raise AssertionError(f"no {kind.__name__} ({code})")


def stored_chat(ai, other):
    answer = chat(ai, store=True, metadata={"for": "test"})
    report_whole(answer)
    for gateway in (ai, other):
        again = gateway.chat.completions.retrieve(answer.id)
        assert again == answer and again.metadata == {"for": "test"}, again
    assert other.chat.completions.delete(answer.id).deleted
    fails(openai.NotFoundError, "request_not_found", lambda: ai.chat.completions.retrieve(answer.id))
    fails(openai.NotFoundError, "request_not_found", lambda: ai.chat.completions.retrieve(chat(ai).id))


def one_key(ai, other):
    key = {"Idempotency-Key": "order 7"}
    answer = chat(ai, extra_headers=key)
    report_whole(answer)
    assert chat(other, extra_headers=key) == answer
    fails(
        openai.UnprocessableEntityError,
        "idempotency_key_reused",
        lambda: chat(other, "Say something else.", extra_headers=key),
    )
    key = {"Idempotency-Key": "order 8"}
    response = respond(ai, background=True, extra_headers=key)
    assert respond(other, background=True, extra_headers=key).id == response.id
    report_response(ended(other, response))


def whole(ai, other):
    response = respond(ai, instructions="Be brief.", metadata={"for": "test"})
    assert response.id.startswith("resp_") and response.status == "incomplete", response
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 20 and response.output[0].role == "assistant"
    assert response.metadata == {"for": "test"} and response.instructions == "Be brief."
    report_response(response)
    assert other.responses.retrieve(response.id) == response
    other.responses.delete(response.id)
    fails(openai.NotFoundError, "request_not_found", lambda: ai.responses.retrieve(response.id))


def background(ai, other):
    response = respond(ai, tokens=60, background=True)
    assert response.status == "queued" and response.background, response
    response = ended(other, response)
    assert response.status == "incomplete"
    report_response(response)


def stream(ai, other):
    events = list(respond(ai, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    last = events[-1].response
    assert last.output_text == text == events[-4].text
    report_response(last)
    for gateway in (ai, other):
        for read in (0, 3, 5, len(events) - 2, len(events) - 1):
            rest = gateway.responses.retrieve(last.id, stream=True, starting_after=read)
            assert list(rest) == events[read + 1 :]


def stream_helper(ai, other):
    fields = {"model": MODEL, "input": "Say something.", "max_output_tokens": 20}
    with ai.responses.stream(**fields, extra_body={"ignore_eos": True}) as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert deltas, "the helper understands the events"


def stream_taken_up(ai, other):
    first = respond(ai, tokens=100, background=True, stream=True)
    read = []
    for event in first:
        read.append(event)
        if len(read) == 20:
            break
    first.close()
    id_ = read[0].response.id
    read += other.responses.retrieve(id_, stream=True, starting_after=read[-1].sequence_number)
    assert [event.sequence_number for event in read] == list(range(len(read)))
    text = "".join(event.delta for event in read if event.type == "response.output_text.delta")
    assert text == read[-1].response.output_text
    report_response(read[-1].response)


def cancelled(ai, other):
    response = respond(ai, tokens=3000, background=True)
    while ai.responses.retrieve(response.id).status == "queued":
        time.sleep(0.02)
    asked = time.monotonic()
    response = other.responses.cancel(response.id)
    assert response.status == "cancelled" and time.monotonic() - asked < 1, response
    assert ai.responses.retrieve(response.id).status == "cancelled"
    assert other.responses.cancel(response.id).status == "cancelled"
    *_, last = ai.responses.retrieve(response.id, stream=True)
    assert last.type == "response.failed" and last.response.status == "cancelled"
    report(response.id, response.output_text)


def conversation(ai, other):
    first = respond(ai)
    second = respond(other, "And then?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens + 20
    spelled_out = [
        *user("Say something."),
        {"role": "assistant", "content": [{"type": "output_text", "text": first.output_text}]},
        *user("And then?"),
    ]
    assert respond(ai, spelled_out).output_text == second.output_text
    report_response(second)
    missing = "resp_" + "0" * 32
    fails(
        openai.BadRequestError,
        "previous_response_not_found",
        lambda: respond(ai, previous_response_id=missing),
    )


def refused(ai, other):
    bad = openai.BadRequestError
    fails(bad, "unsupported_parameter", lambda: respond(ai, tools=[{"type": "web_search"}]))
    fails(bad, "unsupported_parameter", lambda: respond(ai, reasoning={"effort": "low"}))
    fails(bad, "context_length_exceeded", lambda: respond(ai, "word " * 9000))
    fails(openai.NotFoundError, "request_not_found", lambda: ai.responses.retrieve("resp_" + "0" * 32))


CASES = [
    stored_chat,
    one_key,
    whole,
    background,
    stream,
    stream_helper,
    stream_taken_up,
    cancelled,
    conversation,
    refused,
]

if __name__ == "__main__":
    with client(sys.argv[1]) as ai, client(sys.argv[2]) as other:
        for case in CASES:
            begun = time.monotonic()
            case(ai, other)
            print(f"{case.__name__}: ok after {time.monotonic() - begun:.2f} s", file=sys.stderr)
