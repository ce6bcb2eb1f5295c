//! The Responses API.

use crate::{
    endings::AT_ONCE,
    errors::refused,
    site::{Events, Site, Sse, id_of},
};
use forebay_schemas::{
    event::{Body, FailureCode, FinishReason, RequestAccepted, RequestFailed},
    ids::RequestId,
    openai::{ResponseObject, ResponseStatus},
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const RESPONSES: &str = "/v1/responses";

fn path(request: RequestId) -> String {
    format!("{RESPONSES}/resp_{request}")
}

fn ask(more: Value) -> Value {
    let mut request = json!({ "model": "demo", "input": "What waits?" });
    let Value::Object(more) = more else { panic!("fields") };
    request.as_object_mut().unwrap().extend(more);
    request
}

async fn post(site: &Site, more: Value) -> reqwest::Response {
    site.post_to(RESPONSES, &[], ask(more)).await
}

async fn get(site: &Site, request: RequestId) -> ResponseObject {
    let response = site.get(&path(request)).await;
    assert_eq!((response.status().as_u16(), id_of(&response)), (200, request));
    response.json().await.unwrap()
}

async fn events(site: &Site, request: RequestId, after: Option<usize>) -> Vec<Sse> {
    let after = after.map_or(String::new(), |number| format!("&starting_after={number}"));
    Events::of(site.get(&format!("{}?stream=true{after}", path(request))).await).events().await
}

async fn accepted(site: &Site, request: RequestId) -> RequestAccepted {
    let log = site.streams.log.read(&site.log(request), 0).await.unwrap();
    let Body::RequestAccepted(accepted) = &log[0].event.body else { panic!("first event") };
    accepted.clone()
}

#[tokio::test]
async fn a_response_has_openais_shape() {
    let site = Site::start().await;
    let fields = json!({
        "instructions": "Be brief.", "max_output_tokens": 9, "temperature": 0.5, "metadata": { "for": "test" },
    });
    let (response, ()) = tokio::join!(post(&site, fields), site.serve(&["Wat", "er"]));
    let request = id_of(&response);
    let prompt = accepted(&site, request).await.prompt.len();
    let mut body: Value = response.json().await.unwrap();
    assert_eq!(serde_json::to_value(get(&site, request).await).unwrap(), body);
    body["created_at"].take();
    assert_eq!(
        body,
        json!({
            "id": format!("resp_{request}"),
            "object": "response",
            "created_at": null,
            "status": "completed",
            "background": false,
            "error": null,
            "incomplete_details": null,
            "instructions": "Be brief.",
            "max_output_tokens": 9,
            "metadata": { "for": "test" },
            "model": "demo",
            "output": [{
                "id": format!("msg_{request}"),
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [{ "type": "output_text", "text": "Water", "annotations": [], "logprobs": [] }],
            }],
            "parallel_tool_calls": true,
            "previous_response_id": null,
            "store": true,
            "temperature": 0.5,
            "text": { "format": { "type": "text" } },
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "truncation": "disabled",
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": { "cached_tokens": 0 },
                "output_tokens": 2,
                "output_tokens_details": { "reasoning_tokens": 0 },
                "total_tokens": prompt + 2,
            },
        })
    );
}

