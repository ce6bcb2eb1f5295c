//! What was run before is not run again: across requests, across the turns of a chat, and on both kinds of worker.

use forebay_schemas::{
    cache::BLOCK_TOKENS,
    event::{Body, PrefillCompleted, PrefillQueued},
    lifecycle::Lifecycle,
    task::Role,
};
use forebay_tests::{Answer, Chat, Deployment};
use serde_json::{Value, json};

/// Words enough for several blocks.
const LONG: &str = "A river runs from a spring to the sea. Where it is held back, there is a lake; where it falls, there is \
                    power. Tell me in a sentence or two what a forebay is, and what it is good for.";

fn turn(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

fn chat(messages: Vec<Value>) -> Chat {
    Chat::new("").with("messages", Value::Array(messages)).tokens(40)
}

fn cached(answer: &Answer) -> u32 {
    answer.usage.expect("it has ended").prompt_tokens_details.map_or(0, |details| details.cached_tokens)
}

/// Whole blocks of so many tokens.
fn whole(tokens: usize) -> u32 {
    tokens as u32 / BLOCK_TOKENS * BLOCK_TOKENS
}

async fn ask(deployment: &Deployment, gateway: &forebay_tests::Gateway, chat: &Chat) -> (Answer, Lifecycle) {
    let answer = gateway.client.ask(chat).await;
    let state = deployment.check(&answer).await;
    (answer, state)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_turns_of_a_chat_are_run_once() {
    let deployment = Deployment::start().await;
    let mut decode = deployment.decode().await;
    let gateway = deployment.gateway(&[]).await;
    let first = chat(vec![turn("user", LONG)]);
    let (cold, opening) = ask(&deployment, &gateway, &first).await;
    assert_eq!(cached(&cold), 0);

    // The same again: all whole blocks but the one with the last token, and the same answer.
    let (warm, again) = ask(&deployment, &gateway, &first).await;
    assert_eq!(cached(&warm), whole(opening.accepted.prompt.len() - 1));
    assert_eq!(again.tokens, opening.tokens);

    // The next turn: what was generated is known too, as far as the template writes it as it was.
    let history = vec![turn("user", LONG), turn("assistant", &cold.text), turn("user", "And a turbine?")];
    let next = chat(history);
    let (followed, second) = ask(&deployment, &gateway, &next).await;
    let known = [&opening.accepted.prompt[..], &opening.tokens[..opening.tokens.len() - 1]].concat();
    let same = known.iter().zip(&second.accepted.prompt).take_while(|(a, b)| a == b).count();
    assert!(same > opening.accepted.prompt.len(), "the template writes answers otherwise than they are made");
    assert_eq!(cached(&followed), whole(same));

    // Another salt shares nothing.
    let (salted, _) = ask(&deployment, &gateway, &first.clone().with("cache_salt", json!("mine"))).await;
    assert_eq!(cached(&salted), 0);
    let (salted, _) = ask(&deployment, &gateway, &first.clone().with("cache_salt", json!("mine"))).await;
    assert_eq!(cached(&salted), cached(&warm));
    deployment.all_slots_free().await;

    // A worker without a cache answers the same.
    decode.terminate();
    assert!(decode.process.ended().await.success());
    let _plain = deployment.worker(Role::Decode, &["--cache-gib", "0"]).await;
    let (plain, state) = ask(&deployment, &gateway, &next).await;
    assert_eq!((cached(&plain), &state.tokens), (0, &second.tokens));
    let (plain, _) = ask(&deployment, &gateway, &next).await;
    assert_eq!(cached(&plain), 0);
    deployment.all_slots_free().await;
}

/// What the decode worker asked for, and what came of it.
async fn remote(deployment: &Deployment, state: &Lifecycle) -> (PrefillQueued, PrefillCompleted, u32) {
    let (mut asked, mut done, mut read) = (None, None, 0);
    for recorded in deployment.events(state.request).await {
        match recorded.event.body {
            Body::PrefillQueued(queued) => asked = Some(queued),
            Body::PrefillCompleted(completed) => done = Some(completed),
            Body::KvTransferred(transferred) => read = transferred.tokens,
            Body::KvLost(lost) => panic!("{}", lost.reason),
            _ => {}
        }
    }
    (asked.expect("it was remote"), done.expect("and it was done"), read)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_is_new_is_prefilled_and_moved() {
    let deployment = Deployment::start().await;
    let (_decode, mut prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let gateway = deployment.gateway(&[]).await;
    let first = chat(vec![turn("user", LONG)]);
    let (cold, opening) = ask(&deployment, &gateway, &first).await;
    let prompt = opening.accepted.prompt.len() as u32;
    let (asked, done, read) = remote(&deployment, &opening).await;
    assert_eq!((asked.cached_tokens, done.cached_tokens, read, cached(&cold)), (0, 0, prompt, 0));

    let (warm, again) = ask(&deployment, &gateway, &first).await;
    let (asked, done, read) = remote(&deployment, &again).await;
    let known = whole(opening.accepted.prompt.len() - 1);
    assert_eq!((asked.cached_tokens, done.cached_tokens, read), (known, known, prompt - known));
    assert_eq!((cached(&warm), &again.tokens), (known, &opening.tokens));
    deployment.all_slots_free().await;

    // A prefill worker that knows nothing gets what comes before from the decode worker.
    prefill.terminate();
    assert!(prefill.process.ended().await.success());
    let _fresh = deployment.prefill().await;
    let history = vec![turn("user", LONG), turn("assistant", &cold.text), turn("user", "And a turbine?")];
    let (followed, second) = ask(&deployment, &gateway, &chat(history)).await;
    let (asked, done, read) = remote(&deployment, &second).await;
    assert!(asked.cached_tokens > prompt, "{asked:?}");
    assert_eq!(done.cached_tokens, asked.cached_tokens);
    assert_eq!(read, second.accepted.prompt.len() as u32 - asked.cached_tokens);
    assert_eq!(cached(&followed), asked.cached_tokens);
    deployment.all_slots_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_of_another_meaning_is_neither_asked_for_nor_read() {
    let deployment = Deployment::start().await;
    // The same model in another precision: its KV means something else.
    let (_decode, _prefill) =
        tokio::join!(deployment.decode(), deployment.worker(Role::Prefill, &["--weights", "int8"]));
    let gateway = deployment.gateway(&[]).await;
    let (_, state) = ask(&deployment, &gateway, &chat(vec![turn("user", LONG)])).await;
    let events = deployment.events(state.request).await;
    assert!(events.iter().all(|recorded| recorded.event.body.name() != "PrefillQueued"));

    // With one of each, whoever gets the task: the answer is the same.
    let mut fitting = deployment.prefill().await;
    let mut refused = 0;
    for number in 0..6 {
        // The last one can only be taken by the other: this one is dead, and nobody knows yet.
        if number == 5 {
            fitting.process.kill();
        }
        let salted = chat(vec![turn("user", LONG)]).with("cache_salt", json!(number.to_string()));
        let (_, other) = ask(&deployment, &gateway, &salted).await;
        assert_eq!(other.tokens, state.tokens);
        for recorded in deployment.events(other.request).await {
            if let Body::KvLost(lost) = recorded.event.body {
                assert!(lost.reason.contains("is asked for"), "{}", lost.reason);
                refused += 1;
            }
        }
    }
    assert!(refused > 0, "the other one was never asked");
    deployment.all_slots_free().await;
}
