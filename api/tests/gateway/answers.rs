//! What a client reads when all goes well.

use crate::site::{Events, Site, ask, card, id_of};
use forebay_schemas::{
    event::{Body, FinishReason, KvTransferred, PrefillClaimed, PrefillCompleted, PrefillQueued},
    ids::WorkerId,
    openai::ChatChunk,
    sampling::{Logprobs, TokenLogprob},
};
use serde_json::{Value, json};
use std::time::Duration;

const PIECES: [&str; 4] = ["Wat", "er, \"w", "", "aits\n漢😀"];

#[tokio::test]
async fn a_whole_answer_has_openais_shape() {
    let site = Site::start().await;
    let worker = async {
        let mut attempt = site.claim().await;
        for piece in PIECES {
            attempt.text(piece).await;
        }
        attempt.complete(FinishReason::Stop).await;
    };
    let (response, ()) = tokio::join!(site.post(ask(json!({ "seed": 5, "max_tokens": 9 }))), worker);
    assert_eq!(response.status(), 200);
    let id = id_of(&response);
    let log = site.streams.log.read(&site.log(id), 0).await.unwrap();
    let Body::RequestAccepted(accepted) = &log[0].event.body else { panic!("first event") };
    let prompt = accepted.prompt.len();
    assert_eq!((accepted.sampling.seed, accepted.max_tokens, accepted.timeout_ms), (5, 9, 600_000));

    let mut body: Value = response.json().await.unwrap();
    let created = body["created"].take().as_u64().unwrap();
    assert_eq!(created, log[0].event.time_us / 1_000_000);
    assert_eq!(
        body,
        json!({
            "id": format!("chatcmpl-{id}"),
            "object": "chat.completion",
            "created": null,
            "model": "demo",
            "system_fingerprint": "fb_0000000000000abc",
            "choices": [{
                "index": 0,
                "message": { "role": "assistant", "content": PIECES.concat(), "refusal": null },
                "logprobs": null,
                "finish_reason": "stop",
            }],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": 4,
                "total_tokens": prompt + 4,
                "prompt_tokens_details": { "cached_tokens": 0 },
            },
        })
    );
}

/// What is told of tokens, in one piece and in a stream: also of those whose text is held back.
#[tokio::test]
async fn logprobs_have_openais_shape() {
    let site = Site::start().await;
    let probable = |token, bytes: &[u8], logprob| TokenLogprob { token, bytes: bytes.to_vec(), logprob };
    let told = [
        Logprobs {
            drawn: probable(7, &[0xe6, 0xbc], -0.5),
            top: vec![probable(7, &[0xe6, 0xbc], -0.5), probable(9, b"a", -1.25)],
        },
        Logprobs { drawn: probable(8, &[0xa2], -0.125), top: vec![] },
    ];
    let entries = json!([
        { "token": "\u{fffd}", "logprob": -0.5, "bytes": [0xe6, 0xbc], "top_logprobs": [
            { "token": "\u{fffd}", "logprob": -0.5, "bytes": [0xe6, 0xbc] },
            { "token": "a", "logprob": -1.25, "bytes": [97] },
        ] },
        { "token": "\u{fffd}", "logprob": -0.125, "bytes": [0xa2], "top_logprobs": [] },
    ]);
    for stream in [false, true] {
        let asked = site.post(ask(json!({ "logprobs": true, "top_logprobs": 2, "stream": stream })));
        let worker = async {
            let mut attempt = site.claim().await;
            assert_eq!(attempt.writer.state().accepted.sampling.logprobs, Some(2));
            attempt.told("", told[0].clone()).await;
            attempt.told("漢", told[1].clone()).await;
            attempt.complete(FinishReason::Stop).await;
        };
        let (response, ()) = tokio::join!(asked, worker);
        if !stream {
            let body: Value = response.json().await.unwrap();
            assert_eq!(body["choices"][0]["logprobs"], json!({ "content": entries, "refusal": null }));
            continue;
        }
        let chunks: Vec<Value> =
            Events::of(response).events().await.iter().take(3).map(|event| event.json()).collect();
        for (number, text) in ["", "漢"].into_iter().enumerate() {
            let choice = &chunks[number]["choices"][0];
            assert_eq!(choice["delta"]["content"], text);
            assert_eq!(choice["logprobs"], json!({ "content": [entries[number]], "refusal": null }));
        }
        assert_eq!(chunks[2]["choices"][0]["logprobs"], Value::Null);
    }
}

