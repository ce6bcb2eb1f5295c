//! Processes die, stop and leave while requests run. The requests go on.
//!
//! Workers simulate here: a token is a function of prompt, seed and index, so that an answer can be compared with
//! that of an undisturbed run.

use forebay_schemas::{
    event::{Body, Event},
    ids::RequestId,
    lifecycle::{Lifecycle, Phase},
    task::Role,
};
use forebay_tests::{Chat, Deployment, Gateway, Worker, deployment::ACK_WAIT, soon};
use rustix::process::Signal;
use serde_json::json;
use std::time::Duration;

/// Time of one token: slow enough for something to happen in between.
const STEP: Duration = Duration::from_millis(20);

/// Tokens of an answer that something happens to. They take four seconds.
const TOKENS: u32 = 200;

/// A deployment of simulating workers, and the answer of an undisturbed one to [`chat`].
async fn simulating() -> (Deployment, Gateway, Lifecycle) {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::ZERO);
    let mut fast = deployment.decode().await;
    let gateway = deployment.gateway(&[]).await;
    let answer = gateway.client.ask(&chat()).await;
    let undisturbed = deployment.check(&answer).await;
    assert_eq!(undisturbed.tokens.len() as u32, TOKENS);
    fast.terminate();
    assert!(fast.process.ended().await.success());
    deployment.gone(&fast.id).await;
    deployment.simulate(STEP);
    (deployment, gateway, undisturbed)
}

fn chat() -> Chat {
    Chat::new("Say something that does not depend on who says it.").tokens(TOKENS).seed(42)
}

/// Which of two workers a request's current attempt belongs to, and the other.
fn owner_first(state: &Lifecycle, mut workers: [Worker; 2]) -> [Worker; 2] {
    if Some(&workers[0].id) != state.worker.as_ref() {
        workers.swap(0, 1);
    }
    assert_eq!(Some(&workers[0].id), state.worker.as_ref());
    workers
}

async fn state_now(deployment: &Deployment, request: RequestId) -> Lifecycle {
    let events = deployment.events(request).await;
    Lifecycle::fold(events.iter().map(|recorded| &recorded.event)).expect("legal").expect("accepted")
}

fn claims(event: &Event, attempt: u32) -> bool {
    event.attempt == attempt && matches!(event.body, Body::Claimed(_))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_worker_is_killed_in_mid_stream() {
    let (deployment, gateway, undisturbed) = simulating().await;
    let (one, two, prefill) = tokio::join!(deployment.decode(), deployment.decode(), deployment.prefill());
    let mut stream = gateway.client.stream(&chat()).await;
    stream.read_text(100).await;
    let [mut owner, other] = owner_first(&state_now(&deployment, stream.answer().request).await, [one, two]);
    owner.process.kill();
    let answer = stream.rest().await;
    let state = deployment.check(&answer).await;
    assert_eq!(state.phase, Phase::Completed);
    assert_eq!((state.attempt, state.worker.as_ref()), (2, Some(&other.id)));
    assert_eq!(state.tokens, undisturbed.tokens);
    assert_eq!(answer.text, undisturbed.text);
    deployment.gone(&owner.id).await;
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
    deployment.queue_empty(Role::Prefill).await;
    drop(prefill);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_worker_is_killed_while_it_waits_for_the_prefill() {
    let (mut deployment, gateway, undisturbed) = simulating().await;
    deployment.set("FOREBAY_SIM_STEP_US", "0");
    deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", "30000");
    deployment.set("FOREBAY_CHUNK", "4");
    let (one, two, _prefill) = tokio::join!(deployment.decode(), deployment.decode(), deployment.prefill());
    let stream = gateway.client.stream(&chat()).await;
    let request = stream.answer().request;
    deployment.logged(request, |event| matches!(event.body, Body::KvReady(_))).await;
    let [mut owner, other] = owner_first(&state_now(&deployment, request).await, [one, two]);
    owner.process.kill();
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, state.worker.as_ref()), (2, Some(&other.id)));
    assert_eq!(state.tokens, undisturbed.tokens);
    // The KV that nobody has read is given up with its lease.
    deployment.gone(&owner.id).await;
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Prefill).await;
}