#[tokio::test]
async fn a_stream_tells_what_openais_does_and_can_be_taken_up_anywhere() {
    let site = Site::start().await;
    let another = site.another().await;
    for (reason, end) in
        [(FinishReason::Stop, "response.completed"), (FinishReason::Length, "response.incomplete")]
    {
        let response = post(&site, json!({ "stream": true })).await;
        let request = id_of(&response);
        let mut stream = Events::of(response);
        let mut attempt = site.claim().await;
        for piece in ["Wat", "", "er"] {
            attempt.text(piece).await;
        }
        attempt.complete(reason).await;
        let all = stream.events().await;
        let names: Vec<&str> = all.iter().map(|event| event.event.as_deref().unwrap()).collect();
        let expected = [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            end,
        ];
        assert_eq!(names, expected);
        for (number, event) in all.iter().enumerate() {
            let data = event.json();
            assert_eq!(event.id, Some(format!("{request}/{number}")));
            assert_eq!((&data["type"], &data["sequence_number"]), (&json!(event.event), &json!(number)));
        }
        assert_eq!(all[0].json()["response"]["status"], "queued");
        assert_eq!(all[1].json()["response"]["status"], "in_progress");
        assert_eq!((&all[4].json()["delta"], &all[5].json()["delta"]), (&json!("Wat"), &json!("er")));
        assert_eq!(all[6].json()["text"], "Water");
        let whole = serde_json::to_value(get(&another, request).await).unwrap();
        assert_eq!(all[9].json()["response"], whole);
        let (status, details) = match reason {
            FinishReason::Stop => ("completed", Value::Null),
            FinishReason::Length => ("incomplete", json!({ "reason": "max_output_tokens" })),
        };
        assert_eq!((&whole["status"], &whole["incomplete_details"]), (&json!(status), &details));
        for gateway in [&site, &another] {
            assert_eq!(events(gateway, request, None).await, all);
            for read in 0..all.len() {
                assert_eq!(events(gateway, request, Some(read)).await, all[read + 1..]);
            }
        }
        let last = [("last-event-id", all[4].id.as_deref().unwrap())];
        assert_eq!(
            Events::of(another.post_to(RESPONSES, &last, ask(json!({}))).await).events().await,
            all[5..]
        );
    }
}

#[tokio::test]
async fn the_background_answers_at_once_and_goes_on() {
    let site = Site::start().await;
    let another = site.another().await;
    let response = post(&site, json!({ "background": true })).await;
    let request = id_of(&response);
    let queued: ResponseObject = response.json().await.unwrap();
    assert_eq!((queued.status, queued.background, queued.output.len()), (ResponseStatus::Queued, true, 0));
    assert_eq!(get(&another, request).await, queued);
    let mut attempt = site.claim().await;
    assert_eq!(get(&another, request).await.status, ResponseStatus::InProgress);
    attempt.text("one ").await;
    let under_way = get(&another, request).await;
    assert_eq!((under_way.status, under_way.usage), (ResponseStatus::InProgress, None));
    let mut stream =
        Events::of(another.get(&format!("{}?stream=true&starting_after=3", path(request))).await);
    assert_eq!(stream.event().await.unwrap().json()["delta"], "one ");
    attempt.text("two").await;
    attempt.complete(FinishReason::Stop).await;
    assert_eq!(stream.events().await.last().unwrap().event.as_deref(), Some("response.completed"));
    let done = get(&another, request).await;
    assert_eq!(
        (done.status, done.output[0].content[0].text.as_str()),
        (ResponseStatus::Completed, "one two")
    );
}

#[tokio::test]
async fn a_response_can_be_cancelled_anywhere() {
    let site = Site::start().await;
    let another = site.another().await;
    let mut stream = Events::of(post(&site, json!({ "background": true, "stream": true })).await);
    let mut attempt = site.claim().await;
    attempt.text("half").await;
    let request = attempt.writer.log().request;
    let cancel = format!("{}/cancel", path(request));
    let asked = Instant::now();
    let cancelled: ResponseObject = another.post_to(&cancel, &[], json!({})).await.json().await.unwrap();
    assert_eq!(cancelled.status, ResponseStatus::Cancelled);
    let events = stream.events().await;
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
    let last = events.last().unwrap();
    assert_eq!(last.event.as_deref(), Some("response.failed"));
    assert_eq!(last.json()["response"]["status"], "cancelled");
    assert_eq!(get(&site, request).await, cancelled);
    assert_eq!(
        site.post_to(&cancel, &[], json!({})).await.json::<ResponseObject>().await.unwrap(),
        cancelled
    );
    let unknown = format!("{}/cancel", path(RequestId::new()));
    refused(site.post_to(&unknown, &[], json!({})).await, 404, "request_not_found", None).await;
}

