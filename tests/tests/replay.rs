//! Looking at requests from outside: exported, replayed here and elsewhere, imported, followed, cancelled, tried again.

use forebay_schemas::{
    dead_letter::DeadLetter,
    event::{Body, FailureCode},
    ids::{ModelKey, RequestId},
    lifecycle::Phase,
    task::Role,
};
use forebay_streams::server::Server;
use forebay_tests::{
    Chat, Deployment,
    deployment::{MODEL, forebay},
    files,
    process::Process,
};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a command prints that must succeed.
fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn says(said: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(said.contains(part), "no {part:?} in: {said}"));
}

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A command in a process that has no NATS.
fn alone(arguments: &[&str], folder: &Path) -> Output {
    let mut command: Command = forebay(arguments);
    command.env("FOREBAY_NATS", "nats://127.0.0.1:1").env("FOREBAY_DATA", folder.join("data"));
    command.output().expect("forebay runs")
}

async fn exported(deployment: &Deployment, request: RequestId, folder: &Path) -> PathBuf {
    let file = folder.join(format!("{request}.jsonl"));
    let output = deployment.run(&["export", &format!("chatcmpl-{request}")]).await;
    std::fs::write(&file, printed(&output)).expect("a file can be written");
    file
}

/// Changes a line of an export.
fn change(file: &Path, of: impl Fn(&Value) -> bool, to: impl Fn(&mut Value)) -> PathBuf {
    let lines = std::fs::read_to_string(file).expect("an export");
    let mut values: Vec<Value> =
        lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    to(values.iter_mut().rfind(|line| of(line)).expect("there is such a line"));
    let changed = file.with_extension("changed.jsonl");
    std::fs::write(&changed, values.iter().map(|line| format!("{line}\n")).collect::<String>())
        .expect("written");
    changed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_of_the_model_replays_anywhere() {
    let deployment = Deployment::start().await;
    let gateway = deployment.gateway(&[]).await;
    let (_decode, _prefill) = (deployment.decode().await, deployment.prefill().await);
    let folder = files::scratch();
    let greedy = Chat::new("What is a forebay?").with("max_tokens", json!(24));
    let warm = Chat::new("What is prefill?").tokens(24).with("temperature", json!(0.8)).seed(5);
    let stopped = Chat::new("What is a forebay?").with("stop", json!(["basin"]));
    let mut file = PathBuf::new();
    for chat in [stopped, warm, greedy] {
        let answer = gateway.client.ask(&chat).await;
        let state = deployment.check(&answer).await;
        file = exported(&deployment, answer.request, folder.path()).await;
        let said = printed(&alone(&["replay", path(&file), "--execute"], folder.path()));
        let tokens = format!("compared   {} tokens", state.tokens.len());
        says(&said, &["(demo): the same", &tokens, "equal      every token, the text and the end"]);
        let said = printed(&alone(&["replay", path(&file)], folder.path()));
        says(&said, &["completed", &format!("text       {:?}", answer.text), "what the client saw"]);
    }

    // With an id, from NATS: no worker is asked.
    let request: RequestId =
        file.file_stem().expect("a name").to_str().expect("UTF-8").parse().expect("an id");
    says(&printed(&deployment.run(&["replay", &request.to_string(), "--execute"]).await), &["equal"]);
    let said = printed(&deployment.run(&["replay", &request.to_string(), "--at", "2"]).await);
    says(&said, &["after event 2 of", "phase      claimed", "nothing yet"]);

    // One token changed: it is named beside the one that the model draws, and the rest is compared all the same.
    let generated = |line: &Value| line["type"] == "TokensGenerated" && line["data"]["first_index"] != 0;
    let mut was = 0;
    let lines = std::fs::read_to_string(&file).expect("an export");
    for line in lines.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")) {
        was = if generated(&line) { line["data"]["tokens"][0].as_u64().expect("a token") } else { was };
    }
    let changed = change(&file, generated, |line| line["data"]["tokens"][0] = json!(400));
    let output = alone(&["replay", path(&changed), "--execute"], folder.path());
    assert_eq!(output.status.code(), Some(1));
    says(&text(&output.stdout), &["logged   400 ", &format!("here     {was} "), "logit", "ahead by"]);
    says(&text(&output.stderr), &["forebay: the replay differs from the log in "]);

    // Another model is named as such.
    let output = alone(&["replay", path(&file), "--execute", "--engine", "sim"], folder.path());
    assert_eq!(output.status.code(), Some(1));
    says(&text(&output.stdout), &["simulated", "another model or precision", "this engine has no logits"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_moves_to_another_nats() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::ZERO);
    let gateway = deployment.gateway(&[]).await;
    let _decode = deployment.decode().await;
    let answer = gateway.client.ask(&Chat::new("Where to?").tokens(8)).await;
    deployment.check(&answer).await;
    let folder = files::scratch();
    let file = exported(&deployment, answer.request, folder.path()).await;
    let id = answer.request.to_string();

    let other = Server::start(None, &folder.path().join("nats"), 0).expect("nats-server starts");
    let url = other.url();
    let there = |arguments: &[&str]| {
        let arguments = [arguments, &["--nats", &url]].concat();
        alone(&arguments, folder.path())
    };
    // Nothing is written of what does not fold.
    let terminal = |line: &Value| line["type"] == "RequestCompleted";
    let broken = change(&file, terminal, |line| line["attempt"] = json!(7));
    let output = there(&["import", path(&broken)]);
    says(&text(&output.stderr), &["(RequestCompleted, sequence", "does not fit", "attempt 7, expected 1"]);
    says(&text(&there(&["log", &id]).stderr), &["no request"]);
    let damaged = change(&file, terminal, |line| line["data"] = json!({}));
    says(&text(&there(&["import", path(&damaged)]).stderr), &["line ", "not a RequestCompleted"]);

    says(&printed(&there(&["import", path(&file)])), &["imported", &format!("forebay log {id}")]);
    let here = printed(&deployment.run(&["log", "--json", &id]).await);
    let moved = printed(&there(&["log", "--json", &id]));
    let events = |log: &str| -> Vec<Value> {
        let mut events: Vec<Value> =
            log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        events.iter_mut().for_each(|event| event["seq"] = json!(0));
        events
    };
    assert_eq!(events(&here), events(&moved));
    let again = there(&["import", path(&file)]);
    assert_eq!(again.status.code(), Some(1));
    says(&text(&again.stderr), &["is in the log already", "forebay log"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_request_is_followed_and_cancelled() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::from_millis(20));
    let gateway = deployment.gateway(&[]).await;
    let decode = deployment.decode().await;
    let folder = files::scratch();
    let start = |name: &str, arguments: &[&str]| {
        Process::start(name, &mut deployment.command(arguments), folder.path().join(name))
    };
    let mut tail = start("tail", &["tail", "--model", MODEL, "--long"]);
    let mut others = start("others", &["tail", "--model", "other"]);
    let mut ends = start("ends", &["tail", "--json", "--event", "RequestCancelled"]);
    for tail in [&mut tail, &mut others, &mut ends] {
        tail.says("waiting for events").await;
    }
    let mut stream = gateway.client.stream(&Chat::new("How long?").tokens(3000)).await;
    stream.read_text(1).await;
    let id = stream.answer().request.to_string();
    tail.says(&id).await;
    let mut late = start("late", &["tail", "--worker", decode.id.as_str(), "--event", "TokensGenerated"]);
    let mut log = start("log", &["log", "--follow", &id]);
    log.says("RequestAccepted").await;
    log.says("TokensGenerated").await;
    late.says("TokensGenerated").await;

    let said = printed(&deployment.run(&["cancel", &id, "--cause", "enough of it"]).await);
    says(&said, &[&id, "cancel"]);
    log.says("enough of it").await;
    assert!(log.ended().await.success());
    tail.says("RequestCancelled enough of it").await;
    let line = ends.says("enough of it").await;
    let line: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(line["type"], "RequestCancelled");
    assert_eq!(others.log().lines().count(), 1, "{}", others.log());
    assert!(!late.log().contains("Claimed") && !late.log().contains("missed"), "{}", late.log());
    let answer = stream.rest().await;
    assert!(answer.error.expect("an error").to_string().contains("enough of it"));
    let state = deployment.check_log(answer.request).await;
    assert_eq!(state.phase, Phase::Cancelled);
    let said = printed(&deployment.run(&["cancel", &id]).await);
    says(&said, &["had ended already: cancelled"]);
    deployment.all_slots_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_is_tried_again() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::ZERO);
    let gateway = deployment.gateway(&[]).await;
    let _decode = deployment.decode().await;
    let answer = gateway.client.ask(&Chat::new("Again?").tokens(8).seed(3)).await;
    let first = deployment.check(&answer).await;
    let log = deployment.streams.log.find(answer.request).await.expect("NATS answers").expect("its log");
    let letter = DeadLetter {
        request: answer.request,
        gateway: log.gateway,
        model: ModelKey::of(MODEL),
        role: Role::Decode,
        code: Some(FailureCode::TooManyAttempts),
        reason: "the engine has stopped".into(),
        attempts: 5,
        time_us: first.accepted_us,
    };
    let bury = || async { deployment.streams.dead_letters.bury(&letter).await.expect("it is kept") };
    says(&printed(&deployment.run(&["dlq", "list"]).await), &["no dead letters"]);
    bury().await;
    let id = answer.request.to_string();
    says(
        &printed(&deployment.run(&["dlq", "list"]).await),
        &[&id, "too_many_attempts: the engine has stopped"],
    );
    let line = printed(&deployment.run(&["dlq", "list", "--json"]).await);
    assert_eq!(serde_json::from_str::<DeadLetter>(&line).expect("JSON"), letter);
    let shown = printed(&deployment.run(&["dlq", "show", &id]).await);
    says(
        &shown,
        &["by decode, after 5 tries", &format!("forebay log {id}"), &format!("forebay dlq retry {id}")],
    );

    let said = printed(&deployment.run(&["dlq", "retry", &format!("chatcmpl-{id}")]).await);
    let again = said.split_whitespace().last().expect("a command");
    assert_ne!(again, id);
    let again: RequestId = again.parse().expect("an id");
    let state = deployment.check_log(again).await;
    assert_eq!((state.phase.clone(), &state.tokens), (Phase::Completed, &first.tokens), "the same was asked");
    assert!(state.accepted.detached);
    let begins = deployment.events(again).await;
    assert!(matches!(begins[0].event.body, Body::RequestAccepted(_)));
    says(&text(&deployment.run(&["dlq", "show", &id]).await.stderr), &["no dead letter of request"]);

    bury().await;
    says(&printed(&deployment.run(&["dlq", "drop", &id]).await), &["forgotten"]);
    says(&printed(&deployment.run(&["dlq", "list"]).await), &["no dead letters"]);
}
