//! Requests wait in the queue: for a worker, for so long as they may, and in sight of an autoscaler.

use forebay_schemas::{event::Body, lifecycle::Phase, task::Role};
use forebay_streams::tasks::Depth;
use forebay_tests::{Chat, Deployment, soon};
use serde_json::Value;
use std::time::Duration;

/// Lets a model be known and no worker be there: scaled to zero.
async fn scaled_to_zero(deployment: &Deployment) {
    let mut worker = deployment.decode().await;
    worker.terminate();
    assert!(worker.process.ended().await.success());
    deployment.gone(&worker.id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_waits_until_a_worker_comes() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::ZERO);
    scaled_to_zero(&deployment).await;
    let gateway = deployment.gateway(&[]).await;
    let chats = [1, 2, 3].map(|seed| Chat::new("Wait for it.").tokens(20).seed(seed));
    let waiting = chats.each_ref().map(|chat| {
        let (client, chat) = (gateway.client.clone(), chat.clone());
        tokio::spawn(async move { client.ask(&chat).await })
    });
    let queued = async {
        while deployment.depth(Role::Decode).await.pending < 3 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    soon("three requests wait", queued).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(waiting.iter().all(|request| !request.is_finished()));

    let _worker = deployment.decode().await;
    for request in waiting {
        let answer = soon("an answer", request).await.expect("no panic");
        assert_eq!(deployment.check(&answer).await.tokens.len(), 20);
    }
    deployment.queue_empty(Role::Decode).await;
    deployment.all_slots_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_nobody_takes_expires() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::from_millis(20));
    scaled_to_zero(&deployment).await;
    let gateway = deployment.gateway(&["--request-timeout-s", "2"]).await;
    let chat = Chat::new("Nobody is here.").tokens(1000);
    let answer = gateway.client.ask(&chat).await;
    assert_eq!(answer.status, 504, "{answer:?}");
    assert_eq!(answer.error.as_ref().expect("an error")["code"], "deadline_exceeded");
    let streamed = gateway.client.stream(&chat).await.rest().await;
    assert_eq!(streamed.error.as_ref().expect("an error")["code"], "deadline_exceeded");
    for answer in [&answer, &streamed] {
        let state = deployment.check(answer).await;
        assert_eq!((state.phase, state.attempt), (Phase::Failed, 0));
        let events = deployment.events(answer.request).await;
        assert!(
            matches!(&events[1].event.body, Body::RequestFailed(failed) if failed.message.contains("within 2 s"))
        );
    }
    // Their tasks are void, and the next worker clears them away. What it begins, it is told to end in time.
    assert_eq!(deployment.depth(Role::Decode).await, Depth { pending: 2, ack_pending: 0 });
    let _worker = deployment.decode().await;
    deployment.queue_empty(Role::Decode).await;
    let slow = gateway.client.stream(&chat).await.rest().await;
    assert_eq!(slow.error.as_ref().expect("an error")["code"], "deadline_exceeded");
    assert!(!slow.text.is_empty());
    assert_eq!(deployment.check(&slow).await.phase, Phase::Failed);
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
}

/// KEDA's `nats-jetstream` scaler adds up `num_pending` and `num_ack_pending` of one consumer in nats-server's
/// `/jsz`.
async fn keda_lag(monitoring: &str, stream: &str, consumer: &str) -> u64 {
    let url = format!("{monitoring}/jsz?acc=$G&consumers=true&config=true");
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    let jsz: Value = client.get(url).send().await.expect("the endpoint answers").json().await.expect("JSON");
    let named = |list: &Value, name: &str| -> Value {
        let all = list.as_array().expect("a list");
        all.iter()
            .find(|entry| entry["name"] == name)
            .unwrap_or_else(|| panic!("no {name} in {list}"))
            .clone()
    };
    let account = named(&jsz["account_details"], "$G");
    let consumer = named(&named(&account["stream_detail"], stream)["consumer_detail"], consumer);
    let number = |field: &str| consumer[field].as_u64().expect("a number");
    number("num_pending") + number("num_ack_pending")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queues_depth_is_what_keda_reads() {
    let (mut deployment, monitoring) = Deployment::start_monitored().await;
    deployment.simulate(Duration::from_millis(20));
    // Two requests run at once; two more wait.
    let worker = deployment.worker(Role::Decode, &["--slots", "2"]).await;
    let gateway = deployment.gateway(&[]).await;
    let lag = async || keda_lag(&monitoring, "FB_DECODE", "decode-demo").await;
    assert_eq!(lag().await, 0);
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(gateway.client.stream(&Chat::new("Stand in line.").tokens(3000)).await);
    }
    deployment.busy(&worker.id).await;
    let both_taken = async {
        while deployment.depth(Role::Decode).await != (Depth { pending: 2, ack_pending: 2 }) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    soon("two run and two wait", both_taken).await;
    assert_eq!(lag().await, deployment.depth(Role::Decode).await.lag());
    assert_eq!(lag().await, 4);

    let requests: Vec<_> = streams.iter().map(|stream| stream.answer().request).collect();
    drop(streams);
    for request in requests {
        assert_eq!(deployment.check_log(request).await.phase, Phase::Cancelled);
    }
    deployment.queue_empty(Role::Decode).await;
    assert_eq!(lag().await, 0);
    assert_eq!(keda_lag(&monitoring, "FB_PREFILL", "prefill-demo").await, 0);
    deployment.all_slots_free().await;
}
