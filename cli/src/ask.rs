//! The first question to a fresh gateway, over HTTP like anybody's.

use anyhow::{Context, bail};
use std::{
    io::Write,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Where other commands look for NATS by themselves.
const DEFAULT_NATS: &str = "nats://127.0.0.1:4222";

/// Never through a proxy: the gateway is on this machine.
fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().expect("plain settings")
}

/// Waits until the gateway says that it is ready.
pub(crate) async fn wait_ready(address: SocketAddr) -> anyhow::Result<()> {
    let client = client();
    loop {
        let answer =
            client.get(format!("http://{address}/ready")).timeout(Duration::from_secs(2)).send().await;
        if answer.is_ok_and(|answer| answer.status().is_success()) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Asks, prints the answer as it streams in, and says how to go on.
pub(crate) async fn ask(address: SocketAddr, nats: &str, model: &str, question: &str) -> anyhow::Result<()> {
    let body = serde_json::json!({
        "model": model,
        "messages": [{ "role": "user", "content": question }],
        "stream": true,
        "stream_options": { "include_usage": true },
        "max_tokens": 30,
    });
    println!("\n> {question}");
    let begun = Instant::now();
    let request = client()
        .post(format!("http://{address}/v1/chat/completions"))
        .header("content-type", "application/json")
        .body(body.to_string());
    let mut answer = request.send().await.context("asking")?;
    let mut first = None;
    let (mut id, mut tokens, mut pending) = (String::new(), 0, String::new());
    while let Some(bytes) = answer.chunk().await.context("reading the answer")? {
        pending.push_str(&String::from_utf8_lossy(&bytes));
        while let Some((event, rest)) = pending.split_once("\n\n") {
            let chunk: serde_json::Value = event
                .lines()
                .find_map(|line| line.strip_prefix("data: "))
                .and_then(|data| serde_json::from_str(data).ok())
                .unwrap_or_default();
            if let Some(error) = chunk.get("error") {
                bail!("the gateway answered with an error: {error}");
            }
            if let Some(text) =
                chunk["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty())
            {
                first.get_or_insert_with(|| begun.elapsed());
                print!("{text}");
                std::io::stdout().flush()?;
            }
            if let Some(chat) = chunk["id"].as_str() {
                id = chat.to_owned();
            }
            tokens = chunk["usage"]["completion_tokens"].as_u64().unwrap_or(tokens);
            pending = rest.to_owned();
        }
    }
    if !answer.status().is_success() {
        bail!("the gateway answered {}: {pending}", answer.status());
    }
    let (first, whole) = (first.unwrap_or_default(), begun.elapsed());
    println!(
        "\n\n{tokens} tokens, the first after {:.1} ms, all after {:.1} ms ({:.0} tokens/s)",
        first.as_secs_f64() * 1e3,
        whole.as_secs_f64() * 1e3,
        tokens as f64 / whole.as_secs_f64()
    );
    let program = std::env::args().next().unwrap_or_else(|| "forebay".into());
    let server = if nats == DEFAULT_NATS { String::new() } else { format!(" --nats {nats}") };
    println!("\nWhat happened to it:   {program} log{server} {id}");
    println!("Ask something else:\n");
    println!("curl http://{address}/v1/chat/completions -H 'Content-Type: application/json' -d '{{");
    println!(
        "  \"model\": \"{model}\", \"messages\": [{{\"role\": \"user\", \"content\": \"What is prefill?\"}}] }}'"
    );
    Ok(())
}
