//! Requests go to the worker that has their KV. Whatever becomes of it, they are answered.

use forebay_schemas::{event::Body, ids::WorkerId, lifecycle::Lifecycle, task::Role};
use forebay_tests::{Answer, Chat, Deployment, Gateway, Worker, soon};
use rustix::process::Signal;
use serde_json::Value;
use std::{sync::LazyLock, time::Duration};

/// Words enough for many blocks: to compute them again costs more than a few sequences beside them.
static LONG: LazyLock<String> = LazyLock::new(|| {
    let text = "A river runs from a spring to the sea. Where it is held back, there is a lake; where it falls, there \
                is power. Tell me in a sentence or two what a forebay is, and what it is good for. ";
    text.repeat(4)
});

fn chat(seed: u64) -> Chat {
    Chat::new(&LONG).tokens(8).seed(seed)
}

async fn ask(deployment: &Deployment, gateway: &Gateway, chat: &Chat) -> (Answer, Lifecycle) {
    let answer = gateway.client.ask(chat).await;
    let state = deployment.check(&answer).await;
    (answer, state)
}

/// Simulating workers of which one has [`LONG`] in its cache: that one first.
async fn with_prefix(step: Duration) -> (Deployment, Gateway, [Worker; 2]) {
    let mut deployment = Deployment::start().await;
    deployment.simulate(step);
    let (one, two) = tokio::join!(deployment.decode(), deployment.decode());
    let gateway = deployment.gateway(&[]).await;
    let (_, state) = ask(&deployment, &gateway, &chat(1)).await;
    let mut workers = [one, two];
    if state.worker.as_ref() != Some(&workers[0].id) {
        workers.swap(0, 1);
    }
    known(&deployment, &workers[0].id).await;
    (deployment, gateway, workers)
}

/// Where the prompt would go now.
async fn explained(deployment: &Deployment) -> Value {
    let output = deployment.run(&["route", "--explain", &LONG, "--json"]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Waits until it is known what a worker has, and a gateway has had the time to hear of it too.
async fn known(deployment: &Deployment, worker: &WorkerId) {
    let known = async {
        while explained(deployment).await["worker"] != worker.as_str() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    soon("a worker's blocks are known", known).await;
}

async fn claims(deployment: &Deployment, answer: &Answer) -> Vec<WorkerId> {
    let events = deployment.events(answer.request).await;
    let claims = events.into_iter().filter_map(|recorded| match recorded.event.body {
        Body::Claimed(claimed) => Some(claimed.worker),
        _ => None,
    });
    claims.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worker_that_has_the_prefix_gets_the_request() {
    let (deployment, gateway, [owner, other]) = with_prefix(Duration::ZERO).await;
    // A gateway that starts later reads what was told before.
    let late = deployment.gateway(&[]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    for seed in 2..10 {
        for gateway in [&gateway, &late] {
            let (answer, state) = ask(&deployment, gateway, &chat(seed)).await;
            assert_eq!(state.worker.as_ref(), Some(&owner.id));
            let cached = answer.usage.and_then(|usage| usage.prompt_tokens_details);
            assert!(cached.is_some_and(|details| details.cached_tokens > 0));
        }
    }
    let explanation = explained(&deployment).await;
    assert_eq!(explanation["why"], "cheapest");
    let rows = explanation["choices"].as_array().expect("a list");
    assert_eq!(rows[0]["worker"], owner.id.as_str());
    assert!(rows[0]["hit_blocks"].as_u64() > Some(0));
    assert_eq!((&rows[1]["worker"], &rows[1]["hit_blocks"]), (&other.id.as_str().into(), &0.into()));
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worker_that_has_the_prefix_is_killed_in_mid_stream() {
    let (deployment, gateway, [mut owner, other]) = with_prefix(Duration::from_millis(20)).await;
    let mut stream = gateway.client.stream(&chat(2).tokens(150)).await;
    stream.read_text(20).await;
    owner.process.kill();
    let answer = stream.rest().await;
    let state = deployment.check(&answer).await;
    assert_eq!(claims(&deployment, &answer).await, [owner.id.clone(), other.id]);
    assert_eq!(state.tokens.len(), 150);
    deployment.gone(&owner.id).await;
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
    nothing_left_behind(&deployment).await;
}

/// Frozen, it has a lease for a while, and does not take what is queued for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worker_that_has_the_prefix_dies_with_a_task_in_its_queue() {
    let (deployment, gateway, [mut owner, other]) = with_prefix(Duration::ZERO).await;
    owner.process.signal(Signal::STOP);
    // The pull that it had begun is over.
    tokio::time::sleep(Duration::from_millis(1300)).await;
    let stream = gateway.client.stream(&chat(2)).await;
    owner.process.kill();
    let answer = stream.rest().await;
    deployment.check(&answer).await;
    assert_eq!(claims(&deployment, &answer).await, [other.id]);
    deployment.gone(&owner.id).await;
    nothing_left_behind(&deployment).await;
}

/// What is routed to a worker that is told to stop goes on elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worker_that_has_the_prefix_drains() {
    let (deployment, gateway, [mut owner, other]) = with_prefix(Duration::from_millis(20)).await;
    let mut stream = gateway.client.stream(&chat(2).tokens(150)).await;
    stream.read_text(20).await;
    owner.terminate();
    let answer = stream.rest().await;
    deployment.check(&answer).await;
    assert_eq!(claims(&deployment, &answer).await, [owner.id.clone(), other.id.clone()]);
    let (_, state) = ask(&deployment, &gateway, &chat(3)).await;
    assert_eq!(state.worker.as_ref(), Some(&other.id));
    assert!(owner.process.ended().await.success());
    deployment.gone(&owner.id).await;
    nothing_left_behind(&deployment).await;
}

/// No task and no event of a worker that is gone is left.
async fn nothing_left_behind(deployment: &Deployment) {
    let living = deployment.registered();
    let cleared = async {
        loop {
            let filled = deployment.streams.own_queues.filled().await.expect("NATS answers");
            let told = deployment.streams.cache_events.told(None, 0).await.expect("NATS answers");
            let workers: Vec<WorkerId> = told.into_iter().map(|told| told.of.worker).collect();
            if filled.is_empty() && workers.iter().all(|worker| living.borrow().contains_key(worker)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    soon("what a dead worker leaves is cleared away", cleared).await;
}
