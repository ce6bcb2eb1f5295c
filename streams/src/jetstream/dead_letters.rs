//! Dead letters in a stream of their own, beside the server's advisories of spent deliveries.

use super::{
    JetStream, failed, header,
    log::READ_BATCH,
    topology::{DLQ, SPENT, queue_stream},
};
use crate::{
    StreamError,
    dead_letters::{DeadLetters, Receipt, Spent},
    tasks::Verdict,
};
use async_nats::{HeaderMap, jetstream::stream::Stream};
use async_trait::async_trait;
use forebay_schemas::{dead_letter::DeadLetter, ids::RequestId, task::Role};
use serde::Deserialize;
use std::time::Duration;

/// What the server says of a message that it will not deliver again
/// (`io.nats.jetstream.advisory.v1.max_deliver`).
#[derive(Deserialize)]
struct Advisory {
    stream: String,
    stream_seq: u64,
    deliveries: u64,
}

fn subject(letter: &DeadLetter) -> String {
    format!("fb.dlq.{}.{}.{}", letter.role.as_str(), letter.model, letter.request)
}

#[async_trait]
impl DeadLetters for JetStream {
    async fn bury(&self, letter: &DeadLetter) -> Result<(), StreamError> {
        let payload = serde_json::to_vec(letter).expect("plain data always encodes");
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Rollup", "sub");
        let what = format!("keeping the dead letter of {}", letter.request);
        let published = self.publish(subject(letter), headers, payload.into()).await;
        published.map(drop).map_err(|error| StreamError::new(what, error.cause()))
    }

    async fn list(&self) -> Result<Vec<DeadLetter>, StreamError> {
        let what = "reading dead letters";
        let mut letters = Vec::new();
        let mut from = 1;
        loop {
            let (messages, pending) =
                self.read_batch(DLQ, "fb.dlq.>", from, READ_BATCH).await.map_err(failed(what))?;
            for message in &messages {
                let seq = header(message.headers.as_ref(), "Nats-Sequence").and_then(|seq| seq.parse().ok());
                from = seq.map_or(from, |seq: u64| seq + 1);
                match serde_json::from_slice(&message.payload) {
                    Ok(letter) => letters.push(letter),
                    Err(error) => tracing::warn!(%error, "a dead letter is not readable; left out"),
                }
            }
            if !pending || messages.is_empty() {
                return Ok(letters);
            }
        }
    }

    async fn drop_letter(&self, request: RequestId) -> Result<u64, StreamError> {
        let what = format!("dropping the dead letter of {request}");
        let stream = self.stream(DLQ, &what).await?;
        let purged = stream.purge().filter(format!("fb.dlq.*.*.{request}")).await.map_err(failed(what))?;
        Ok(purged.purged)
    }

    async fn spent(&self, wait: Duration) -> Result<Option<Spent>, StreamError> {
        let what = "looking for spent tasks";
        let Some(delivery) = self.pull_from(DLQ, SPENT, wait).await? else { return Ok(None) };
        let advisory: Advisory = match serde_json::from_slice(&delivery.payload) {
            Ok(advisory) => advisory,
            Err(error) => {
                tracing::warn!(%error, "an advisory is not readable; dropped");
                self.say(&delivery.ack_subject, Verdict::Ack).await?;
                return Ok(None);
            }
        };
        let role = [Role::Decode, Role::Prefill]
            .into_iter()
            .find(|role| queue_stream(*role) == advisory.stream)
            .ok_or_else(|| StreamError::new(what, format!("no queue is called {}", advisory.stream)))?;
        let queue = self.stream(queue_stream(role), what).await?;
        let receipt = Receipt { ack_subject: delivery.ack_subject, seq: advisory.stream_seq };
        match queue.get_raw_message(advisory.stream_seq).await {
            Ok(task) => {
                Ok(Some(Spent { role, payload: task.payload, deliveries: advisory.deliveries, receipt }))
            }
            // It was acknowledged in the meantime, late.
            Err(error) if error.to_string().contains("no message found") => {
                self.say(&receipt.ack_subject, Verdict::Ack).await?;
                Ok(None)
            }
            Err(error) => Err(StreamError::new(what, error)),
        }
    }

    async fn settle(&self, spent: &Spent) -> Result<(), StreamError> {
        let what = "taking a spent task out of its queue";
        let queue = self.stream(queue_stream(spent.role), what).await?;
        // Gone already is as good.
        if let Err(error) = queue.delete_message(spent.receipt.seq).await
            && !error.to_string().contains("no message found")
        {
            return Err(StreamError::new(what, error));
        }
        self.say(&spent.receipt.ack_subject, Verdict::Ack).await
    }
}

impl JetStream {
    async fn stream(&self, name: &str, what: &str) -> Result<Stream<()>, StreamError> {
        self.context.get_stream_no_info(name).await.map_err(failed(what))
    }
}
