//! Live configuration: what is set counts from the next request on, and nothing is started again for it.

use forebay_schemas::{event::Body, task::Role};
use forebay_streams::log::Recorded;
use forebay_tests::{Chat, Deployment, Gateway, Worker, etcd::EtcdServer, soon};
use serde_json::json;
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

const LENGTH: &str = "max_local_prefill_length";
const QUEUE: &str = "max_prefill_queue_size";

/// Time in which a worker is sure to go by what was set.
const SETTLED: Duration = Duration::from_secs(1);

/// Pause between two requests that look where they are prefilled.
const POLL: Duration = Duration::from_millis(50);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn placement_follows_what_is_set_on_nats() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::ZERO);
    placement_follows(&deployment).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn placement_follows_what_is_set_on_etcd() {
    let Some(server) = EtcdServer::start() else { return };
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::ZERO);
    deployment.keep_registry_at(&server.url()).await;
    placement_follows(&deployment).await;
    let checked = said(&deployment, &["doctor"], None).await;
    assert!(checked.contains("registry: etcd answers: 2 workers, 0 settings"), "{checked}");
}

async fn placement_follows(deployment: &Deployment) {
    let (mut decode, _prefill): (Worker, Worker) = tokio::join!(deployment.decode(), deployment.prefill());
    let gateway = deployment.gateway(&[]).await;
    // Whatever length a test's prompt has, this deployment was started to prefill remotely.
    becomes_remote(deployment, &gateway, true).await;

    let done = said(deployment, &["config", "set", LENGTH, "100000"], Some(true)).await;
    assert!(done.contains("max_local_prefill_length = 100000"), "{done}");
    becomes_remote(deployment, &gateway, false).await;
    let list = said(deployment, &["config", "list"], Some(true)).await;
    assert!(list.contains("max_local_prefill_length  100000 (set)"), "{list}");
    assert!(list.contains("max_prefill_queue_size    not set: each worker's"), "{list}");

    // Refused, with what would be taken; nothing has changed.
    for (arguments, says) in [
        ([LENGTH, "-1"], "a whole number from 0"),
        ([LENGTH, "many"], "a whole number from 0"),
        (["router_active_weight", "NaN"], "a finite number of at least 0"),
        (["max_local_prefil_length", "1"], "there is no setting"),
    ] {
        let refused = said(deployment, &[&["config", "set"], &arguments[..]].concat(), Some(false)).await;
        assert!(refused.contains(says) && refused.contains(arguments[0]), "{refused}");
    }
    let value = said(deployment, &["config", "get", LENGTH], Some(true)).await;
    assert_eq!(value.trim(), "100000");

    // Ignored, if it gets in by other means: the last good one stays.
    deployment.streams.settings.put(LENGTH, "many").await.expect("the store takes it");
    decode.process.says("a live setting is ignored").await;
    for _ in 0..5 {
        assert!(!is_remote(deployment, &gateway).await, "the last good value stays");
    }

    // Back to what the worker was started with.
    said(deployment, &["config", "unset", LENGTH], Some(true)).await;
    becomes_remote(deployment, &gateway, true).await;
    let none = said(deployment, &["config", "get", LENGTH], Some(false)).await;
    assert!(none.contains("max_local_prefill_length is not set: each worker's"), "{none}");

    // A queue in which nothing may wait takes nothing.
    said(deployment, &["config", "set", QUEUE, "0"], Some(true)).await;
    becomes_remote(deployment, &gateway, false).await;
    said(deployment, &["config", "unset", QUEUE], Some(true)).await;
    becomes_remote(deployment, &gateway, true).await;
    deployment.all_slots_free().await;
}

/// Prompts get what an answer that runs beside them leaves of a step: with a step of two tokens, one at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_size_of_steps_can_be_changed() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::from_millis(3));
    let _decode = deployment.decode().await;
    let gateway = deployment.gateway(&[]).await;
    let client = gateway.client.clone();
    let running = tokio::spawn(async move { client.ask(&Chat::new("Go on and on.").tokens(3500)).await });
    let mut beside = Vec::new();
    for (size, salt) in [("2", "a"), ("256", "b")] {
        said(&deployment, &["config", "set", "step_tokens", size], Some(true)).await;
        tokio::time::sleep(SETTLED).await;
        let chat = Chat::new(&"What is a forebay? ".repeat(30)).with("cache_salt", json!(salt)).tokens(3);
        beside.push(deployment.check(&gateway.client.ask(&chat).await).await);
    }
    let state = deployment.check(&running.await.expect("no panic")).await;
    let running = deployment.events(state.request).await;
    let mut drawn = Vec::new();
    for state in beside {
        let events = deployment.events(state.request).await;
        let of =
            |name: &str| events.iter().find(|recorded| recorded.event.body.name() == name).expect(name).seq;
        let meanwhile = of("Claimed")..of("TokensGenerated");
        let tokens =
            running.iter().filter(|recorded| meanwhile.contains(&recorded.seq)).map(tokens_of).sum::<usize>();
        drawn.push((state.accepted.prompt.len(), tokens));
    }
    let (prompt, slow) = drawn[0];
    assert!(slow > prompt / 2 && drawn[1].1 < prompt / 4, "{drawn:?} of {}", state.tokens.len());
}