#[tokio::test]
async fn a_response_that_fails_says_why() {
    let site = Site::start().await;
    let mut stream = Events::of(post(&site, json!({ "stream": true })).await);
    let mut attempt = site.claim().await;
    attempt.text("half").await;
    let failed = RequestFailed { code: FailureCode::EngineFailed, message: "as it is".into() };
    attempt.end(Body::RequestFailed(failed)).await;
    let request = attempt.writer.log().request;
    let last = stream.events().await.pop().unwrap();
    assert_eq!(last.event.as_deref(), Some("response.failed"));
    let error = json!({ "code": "engine_failed", "message": "as it is" });
    assert_eq!(
        (&last.json()["response"]["status"], &last.json()["response"]["error"]),
        (&json!("failed"), &error)
    );
    let object = get(&site, request).await;
    assert_eq!(
        (object.status, object.output[0].status),
        (ResponseStatus::Failed, ResponseStatus::Incomplete)
    );
    let worker = async {
        let mut attempt = site.claim().await;
        let failed = RequestFailed { code: FailureCode::EngineFailed, message: "as it is".into() };
        attempt.end(Body::RequestFailed(failed)).await;
    };
    let (response, ()) = tokio::join!(post(&site, json!({})), worker);
    refused(response, 500, "engine_failed", None).await;
}

#[tokio::test]
async fn a_conversation_goes_on_from_a_stored_response() {
    let site = Site::start().await;
    let another = site.another().await;
    let turn = async |more: Value, answer: &str| {
        let pieces = [answer];
        let (response, ()) = tokio::join!(another.post_to(RESPONSES, &[], ask(more)), site.serve(&pieces));
        let request = id_of(&response);
        assert_eq!(response.status(), 200, "{}", response.text().await.unwrap());
        request
    };
    let first = turn(json!({ "instructions": "Not kept." }), "Water.").await;
    let fields = json!({ "previous_response_id": format!("resp_{first}"), "input": "Where?" });
    let second = turn(fields, "In the basin.").await;
    let third = json!([{ "role": "user", "content": [{ "type": "input_text", "text": "Why?" }] }]);
    let fields = json!({
        "previous_response_id": format!("resp_{second}"), "input": third, "instructions": "Be brief.",
    });
    // What it came from may be gone.
    assert_eq!(site.delete(&path(first)).await.status(), 200);
    let third = turn(fields, "It must.").await;
    let messages = json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": "What waits?" },
        { "role": "assistant", "content": "Water." },
        { "role": "user", "content": "Where?" },
        { "role": "assistant", "content": "In the basin." },
        { "role": "user", "content": "Why?" },
    ]);
    let chat = json!({ "model": "demo", "messages": messages });
    let (chat, ()) = tokio::join!(another.post(chat), site.serve(&["."]));
    let (chat, third) = (accepted(&another, id_of(&chat)).await, accepted(&another, third).await);
    assert_eq!(third.prompt, chat.prompt);

    for (unknown, status, code) in [
        (format!("resp_{first}"), 400, "previous_response_not_found"),
        ("nobody".into(), 400, "previous_response_not_found"),
        (format!("chatcmpl-{}", RequestId::new()), 400, "previous_response_not_found"),
    ] {
        let refuse = post(&site, json!({ "previous_response_id": unknown })).await;
        refused(refuse, status, code, Some("previous_response_id")).await;
    }
    let running = id_of(&post(&site, json!({ "background": true })).await);
    let refuse = post(&site, json!({ "previous_response_id": format!("resp_{running}") })).await;
    refused(refuse, 400, "invalid_value", Some("previous_response_id")).await;
}