/// Whoever goes on with an answer that is held to a schema knows where in it the answer is, and what was told of its tokens stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_worker_is_killed_in_the_midst_of_a_schema() {
    const NUMBERS: usize = 300;
    let deployment = Deployment::start().await;
    let (one, two, _prefill) = tokio::join!(deployment.decode(), deployment.decode(), deployment.prefill());
    let gateway = deployment.gateway(&[]).await;
    let schema = json!({
        "type": "array",
        "items": { "type": "integer", "minimum": 100, "maximum": 999 },
        "minItems": NUMBERS,
        "maxItems": NUMBERS,
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "numbers", "schema": schema } });
    let chat = Chat::new("Count.").with("response_format", format).with("temperature", json!(1.5));
    let chat = chat.with("seed", json!(3)).with("logprobs", json!(true)).with("presence_penalty", json!(1));
    let mut stream = gateway.client.stream(&chat).await;
    stream.read_text(100).await;
    let request = stream.answer().request;
    let [mut owner, other] = owner_first(&state_now(&deployment, request).await, [one, two]);
    owner.process.kill();
    let before = state_now(&deployment, request).await;
    assert_eq!(before.phase, Phase::Decoding, "it is killed in the midst of its work");
    let answer = stream.rest().await;
    let state = deployment.check(&answer).await;
    assert_eq!((state.attempt, state.worker.as_ref()), (2, Some(&other.id)));
    assert_eq!(state.tokens[..before.tokens.len()], before.tokens);
    let numbers: Vec<u32> = serde_json::from_str(&answer.text).expect("the schema's JSON");
    assert!(numbers.len() == NUMBERS && numbers.iter().all(|number| (100..1000).contains(number)));
    let told: Vec<u32> = state.logprobs.iter().map(|told| told.drawn.token).collect();
    assert_eq!(told, state.tokens[..state.tokens.len() - 1], "one for each, but for the end");
}

/// The real model: what was logged before stays, and the answer goes on from there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_worker_that_runs_the_model_is_killed() {
    let deployment = Deployment::start().await;
    let (one, two, _prefill) = tokio::join!(deployment.decode(), deployment.decode(), deployment.prefill());
    let gateway = deployment.gateway(&[]).await;
    let mut stream = gateway.client.stream(&Chat::new("What is a forebay?").tokens(3000)).await;
    stream.read_text(200).await;
    let request = stream.answer().request;
    let [mut owner, other] = owner_first(&state_now(&deployment, request).await, [one, two]);
    owner.process.kill();
    let before = state_now(&deployment, request).await;
    assert_eq!(before.phase, Phase::Decoding, "it is killed in the midst of its work");
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, state.worker.as_ref()), (2, Some(&other.id)));
    assert_eq!(state.tokens[..before.tokens.len()], before.tokens);
    assert_eq!(state.tokens.len(), 3000);
    deployment.gone(&owner.id).await;
    deployment.all_slots_free().await;
}

/// A worker that stops for a while and goes on is a zombie: another has its request, and the log refuses what it
/// still says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_worker_is_stopped_and_goes_on() {
    let (deployment, gateway, undisturbed) = simulating().await;
    let (one, two) = tokio::join!(deployment.decode(), deployment.decode());
    let mut stream = gateway.client.stream(&chat()).await;
    stream.read_text(100).await;
    let request = stream.answer().request;
    let [zombie, other] = owner_first(&state_now(&deployment, request).await, [one, two]);
    zombie.process.signal(Signal::STOP);
    deployment.logged(request, |event| claims(event, 2)).await;
    zombie.process.signal(Signal::CONT);
    let answer = stream.rest().await;
    let state = deployment.check(&answer).await;
    assert_eq!((state.attempt, state.worker.as_ref()), (2, Some(&other.id)));
    assert_eq!(state.tokens, undisturbed.tokens);
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
    // It works on: both are given something to do.
    let chats = [1, 2, 3, 4].map(|seed| chat().tokens(10).seed(seed));
    for chat in &chats {
        deployment.check(&gateway.client.ask(chat).await).await;
    }
}