fn tokens_of(recorded: &Recorded) -> usize {
    match &recorded.event.body {
        Body::TokensGenerated(generated) => generated.tokens.len(),
        _ => 0,
    }
}

/// A prefill worker that will not be done, a decode worker, and a gateway.
async fn with_a_slow_prefill_worker() -> (Deployment, Worker, Worker, Gateway) {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::ZERO);
    deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", "10000000");
    let prefill = deployment.prefill().await;
    deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", "0");
    let decode = deployment.decode().await;
    let gateway = deployment.gateway(&[]).await;
    (deployment, prefill, decode, gateway)
}

/// A decode worker does not wait for a prefill that nobody is left to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_that_nobody_is_left_to_do_is_done_here() {
    let (deployment, mut prefill, _decode, gateway) = with_a_slow_prefill_worker().await;
    let client = gateway.client.clone();
    let asked = tokio::spawn(async move { client.ask(&Chat::new("Who is left?").tokens(5)).await });
    deployment.busy(&prefill.id).await;
    let killed = std::time::Instant::now();
    prefill.process.kill();
    let answer = soon("an answer", asked).await.expect("no panic");
    // The worker's patience with a prefill is a minute.
    assert!(killed.elapsed() < Duration::from_secs(30), "{:?}", killed.elapsed());
    let state = deployment.check(&answer).await;
    assert_eq!(state.tokens.len(), 5);
    let lost =
        |body: &Body| matches!(body, Body::KvLost(lost) if lost.reason.contains("no prefill worker is left"));
    let events = deployment.events(answer.request).await;
    assert!(events.iter().any(|recorded| lost(&recorded.event.body)), "{events:?}");
    assert_eq!(
        deployment.registered().borrow().values().filter(|lease| lease.role == Role::Prefill).count(),
        0
    );
}

/// Too many that wait for prefill workers: a decode worker does the next itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_prefill_queue_is_not_joined() {
    let (deployment, mut prefill, _decode, gateway) = with_a_slow_prefill_worker().await;
    said(&deployment, &["config", "set", QUEUE, "2"], Some(true)).await;
    let mut waiting = Vec::new();
    let local = loop {
        // The worker computes a few; then two wait, and the decode worker has room for eight.
        assert!(waiting.len() < 7, "all of them went to the prefill worker");
        let (client, number) = (gateway.client.clone(), waiting.len());
        let ask = async move { client.ask(&Chat::new(&format!("{number} wait")).tokens(3)).await };
        let mut asked = tokio::spawn(ask);
        match tokio::time::timeout(Duration::from_secs(2), &mut asked).await {
            Ok(answer) => break answer.expect("no panic"),
            Err(_) => waiting.push(asked),
        }
    };
    assert!(waiting.len() > 2, "only {} went there, and none waited", waiting.len());
    let depth = deployment.depth(Role::Prefill).await;
    assert!(depth.pending >= 2, "{depth:?}");
    deployment.check(&local).await;
    let queued = |body: &Body| matches!(body, Body::PrefillQueued(_));
    let events = deployment.events(local.request).await;
    assert!(!events.iter().any(|recorded| queued(&recorded.event.body)), "{events:?}");
    prefill.process.kill();
    for asked in waiting {
        let answer = soon("an answer", asked).await.expect("no panic");
        deployment.check(&answer).await;
        let events = deployment.events(answer.request).await;
        assert!(events.iter().any(|recorded| queued(&recorded.event.body)), "{events:?}");
    }
}

/// Whether a request that is made now is prefilled remotely. No two are the same, so that nothing of one is cached for
/// another.
async fn is_remote(deployment: &Deployment, gateway: &Gateway) -> bool {
    static ASKED: AtomicU64 = AtomicU64::new(0);
    let number = ASKED.fetch_add(1, Ordering::Relaxed);
    let answer = gateway.client.ask(&Chat::new(&format!("{number} is the number.")).tokens(3)).await;
    deployment.check(&answer).await;
    let events = deployment.events(answer.request).await;
    events.iter().any(|recorded| matches!(recorded.event.body, Body::PrefillQueued(_)))
}

async fn becomes_remote(deployment: &Deployment, gateway: &Gateway, remote: bool) {
    let becomes = async {
        while is_remote(deployment, gateway).await != remote {
            tokio::time::sleep(POLL).await;
        }
    };
    soon("placement follows", becomes).await;
}

/// What a command says; and whether it succeeds is as expected.
async fn said(deployment: &Deployment, arguments: &[&str], succeeds: Option<bool>) -> String {
    let output = deployment.run(arguments).await;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if let Some(succeeds) = succeeds {
        assert_eq!(output.status.success(), succeeds, "{arguments:?}: {said}");
    }
    said.into_owned()
}
