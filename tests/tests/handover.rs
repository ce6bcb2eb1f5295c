//! Workers die and leave; the ack wait is so long here that only the gateway's watch, or the leaving worker itself, can
//! move a request.

use forebay_schemas::{
    event::{Body, Event, ReleaseCause},
    lifecycle::{Lifecycle, Phase},
    task::Role,
};
use forebay_streams::log::Recorded;
use forebay_tests::{Answer, Chat, Deployment, Gateway, Worker};
use rustix::process::Signal;
use std::time::Duration;

/// Tokens of an answer that something happens to.
const TOKENS: u32 = 200;

/// Time of one of them.
const STEP: Duration = Duration::from_millis(15);

/// A deployment whose queues give nothing back by themselves.
async fn deployment() -> Deployment {
    let mut deployment = Deployment::start().await;
    deployment.set("FOREBAY_ACK_WAIT_S", "600");
    deployment.set("FOREBAY_LEASE_S", "1.5");
    deployment
}

fn chat() -> Chat {
    Chat::new("Say something that does not depend on who says it.").tokens(TOKENS).seed(42)
}

/// The owner of a request, and the other worker.
async fn owner_first(deployment: &Deployment, answer: &Answer, mut workers: [Worker; 2]) -> [Worker; 2] {
    let events = deployment.events(answer.request).await;
    let state = Lifecycle::fold(events.iter().map(|recorded| &recorded.event)).unwrap().unwrap();
    if Some(&workers[0].id) != state.worker.as_ref() {
        workers.swap(0, 1);
    }
    assert_eq!(Some(&workers[0].id), state.worker.as_ref());
    workers
}

async fn two_and_a_prefill(deployment: &Deployment) -> ([Worker; 2], Worker, Gateway) {
    let (one, two, prefill) = tokio::join!(deployment.decode(), deployment.decode(), deployment.prefill());
    ([one, two], prefill, deployment.gateway(&[]).await)
}

fn count(events: &[Recorded], like: impl Fn(&Body) -> bool) -> usize {
    events.iter().filter(|recorded| like(&recorded.event.body)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_decode_worker_had_goes_on_at_once() {
    let mut deployment = deployment().await;
    deployment.simulate(STEP);
    let (workers, _prefill, gateway) = two_and_a_prefill(&deployment).await;
    let undisturbed = deployment.check(&gateway.client.ask(&chat()).await).await;
    let mut stream = gateway.client.stream(&chat()).await;
    stream.read_text(60).await;
    let [mut owner, other] = owner_first(&deployment, stream.answer(), workers).await;
    owner.process.kill();
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, state.worker.as_ref()), (2, Some(&other.id)));
    assert_eq!(state.tokens, undisturbed.tokens);
    deployment.queue_empty(Role::Decode).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_frozen_decode_worker_had_goes_on_and_it_drops_it_when_it_wakes() {
    let mut deployment = deployment().await;
    deployment.simulate(STEP);
    let (workers, _prefill, gateway) = two_and_a_prefill(&deployment).await;
    let undisturbed = deployment.check(&gateway.client.ask(&chat()).await).await;
    let mut stream = gateway.client.stream(&chat()).await;
    stream.read_text(60).await;
    let [owner, other] = owner_first(&deployment, stream.answer(), workers).await;
    owner.process.signal(Signal::STOP);
    let request = stream.answer().request;
    let second = |event: &Event| event.attempt == 2 && matches!(event.body, Body::TokensGenerated(_));
    deployment.logged(request, second).await;
    owner.process.signal(Signal::CONT);
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, state.worker.as_ref()), (2, Some(&other.id)));
    assert_eq!(state.tokens, undisturbed.tokens);
    deployment.all_slots_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_prefill_worker_had_goes_to_another() {
    let mut deployment = deployment().await;
    deployment.simulate(Duration::ZERO);
    deployment.set("FOREBAY_CHUNK", "4");
    deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", "50000");
    // A decode worker that finds it dead in a read computes the KV itself.
    deployment.set("FOREBAY_BENCH_NO_OVERLAP", "true");
    let (_decode, mut first) = tokio::join!(deployment.decode(), deployment.prefill());
    let gateway = deployment.gateway(&[]).await;
    let stream = gateway.client.stream(&chat()).await;
    let request = stream.answer().request;
    deployment.logged(request, |event| matches!(event.body, Body::KvReady(_))).await;
    let second = deployment.prefill().await;
    first.process.kill();
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.phase, state.attempt), (Phase::Completed, 1));
    assert_eq!(state.prefiller, Some(second.id));
}