/// With no other worker there, the task comes back to the one that stopped, in another of its slots.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_decode_worker_is_stopped_and_goes_on() {
    let (deployment, gateway, undisturbed) = simulating().await;
    let worker = deployment.worker(Role::Decode, &["--slots", "2"]).await;
    let mut stream = gateway.client.stream(&chat()).await;
    stream.read_text(100).await;
    worker.process.signal(Signal::STOP);
    tokio::time::sleep(ACK_WAIT * 2).await;
    worker.process.signal(Signal::CONT);
    let answer = stream.rest().await;
    let state = deployment.check(&answer).await;
    assert_eq!(state.phase, Phase::Completed);
    assert_eq!(state.tokens, undisturbed.tokens);
    assert!(
        state.attempt <= 2,
        "{} attempts: two loops of one worker take the request from each other",
        state.attempt
    );
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
}

/// Whether a read was under way decides if the decode worker waits for the other prefill worker or computes the KV itself;
/// the answer is the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_worker_is_killed_while_it_is_read() {
    let (mut deployment, gateway, undisturbed) = simulating().await;
    deployment.set("FOREBAY_SIM_STEP_US", "0");
    deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", "300000");
    deployment.set("FOREBAY_CHUNK", "4");
    let (_decode, mut first) = tokio::join!(deployment.decode(), deployment.prefill());
    let stream = gateway.client.stream(&chat()).await;
    let request = stream.answer().request;
    deployment.logged(request, |event| matches!(event.body, Body::KvReady(_))).await;
    first.process.kill();
    deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", "1000");
    let _second = deployment.prefill().await;
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, &state.tokens), (1, &undisturbed.tokens));
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Prefill).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_worker_is_killed_while_it_computes() {
    let (mut deployment, gateway, undisturbed) = simulating().await;
    // A prompt of some thirty tokens takes ten seconds, in pieces of four.
    deployment.set("FOREBAY_SIM_STEP_US", "0");
    deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", "300000");
    deployment.set("FOREBAY_CHUNK", "4");
    deployment.set("FOREBAY_PREFILL_PATIENCE_S", "8");
    // Nothing is read before the prefill is over: a decode worker that finds it dead in a read computes the KV itself.
    let decode = deployment.worker(Role::Decode, &["--bench-no-overlap"]);
    let (decode, mut first) = tokio::join!(decode, deployment.prefill());
    let stream = gateway.client.stream(&chat()).await;
    let request = stream.answer().request;
    deployment.logged(request, |event| matches!(event.body, Body::KvReady(_))).await;
    first.process.kill();
    // Another one finishes it.
    deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", "1000");
    let mut second = deployment.prefill().await;
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, &state.tokens), (1, &undisturbed.tokens));
    let events = deployment.events(request).await;
    let prefilling: Vec<_> = events
        .iter()
        .filter_map(|recorded| match &recorded.event.body {
            Body::PrefillClaimed(claimed) => Some((&claimed.worker, claimed.delivery)),
            _ => None,
        })
        .collect();
    assert_eq!(prefilling, [(&first.id, 1), (&second.id, 2)]);
    assert!(events.iter().any(|recorded| matches!(recorded.event.body, Body::KvTransferred(_))));

    // Nobody else is there: the decode worker does it itself once its patience is over.
    second.terminate();
    second.process.ended().await;
    deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", "300000");
    let mut third = deployment.prefill().await;
    let stream = gateway.client.stream(&chat()).await;
    let request = stream.answer().request;
    deployment.logged(request, |event| matches!(event.body, Body::KvReady(_))).await;
    third.process.kill();
    deployment.logged(request, |event| matches!(event.body, Body::KvLost(_))).await;
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, &state.tokens), (1, &undisturbed.tokens));
    assert_eq!(state.worker, Some(decode.id.clone()));
    deployment.gone(&third.id).await;
    deployment.all_slots_free().await;
}

