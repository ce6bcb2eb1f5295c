//! A client that lost its stream, or its gateway, gets the rest at another one. Workers simulate.

use forebay_schemas::{lifecycle::Phase, task::Role};
use forebay_tests::{Chat, Deployment, soon};
use rustix::process::Signal;
use serde_json::json;
use std::time::Duration;

/// Time of one token: slow enough for something to happen in between.
const STEP: Duration = Duration::from_millis(15);

/// Tokens of an answer that something happens to. They take three seconds.
const TOKENS: u32 = 200;

async fn simulating() -> Deployment {
    let mut deployment = Deployment::start().await;
    deployment.simulate(STEP);
    deployment
}

fn chat() -> Chat {
    Chat::new("Go on, whoever asks.").tokens(TOKENS).seed(42)
}

/// Every gateway that the stream comes through is killed in the midst of it, but for the last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_outlives_one_gateway_after_the_other() {
    let deployment = simulating().await;
    let (_decode, _prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let mut gateway = deployment.gateway(&[]).await;
    let mut stream = gateway.client.stream(&chat()).await;
    for read in [60, 200, 350] {
        stream.read_text(read).await;
        let next = deployment.gateway(&[]).await;
        gateway.process.kill();
        // What was on its way is still read.
        stream.read_text(usize::MAX).await;
        stream = next.client.resume(&stream).await;
        gateway = next;
    }
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.phase, state.tokens.len() as u32), (Phase::Completed, TOKENS));
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
}

/// Wherever it is cut, the rest is the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_are_cut_and_taken_up_elsewhere() {
    let mut deployment = simulating().await;
    deployment.simulate(Duration::from_millis(3));
    let _decode = deployment.decode().await;
    let (one, two) = tokio::join!(deployment.gateway(&[]), deployment.gateway(&[]));
    for round in 0..12 {
        let (from, to) = if round % 2 == 0 { (&one, &two) } else { (&two, &one) };
        let chat = chat().tokens(60).seed(round).with("store", json!(true));
        let mut stream = from.client.stream(&chat).await;
        stream.read_text(15 * round as usize).await;
        let rest = to.client.resume(&stream).await;
        drop(stream);
        let state = deployment.check(&rest.rest().await).await;
        assert_eq!(state.phase, Phase::Completed);
    }
    deployment.all_slots_free().await;
}

/// The answer is there after everything but the worker and the disk was started anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stored_chat_outlives_its_gateway_and_nats() {
    let deployment = simulating().await;
    let _decode = deployment.decode().await;
    let mut gateway = deployment.gateway(&[]).await;
    let mut stream = gateway.client.stream(&chat().with("store", json!(true))).await;
    stream.read_text(50).await;
    gateway.process.kill();
    deployment.interrupt_nats(Duration::from_secs(1)).await;
    let gateway = deployment.gateway(&[]).await;
    let path = format!("/v1/chat/completions/chatcmpl-{}", stream.answer().request);
    let (status, answer) = soon("the stored answer", gateway.client.get(&path)).await;
    let state = deployment.check_log(stream.answer().request).await;
    assert_eq!((status, state.phase), (200, Phase::Completed));
    assert_eq!(answer["choices"][0]["message"]["content"], state.text);
    deployment.check(&gateway.client.resume(&stream).await.rest().await).await;
    let (status, _) = gateway.client.delete(&path).await;
    assert_eq!((status, deployment.events(state.request).await.len()), (200, 0));
}

/// A client that goes away cancels what only it wanted, and nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_plain_request_goes_with_its_client() {
    let deployment = simulating().await;
    let decode = deployment.decode().await;
    let (one, two) = tokio::join!(deployment.gateway(&[]), deployment.gateway(&[]));
    for (fields, phase) in [(json!(false), Phase::Cancelled), (json!(true), Phase::Completed)] {
        let mut stream = one.client.stream(&chat().with("store", fields)).await;
        stream.read_text(50).await;
        let request = stream.answer().request;
        // Somebody else reads it too, and goes first.
        drop(two.client.resume(&stream).await);
        deployment.busy(&decode.id).await;
        drop(stream);
        assert_eq!(deployment.check_log(request).await.phase, phase);
    }
    deployment.all_slots_free().await;
}

/// A gateway's grace is over before its requests are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_stops_leaves_what_is_detached() {
    let deployment = simulating().await;
    let _decode = deployment.decode().await;
    let mut gateway = deployment.gateway(&["--grace-s", "1"]).await;
    let mut plain = gateway.client.stream(&chat()).await;
    let mut kept = gateway.client.stream(&chat().with("store", json!(true))).await;
    plain.read_text(20).await;
    kept.read_text(20).await;
    gateway.process.signal(Signal::TERM);
    assert!(gateway.process.ended().await.success());
    assert_eq!(deployment.check_log(plain.answer().request).await.phase, Phase::Cancelled);
    let other = deployment.gateway(&[]).await;
    kept.read_text(usize::MAX).await;
    let state = deployment.check(&other.client.resume(&kept).await.rest().await).await;
    assert_eq!((state.phase, state.tokens.len() as u32), (Phase::Completed, TOKENS));
}

/// The same key at two gateways at once, again after both were killed, and with another question.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_key_is_one_request() {
    let deployment = simulating().await;
    let decode = deployment.decode().await;
    let (mut one, mut two) = tokio::join!(deployment.gateway(&[]), deployment.gateway(&[]));
    let mut requests = Vec::new();
    for round in 0..5 {
        let key = format!("round {round}");
        let chat = chat().tokens(20).seed(round);
        let (a, b) = tokio::join!(one.client.ask_under(&key, &chat), two.client.ask_under(&key, &chat));
        assert_eq!((a.request, &a.text), (b.request, &b.text));
        deployment.check(&a).await;
        deployment.check(&b).await;
        requests.push(a.request);
    }
    let slow = tokio::spawn({
        let client = one.client.clone();
        async move { client.ask_under("slow", &chat()).await }
    });
    // Not by the queue's depth: the request may be in the worker's own queue.
    deployment.busy(&decode.id).await;
    one.process.kill();
    two.process.kill();
    assert!(slow.await.is_err(), "its gateway is gone");
    let three = deployment.gateway(&[]).await;
    let answer = three.client.ask_under("slow", &chat()).await;
    assert_eq!(deployment.check(&answer).await.tokens.len() as u32, TOKENS);
    let again = three.client.ask_under("round 0", &chat().tokens(20).seed(0)).await;
    assert_eq!(again.request, requests[0]);
    let other = three.client.ask_under("round 0", &chat()).await;
    assert_eq!(
        (other.status, &other.error.expect("an error")["code"]),
        (422, &json!("idempotency_key_reused"))
    );
}

/// The gateway that accepted it is gone, and nobody works on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_gateway_keeps_the_deadline_of_a_dead_one() {
    let deployment = simulating().await;
    let mut decode = deployment.decode().await;
    decode.terminate();
    assert!(decode.process.ended().await.success());
    let mut gateway = deployment.gateway(&["--request-timeout-s", "2"]).await;
    let stream = gateway.client.stream(&chat().with("store", json!(true))).await;
    gateway.process.kill();
    let other = deployment.gateway(&[]).await;
    let answer = soon("the end", other.client.resume(&stream).await.rest()).await;
    assert_eq!(answer.error.as_ref().expect("an error")["code"], "deadline_exceeded");
    let state = deployment.check(&answer).await;
    assert!(matches!(state.phase, Phase::Failed));
}
