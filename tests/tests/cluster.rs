//! NATS itself dies: one of three servers, or the only one. Nothing is lost of what was stored, and what runs goes on.

use forebay_schemas::{lifecycle::Phase, task::Role};
use forebay_tests::{Answer, Chat, Deployment, Gateway, soon};
use std::time::Duration;
use tokio::task::JoinSet;

/// Requests under way when it happens.
const REQUESTS: u64 = 12;

/// Tokens of each: some four seconds.
const TOKENS: u32 = 200;

/// Asks all at once, at each gateway the same number, and waits until all of them have some text.
async fn under_way(gateways: &[Gateway]) -> JoinSet<Answer> {
    let mut answers = JoinSet::new();
    for number in 0..REQUESTS {
        let client = gateways[number as usize % gateways.len()].client.clone();
        let mut stream = client.stream(&chat(number)).await;
        stream.read_text(20).await;
        answers.spawn(stream.rest());
    }
    answers
}

fn chat(number: u64) -> Chat {
    Chat::new("Say something that outlives a server.").tokens(TOKENS).seed(number)
}

/// Takes a deployment through it: requests before, at and after it end as they should, and nothing is held.
async fn interrupted(mut deployment: Deployment, pause: Duration) {
    deployment.simulate(Duration::from_millis(20));
    let (_one, _two, _prefill) = tokio::join!(deployment.decode(), deployment.decode(), deployment.prefill());
    let gateways = [deployment.gateway(&[]).await, deployment.gateway(&[]).await];
    let mut answers = under_way(&gateways).await;
    let late = gateways[0].client.clone();
    let (late, ()) = tokio::join!(
        async {
            tokio::time::sleep(pause / 2).await;
            late.ask(&chat(0)).await
        },
        deployment.interrupt_nats(pause)
    );
    let asked_meanwhile = deployment.check(&late).await;
    assert_eq!(asked_meanwhile.phase, Phase::Completed, "{late:?}");
    while let Some(answer) = soon("an answer", answers.join_next()).await {
        let answer = answer.expect("no panic");
        let state = deployment.check(&answer).await;
        assert_eq!((state.phase, state.tokens.len() as u32), (Phase::Completed, TOKENS));
        if state.accepted.sampling.seed == 0 {
            assert_eq!(state.tokens, asked_meanwhile.tokens);
        }
    }
    for gateway in &gateways {
        soon("the gateway is ready again", gateway.client.wait_ready()).await;
        assert_eq!(
            deployment.check(&gateway.client.ask(&chat(0)).await).await.tokens,
            asked_meanwhile.tokens
        );
    }
    deployment.queue_empty(Role::Decode).await;
    deployment.queue_empty(Role::Prefill).await;
    deployment.all_slots_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_of_the_log_is_killed_and_comes_back() {
    interrupted(Deployment::start_on_cluster().await, Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_server_is_away_for_five_seconds() {
    interrupted(Deployment::start().await, Duration::from_secs(5)).await;
}