/// A prefill worker that stopped goes on when another is just as far: the next piece is no longer its to give.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_worker_is_stopped_and_goes_on() {
    let (mut deployment, gateway, undisturbed) = simulating().await;
    deployment.set("FOREBAY_SIM_STEP_US", "0");
    deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", "200000");
    deployment.set("FOREBAY_CHUNK", "4");
    let (_decode, zombie) = tokio::join!(deployment.decode(), deployment.prefill());
    let stream = gateway.client.stream(&chat()).await;
    let request = stream.answer().request;
    deployment.logged(request, |event| matches!(event.body, Body::KvReady(_))).await;
    zombie.process.signal(Signal::STOP);
    let pieces = state_now(&deployment, request).await.kv.len();
    let other = deployment.prefill().await;
    let as_far =
        |event: &Event| matches!(&event.body, Body::KvReady(ready) if ready.handle.agent == other.id);
    deployment.logged(request, as_far).await;
    assert_eq!(pieces, 1, "this machine is too slow for this test");
    zombie.process.signal(Signal::CONT);
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, &state.tokens), (1, &undisturbed.tokens));
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Prefill).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_nats_server_is_killed_and_comes_back() {
    let (deployment, gateway, undisturbed) = simulating().await;
    let (_decode, _prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let mut stream = gateway.client.stream(&chat()).await;
    stream.read_text(50).await;
    deployment.interrupt_nats(Duration::from_secs(1)).await;
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((&state.phase, &state.tokens), (&Phase::Completed, &undisturbed.tokens));
    soon("the gateway is ready again", gateway.client.wait_ready()).await;
    let answer = gateway.client.ask(&chat()).await;
    assert_eq!(deployment.check(&answer).await.tokens, undisturbed.tokens);
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_are_told_to_stop_finish_first() {
    let (deployment, gateway, undisturbed) = simulating().await;
    let (mut decode, mut prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let mut stream = gateway.client.stream(&chat()).await;
    stream.read_text(50).await;
    decode.terminate();
    prefill.terminate();
    // What comes now waits for another worker.
    let late = {
        let client = gateway.client.clone();
        tokio::spawn(async move { client.ask(&chat()).await })
    };
    assert!(prefill.process.ended().await.success());
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, &state.tokens), (1, &undisturbed.tokens));
    assert!(decode.process.ended().await.success());
    deployment.gone(&decode.id).await;
    assert!(!late.is_finished());
    let _next = deployment.decode().await;
    let late = soon("the late answer", late).await.expect("no panic");
    assert_eq!(deployment.check(&late).await.tokens, undisturbed.tokens);
    deployment.all_slots_free().await;
}

/// A worker's grace is over before its request is: the rest is left to another worker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_outlives_the_grace_of_its_worker() {
    let (deployment, gateway, undisturbed) = simulating().await;
    let mut hasty = deployment.worker(Role::Decode, &["--grace-s", "1"]).await;
    let mut stream = gateway.client.stream(&chat()).await;
    stream.read_text(20).await;
    let other = deployment.decode().await;
    hasty.terminate();
    assert!(hasty.process.ended().await.success());
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, state.worker.as_ref()), (2, Some(&other.id)));
    assert_eq!(state.tokens, undisturbed.tokens);
    deployment.all_slots_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_is_killed_and_its_requests_go_on() {
    let (deployment, mut gateway, undisturbed) = simulating().await;
    let (_decode, _prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let second = deployment.gateway(&[]).await;
    let mut stream = gateway.client.stream(&chat()).await;
    stream.read_text(50).await;
    let waiting = {
        let client = second.client.clone();
        tokio::spawn(async move { client.ask(&chat()).await })
    };
    gateway.process.kill();
    let read = stream.answer().clone();
    assert_eq!(read.finish, None);
    let state = deployment.check_log(read.request).await;
    assert_eq!((&state.phase, &state.tokens), (&Phase::Completed, &undisturbed.tokens));
    assert!(state.text.starts_with(&read.text));
    // Nobody else is harmed.
    let answer = soon("the other gateway's answer", waiting).await.expect("no panic");
    assert_eq!(deployment.check(&answer).await.tokens, undisturbed.tokens);
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
}
