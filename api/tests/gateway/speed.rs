//! How fast: `cargo test --release -p forebay-api --test gateway -- --ignored --nocapture speed`.

use crate::site::{Site, ask, over};
use forebay_schemas::event::FinishReason;
use forebay_streams::{jetstream::Limits, server::Server};
use futures::{StreamExt, future::join_all};
use serde_json::json;
use std::time::{Duration, Instant};

const STREAMS: usize = 128;
const TOKENS: usize = 1000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn speed_of_many_streams() {
    many_streams(Site::start().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn speed_of_many_streams_over_nats() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(None, folder.path(), 0).unwrap();
    many_streams(over(&server, Limits::default()).await).await;
}

async fn many_streams(site: Site) {
    let request = ask(json!({ "stream": true }));
    let began = Instant::now();
    let clients = join_all((0..STREAMS).map(|_| async {
        let mut bytes = site.post(request.clone()).await.bytes_stream();
        let (mut frames, mut total) = (0, 0);
        while let Some(piece) = bytes.next().await {
            (frames, total) = (frames + 1, total + piece.unwrap().len());
        }
        (frames, total)
    }));
    let workers = join_all((0..STREAMS).map(|_| async {
        let mut attempt = site.claim().await;
        for _ in 0..TOKENS {
            attempt.text(" token").await;
            tokio::task::yield_now().await;
        }
        attempt.complete(FinishReason::Stop).await;
    }));
    let (read, _) = tokio::join!(clients, workers);
    let seconds = began.elapsed().as_secs_f64();
    let frames: usize = read.iter().map(|(frames, _)| frames).sum();
    let bytes: usize = read.iter().map(|(_, bytes)| bytes).sum();
    println!(
        "{:.0} tokens/s in {STREAMS} streams, {:.1} tokens a frame, {:.0} bytes a token",
        (STREAMS * TOKENS) as f64 / seconds,
        (STREAMS * TOKENS) as f64 / frames as f64,
        bytes as f64 / (STREAMS * TOKENS) as f64,
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn speed_of_a_first_token() {
    first_token(Site::start().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn speed_of_a_first_token_over_nats() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(None, folder.path(), 0).unwrap();
    first_token(over(&server, Limits::default()).await).await;
}

async fn first_token(site: Site) {
    let request = ask(json!({ "stream": true }));
    let mut added = Vec::new();
    for _ in 0..500 {
        let began = Instant::now();
        let worker = async {
            let mut attempt = site.claim().await;
            attempt.text("first").await;
            attempt
        };
        let client = async {
            let mut bytes = site.post(request.clone()).await.bytes_stream();
            bytes.next().await.unwrap().unwrap();
            (began.elapsed(), bytes)
        };
        let (attempt, (first, mut bytes)) = tokio::join!(worker, client);
        added.push(first);
        attempt.complete(FinishReason::Stop).await;
        while bytes.next().await.is_some() {}
    }
    added.sort();
    let at = |part: f64| -> Duration { added[(part * added.len() as f64) as usize] };
    println!("first token after {:?} at the median, {:?} at the 99th percentile", at(0.5), at(0.99));
}