#[tokio::test]
async fn what_is_not_to_be_stored_is_not_there() {
    let site = Site::start().await;
    let (response, ()) = tokio::join!(post(&site, json!({ "store": false })), site.serve(&["a"]));
    let request = id_of(&response);
    assert_eq!(response.status(), 200);
    refused(site.get(&path(request)).await, 404, "request_not_found", None).await;
    refused(site.delete(&path(request)).await, 404, "request_not_found", None).await;
    let refuse = post(&site, json!({ "previous_response_id": format!("resp_{request}") })).await;
    refused(refuse, 400, "previous_response_not_found", Some("previous_response_id")).await;
    // The other endpoint does not have it either.
    let (response, ()) = tokio::join!(post(&site, json!({})), site.serve(&["a"]));
    let chat = format!("/v1/chat/completions/{}", id_of(&response));
    refused(site.get(&chat).await, 404, "request_not_found", None).await;
}

#[tokio::test]
async fn a_client_that_leaves_is_not_missed() {
    let site = Site::start().await;
    let mut stream = Events::of(post(&site, json!({ "stream": true })).await);
    let mut attempt = site.claim().await;
    attempt.text("one").await;
    stream.event().await;
    drop(stream);
    tokio::time::sleep(AT_ONCE).await;
    attempt.complete(FinishReason::Stop).await;

    // Unless the response is nobody's afterwards.
    let stream = Events::of(post(&site, json!({ "stream": true, "store": false })).await);
    let attempt = site.claim().await;
    drop(stream);
    site.until(attempt.writer.log(), Body::is_terminal).await;
}

#[tokio::test]
async fn deleted_responses_are_gone() {
    let site = Site::start().await;
    let (response, ()) = tokio::join!(post(&site, json!({})), site.serve(&["a"]));
    let request = id_of(&response);
    let deleted: Value = site.delete(&path(request)).await.json().await.unwrap();
    assert_eq!(deleted, json!({ "id": format!("resp_{request}"), "object": "response", "deleted": true }));
    refused(site.get(&path(request)).await, 404, "request_not_found", None).await;
    refused(site.get(&format!("{}?stream=true", path(request))).await, 404, "request_not_found", None).await;
}

#[tokio::test]
async fn what_is_no_request_for_a_response_is_refused_by_name() {
    let site = Site::start().await;
    for (more, code, param) in [
        (json!({ "tools": [{ "type": "web_search" }] }), "unsupported_parameter", "tools"),
        (json!({ "input": [{ "type": "function_call" }] }), "unsupported_parameter", "input[0].type"),
        (json!({ "input": [{ "role": "king" }] }), "invalid_value", "input[0].role"),
        (json!({ "input": null }), "missing_required_parameter", "input"),
        (json!({ "max_output_tokens": 0 }), "invalid_value", "max_output_tokens"),
        (json!({ "max_output_tokens": 600 }), "context_length_exceeded", "input"),
        (json!({ "temperature": 3 }), "invalid_value", "temperature"),
        (json!({ "input": "refuse me" }), "chat_template_failed", "input"),
        (json!({ "background": true, "store": false }), "invalid_value", "store"),
    ] {
        refused(post(&site, more).await, 400, code, Some(param)).await;
    }
    let wrong = format!("{}?stream=true&starting_after=x", path(RequestId::new()));
    refused(site.get(&wrong).await, 400, "invalid_value", Some("starting_after")).await;
}

#[tokio::test]
async fn a_key_holds_for_both_endpoints() {
    let site = Site::start().await;
    let another = site.another().await;
    let key = [("idempotency-key", "k")];
    let first = site.post_to(RESPONSES, &key, ask(json!({ "background": true }))).await;
    site.serve(&["once"]).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let again = another.post_to(RESPONSES, &key, ask(json!({ "background": true }))).await;
    assert_eq!(id_of(&first), id_of(&again));
    assert_eq!(again.json::<ResponseObject>().await.unwrap().status, ResponseStatus::Completed);
    let chat = site.post_to("/v1/chat/completions", &key, crate::site::ask(json!({}))).await;
    refused(chat, 422, "idempotency_key_reused", Some("Idempotency-Key")).await;
}