/// A worker that is told to stop hands over at once, and what it computed is read, not computed again.
async fn handed_over(deployment: &Deployment, chat: &Chat, read: usize) {
    let (workers, _prefill, gateway) = two_and_a_prefill(deployment).await;
    let undisturbed = deployment.check(&gateway.client.ask(chat).await).await;
    let mut stream = gateway.client.stream(chat).await;
    stream.read_text(read).await;
    let [mut owner, other] = owner_first(deployment, stream.answer(), workers).await;
    owner.terminate();
    assert!(owner.process.ended().await.success());
    let request = stream.answer().request;
    let ended = deployment.events(request).await.iter().any(|recorded| recorded.event.body.is_terminal());
    assert!(!ended, "the worker is gone before the request has ended");
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, state.worker.as_ref()), (2, Some(&other.id)));
    assert_eq!(state.tokens, undisturbed.tokens);
    let events = deployment.events(request).await;
    let released = |body: &Body| match body {
        Body::Released(released) => released.cause == ReleaseCause::Drained && released.kv.is_some(),
        _ => false,
    };
    assert_eq!(count(&events, released), 1);
    assert_eq!(count(&events, |body| matches!(body, Body::KvTransferred(_))), 2);
    assert_eq!(count(&events, |body| matches!(body, Body::PrefillQueued(_))), 1, "no second prefill");
    assert_eq!(count(&events, |body| matches!(body, Body::KvLost(_))), 0);
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stops_hands_its_sequences_over_with_their_kv() {
    let mut deployment = deployment().await;
    deployment.simulate(STEP);
    handed_over(&deployment, &chat(), 60).await;
}

/// The KV was moved, not computed anew: with the real model too, the answer is that of an undisturbed run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_real_model_goes_on_elsewhere_as_if_nothing_had_happened() {
    let deployment = deployment().await;
    handed_over(&deployment, &Chat::new("What is a forebay?").tokens(3000), 200).await;
}

/// Nobody can take over: the worker finishes if its grace allows, and else leaves the rest to the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_worker_leaves_the_rest_to_the_log() {
    let mut deployment = deployment().await;
    deployment.simulate(STEP);
    let mut only = deployment.worker(Role::Decode, &["--grace-s", "3"]).await;
    let gateway = deployment.gateway(&[]).await;
    let undisturbed = deployment.check(&gateway.client.ask(&chat()).await).await;
    let mut stream = gateway.client.stream(&chat()).await;
    stream.read_text(20).await;
    only.terminate();
    assert!(only.process.ended().await.success());
    let request = stream.answer().request;
    deployment.logged(request, |event| matches!(event.body, Body::Released(_))).await;
    let next = deployment.decode().await;
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, state.worker.as_ref()), (2, Some(&next.id)));
    assert_eq!(state.tokens, undisturbed.tokens);
}

/// Every worker is replaced while answers stream: nobody reads an error, and nothing is computed twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_under_load_is_not_noticed() {
    let mut deployment = deployment().await;
    deployment.simulate(STEP);
    let (workers, prefill, gateway) = two_and_a_prefill(&deployment).await;
    let undisturbed = deployment.check(&gateway.client.ask(&chat()).await).await;
    let ask = async || gateway.client.stream(&chat()).await;
    let (mut one, two, three) = tokio::join!(ask(), ask(), ask());
    one.read_text(20).await;
    let mut replacements = Vec::new();
    for mut old in workers.into_iter().chain([prefill]) {
        let role = if old.id.as_str().starts_with("prefill") { Role::Prefill } else { Role::Decode };
        replacements.push(deployment.worker(role, &[]).await);
        old.terminate();
        assert!(old.process.ended().await.success());
    }
    let (one, two, three) = tokio::join!(one.rest(), two.rest(), three.rest());
    for answer in [one, two, three] {
        let state = deployment.check(&answer).await;
        assert_eq!((&state.phase, &state.tokens), (&Phase::Completed, &undisturbed.tokens));
        assert!(state.attempt >= 2, "it outlived a worker");
        let events = deployment.events(answer.request).await;
        assert_eq!(count(&events, |body| matches!(body, Body::KvLost(_))), 0);
        assert_eq!(count(&events, |body| matches!(body, Body::PrefillQueued(_))), 1, "no second prefill");
    }
    deployment.all_slots_free().await;
    nothing_is_held(&gateway).await;
}

/// The gauges of what is held are there, and all zero.
async fn nothing_is_held(gateway: &Gateway) {
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let metrics = http.get(format!("{}/metrics", gateway.url)).send().await.expect("an answer");
    let metrics = metrics.text().await.expect("a text");
    for gauge in ["forebay_slots_busy{", "forebay_kv_leases{", "forebay_requests_in_flight{"] {
        let lines: Vec<&str> = metrics.lines().filter(|line| line.starts_with(gauge)).collect();
        assert!(!lines.is_empty(), "no {gauge} in\n{metrics}");
        assert!(lines.iter().all(|line| line.ends_with(" 0")), "{lines:?}");
    }
}