#[tokio::test]
async fn a_stream_has_openais_shape_and_the_logs_text() {
    let site = Site::start().await;
    let response =
        site.post(ask(json!({ "stream": true, "stream_options": { "include_usage": true } }))).await;
    let id = id_of(&response);
    let mut events = Events::of(response);
    let mut attempt = site.claim().await;
    for piece in PIECES {
        attempt.text(piece).await;
    }
    attempt.complete(FinishReason::Length).await;
    let events = events.rest().await;
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks: Vec<ChatChunk> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();

    let (usage, chunks) = chunks.split_last().unwrap();
    assert!(usage.choices.is_empty());
    assert_eq!(usage.usage.unwrap().completion_tokens, 4);
    assert!(chunks.iter().all(|chunk| chunk.usage.is_none()));

    let texts: Vec<&str> =
        chunks.iter().filter_map(|chunk| chunk.choices[0].delta.content.as_deref()).collect();
    assert_eq!(texts, [PIECES[0], PIECES[1], PIECES[3]], "one chunk for each event with text");
    let log = site.streams.log.read(&site.log(id), 0).await.unwrap();
    let state = forebay_schemas::lifecycle::Lifecycle::fold(log.iter().map(|r| &r.event)).unwrap().unwrap();
    assert_eq!(texts.concat(), state.text);

    for (index, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk.id, format!("chatcmpl-{id}"));
        assert_eq!((chunk.object.as_str(), chunk.model.as_str()), ("chat.completion.chunk", "demo"));
        assert_eq!(chunk.choices[0].delta.role.is_some(), index == 0, "the role comes first and once");
        let last = index == chunks.len() - 1;
        assert_eq!(chunk.choices[0].finish_reason, last.then_some(FinishReason::Length));
    }
}

#[tokio::test]
async fn a_stream_without_options_says_nothing_of_usage() {
    let site = Site::start().await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    let mut attempt = site.claim().await;
    attempt.text("a").await;
    attempt.complete(FinishReason::Stop).await;
    let events = events.rest().await;
    assert_eq!(events.len(), 3);
    assert!(events.iter().all(|event| !event.contains("usage")));
}

#[tokio::test]
async fn the_first_token_of_a_remote_prefill_is_streamed_before_the_kv_has_moved() {
    let site = Site::start().await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    let mut attempt = site.claim().await;
    let worker = WorkerId::new("prefill-1").unwrap();
    let queued =
        PrefillQueued { tokens: 9, reason: "long".into(), cached_tokens: 0, layout_hash: None, kv: None };
    let claimed = PrefillClaimed { worker: worker.clone(), ack_subject: String::new(), delivery: 1 };
    let done = PrefillCompleted {
        worker,
        first_index: 0,
        token: 3,
        text: "First".into(),
        compute_us: 1,
        cached_tokens: 0,
        logprobs: None,
    };
    attempt.writer.append(Body::PrefillQueued(queued)).await.unwrap();
    attempt.writer.append(Body::PrefillClaimed(claimed)).await.unwrap();
    attempt.writer.append(Body::PrefillCompleted(done)).await.unwrap();
    assert_eq!(events.chunk().await.choices[0].delta.content.as_deref(), Some("First"));

    let moved = KvTransferred { bytes: 1, tokens: 9, read_us: 1, after_us: 0, transport: "shm".into() };
    attempt.writer.append(Body::KvTransferred(moved)).await.unwrap();
    attempt.text(" second").await;
    assert_eq!(events.chunk().await.choices[0].delta.content.as_deref(), Some(" second"));
}

#[tokio::test]
async fn a_second_attempt_goes_on_where_the_first_stopped() {
    let site = Site::start().await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    let mut first = site.claim().await;
    first.text("one ").await;
    let claimed = forebay_schemas::event::Claimed {
        worker: WorkerId::new("worker-2").unwrap(),
        ack_subject: String::new(),
        delivery: 2,
        engine: None,
    };
    first.writer.append(Body::Claimed(claimed)).await.unwrap();
    first.text("two").await;
    first.complete(FinishReason::Stop).await;
    assert_eq!(events.chunk().await.choices[0].delta.content.as_deref(), Some("one "));
    assert_eq!(events.chunk().await.choices[0].delta.content.as_deref(), Some("two"));
}

#[tokio::test]
async fn a_request_without_a_worker_waits_for_one() {
    let site = Site::start().await;
    let worker = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut attempt = site.claim().await;
        attempt.text("late").await;
        attempt.complete(FinishReason::Stop).await;
    };
    let (response, ()) = tokio::join!(site.post(ask(json!({}))), worker);
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["choices"][0]["message"]["content"], "late");
}

#[tokio::test]
async fn a_long_prompt_is_tokenized_like_a_short_one() {
    let site = Site::start().await;
    let mut long = card(&site.streams, "demo").await;
    long.context_tokens = 100_000;
    site.streams.catalog.publish_model(&long).await.unwrap();
    let text = "water waits in the forebay ".repeat(400);
    let request =
        json!({ "model": "demo", "stream": true, "messages": [{ "role": "user", "content": text }] });
    let response = site.post(request.clone()).await;
    let log = site.streams.log.read(&site.log(id_of(&response)), 0).await.unwrap();
    let Body::RequestAccepted(accepted) = &log[0].event.body else { panic!("first event") };
    assert!(accepted.prompt.len() > 2000);
    assert_eq!(accepted.max_tokens as usize, 100_000 - accepted.prompt.len());
}

#[tokio::test]
async fn silence_is_filled_with_comments() {
    let config = forebay_api::GatewayConfig { keep_alive: Duration::from_millis(200), ..Default::default() };
    let site = Site::with(forebay_streams::memory::streams(), config).await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    assert_eq!(events.next().await.unwrap(), ": waiting");
    assert_eq!(events.next().await.unwrap(), ": waiting");
    let mut attempt = site.claim().await;
    attempt.text("now").await;
    let mut next = events.next().await.unwrap();
    while next == ": waiting" {
        next = events.next().await.unwrap();
    }
    assert!(next.contains("now"));
}
