//! Prefill on one worker, decode on another: the answer is that of a worker that does both.

use forebay_schemas::{event::Body, kv::KvDtype, lifecycle::Phase, task::Role};
use forebay_streams::log::Recorded;
use forebay_tests::{Chat, Deployment, files, python};
use serde_json::{Value, json};
use std::time::Duration;

/// One set of questions, whoever answers them.
const SEED: &str = "11";

/// Of the short lists, in percent, that a value must be recalled from. The model is small, not the serving.
const RIGHT_MIN: usize = 80;

fn names(events: &[Recorded]) -> Vec<&'static str> {
    events.iter().map(|recorded| recorded.event.body.name()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn remote_prefill_changes_no_token() {
    let mut deployment = Deployment::start().await;
    // Every prompt in full, although they begin alike.
    deployment.set("FOREBAY_CACHE_GIB", "0");
    let (mut decode, _prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let gateway = deployment.gateway(&[]).await;
    let remote = python::run("recall.py", &gateway.url, &[SEED]).await;
    deployment.all_slots_free().await;

    // The same by one worker alone, although the prefill worker is still there.
    decode.terminate();
    assert!(decode.process.ended().await.success());
    let _alone = deployment.worker(Role::Decode, &["--max-local-prefill-length", "100000"]).await;
    let local = python::run("recall.py", &gateway.url, &[SEED]).await;

    assert_eq!(remote.len(), local.len());
    for (remote, local) in remote.iter().zip(&local) {
        let (there, here) = (deployment.check(&remote.answer).await, deployment.check(&local.answer).await);
        assert_eq!(there.accepted.prompt, here.accepted.prompt);
        assert_eq!(there.tokens, here.tokens, "{:?} and {:?}", there.text, here.text);
        let events = names(&deployment.events(there.request).await);
        let pieces = events.iter().filter(|name| **name == "KvReady").count();
        // Chunks of 256; the last one of several is halved, unless it is short.
        let (chunks, last) =
            (there.accepted.prompt.len().div_ceil(256), (there.accepted.prompt.len() - 1) % 256 + 1);
        assert_eq!(pieces, chunks + usize::from(chunks > 1 && last > 128), "{events:?}");
        assert!(events.contains(&"KvTransferred") && !events.contains(&"KvLost"), "{events:?}");
        let events = names(&deployment.events(here.request).await);
        assert!(!events.contains(&"PrefillQueued"), "{events:?}");
    }
    assert!(
        remote.iter().any(|reported| reported.answer.usage.is_some_and(|usage| usage.prompt_tokens > 512))
    );
    deployment.all_slots_free().await;

    // Last, so that it hides nothing of the above.
    let judged: Vec<bool> = remote.iter().filter_map(|reported| reported.more["right"].as_bool()).collect();
    let right = judged.iter().filter(|right| **right).count();
    let wrong =
        || remote.iter().filter(|reported| reported.more["right"] == false).map(|wrong| &wrong.answer.text);
    assert!(
        right * 100 >= judged.len() * RIGHT_MIN,
        "the demo model recalls {right} of {} values; wrong: {:?}",
        judged.len(),
        wrong().collect::<Vec<_>>()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_command_shows_every_step() {
    let deployment = Deployment::start().await;
    let (decode, prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let gateway = deployment.gateway(&["--id", "gw-log"]).await;
    let answer = gateway.client.ask(&Chat::new("What is a forebay?")).await;
    let state = deployment.check(&answer).await;
    assert_eq!(state.phase, Phase::Completed);
    let events = deployment.events(answer.request).await;
    let steps = names(&events);
    let mut kinds = steps.clone();
    kinds.dedup();
    assert_eq!(
        kinds,
        [
            "RequestAccepted",
            "Claimed",
            "PrefillQueued",
            "PrefillClaimed",
            "KvReady",
            "PrefillCompleted",
            "KvTransferred",
            "TokensGenerated",
            "RequestCompleted"
        ]
    );
    let Body::KvTransferred(transferred) = &events[6].event.body else { panic!("{:?}", events[6]) };
    assert_eq!(transferred.transport, "shm");
    assert_eq!(transferred.tokens as usize, state.accepted.prompt.len());

    let id = format!("chatcmpl-{}", answer.request);
    let timeline = deployment.run(&["log", &id]).await;
    assert!(timeline.status.success());
    let timeline = String::from_utf8(timeline.stdout).expect("UTF-8");
    let shown: Vec<&str> =
        timeline.lines().skip(1).map(|line| line.split_whitespace().nth(7).unwrap_or("")).collect();
    assert_eq!(shown, steps, "{timeline}");
    for part in [decode.id.as_str(), prefill.id.as_str(), "over shm in", "Stop: "] {
        assert!(timeline.contains(part), "no {part} in:\n{timeline}");
    }

    let json = deployment.run(&["log", "--json", &answer.request.to_string()]).await;
    assert!(json.status.success());
    let json = String::from_utf8(json.stdout).expect("UTF-8");
    let lines: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), events.len());
    for (line, Recorded { seq, event }) in lines.iter().zip(&events) {
        assert_eq!(line["seq"], *seq);
        assert_eq!(line["type"], event.body.name());
        assert_eq!(line["request"], serde_json::to_value(event.request).expect("JSON"));
    }

    let unknown = deployment.run(&["log", "chatcmpl-01997a5ce2b47d0c8e3f0f8ddc0c6a11"]).await;
    assert_eq!(unknown.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&unknown.stderr).contains("never accepted here, or older than the log keeps")
    );
}

/// Chunks are read while later ones are computed: KV that can't be read is found out at the first of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_begins_before_the_prefill_ends() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::ZERO);
    deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", "2000");
    deployment.set("FOREBAY_CHUNK", "64");
    deployment.set("FOREBAY_KV_TRANSPORT", "shm");
    let sockets = files::scratch();
    let folder = sockets.path().display().to_string();
    let flags = ["--sockets", &folder];
    let (_decode, _prefill) = tokio::join!(deployment.decode(), deployment.worker(Role::Prefill, &flags));
    drop(sockets);
    let gateway = deployment.gateway(&[]).await;
    let answer = gateway.client.ask(&Chat::new(&"What is a forebay? ".repeat(100)).tokens(5)).await;
    let state = deployment.check(&answer).await;
    assert!(state.accepted.prompt.len() > 256 && state.tokens.len() == 5, "{state:?}");
    let events = names(&deployment.events(answer.request).await);
    let at = |name| events.iter().position(|event| *event == name);
    let lost = at("KvLost").expect("it can't be read");
    assert!(at("KvReady").is_some_and(|ready| ready < lost), "{events:?}");
    assert!(at("PrefillCompleted").is_none_or(|completed| lost < completed), "{events:?}");
    deployment.all_slots_free().await;
}

/// KV in int8 moves, is cached and is gone on with like any other, in a quarter of the bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_in_int8_moves_alike() {
    let mut deployment = Deployment::start().await;
    deployment.set("FOREBAY_KV_TYPE", "int8");
    deployment.set("FOREBAY_CHUNK", "32");
    deployment.set("FOREBAY_MAX_LOCAL_PREFILL_LENGTH", "8");
    let (_decode, mut prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let gateway = deployment.gateway(&[]).await;
    let pairs = "river is 42. stone is 17. cloud is 88. lamp is 31. bridge is 64. apple is 55.";
    let ask =
        |salt: &str| Chat::new(&format!("{pairs} What is cloud?")).tokens(8).with("cache_salt", json!(salt));
    let asked = async |salt: &str| deployment.check(&gateway.client.ask(&ask(salt)).await).await;

    let remote = asked("one").await;
    assert!(remote.text.starts_with("cloud is 88."), "{}", remote.text);
    let events = deployment.events(remote.request).await;
    assert!(names(&events).contains(&"KvTransferred") && !names(&events).contains(&"KvLost"));
    let handles = events.iter().filter_map(|recorded| match &recorded.event.body {
        Body::KvReady(ready) => Some(&ready.handle),
        _ => None,
    });
    let bytes: usize = handles
        .inspect(|handle| assert_eq!(handle.layout.geometry.dtype, KvDtype::Int8))
        .map(|handle| handle.bytes())
        .sum();
    // Four layers with keys and values of four heads of 32.
    assert_eq!(bytes, remote.accepted.prompt.len() * 4 * 2 * 4 * 32);
    let cached = asked("one").await;
    assert!(cached.cached_tokens >= 32, "{} tokens were cached", cached.cached_tokens);
    prefill.terminate();
    assert!(prefill.process.ended().await.success());
    deployment.gone(&prefill.id).await;
    let alone = asked("two").await;
    assert!(!names(&deployment.events(alone.request).await).contains(&"KvReady"));
    assert_eq!((&cached.tokens, &alone.tokens), (&remote.tokens, &remote.tokens));
    deployment.all_slots_free().await;
}
