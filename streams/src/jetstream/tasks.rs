//! Queues as durable pull consumers on work-queue streams.

use super::{FULL, JetStream, LOST, PublishError, failed, own_queues, topology};
use crate::{
    StreamError,
    tasks::{CancelSignal, Delivery, Depth, EnqueueError, Presence, Tasks, Verdict},
};
use async_nats::{HeaderMap, Message, Request, client::RequestErrorKind, header as names};
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{
    ids::{ModelKey, WorkerId},
    task::Role,
};
use futures::{StreamExt, stream::BoxStream};
use std::time::Duration;
use tokio::time::Instant;
use topology::{consumer_name, queue_stream, queue_subject};

/// How long a publish is tried while the server does not answer: long enough for a restart, or for a cluster to elect a
/// leader. A task has an id: a repeat is harmless.
const PUBLISH_PATIENCE: Duration = Duration::from_secs(20);

/// The first pause between two tries; doubles up to [`PUBLISH_PAUSE_MAX`].
const PUBLISH_PAUSE: Duration = Duration::from_millis(20);

/// The longest pause between two tries.
const PUBLISH_PAUSE_MAX: Duration = Duration::from_millis(500);

/// Added to a pull's wait: the server's own "nothing came" should be heard before giving up on the server.
const PULL_SLACK: Duration = Duration::from_secs(2);

#[async_trait]
impl Tasks for JetStream {
    async fn ensure(&self, model: &ModelKey) -> Result<(), StreamError> {
        for role in [Role::Decode, Role::Prefill] {
            topology::ensure_consumer(&self.context, role, model, &self.limits).await?;
        }
        Ok(())
    }

    async fn publish(
        &self,
        role: Role,
        model: &ModelKey,
        dedup_id: &str,
        payload: Bytes,
    ) -> Result<(), EnqueueError> {
        self.queue(queue_subject(role, model), (role, model), dedup_id, payload).await
    }

    async fn pull(
        &self,
        role: Role,
        model: &ModelKey,
        wait: Duration,
    ) -> Result<Option<Delivery>, StreamError> {
        self.pull_from(queue_stream(role), &consumer_name(role, model), wait).await
    }

    async fn answer(&self, ack_subject: &str, verdict: Verdict) -> Result<(), StreamError> {
        match (verdict, own_queues::sequence(ack_subject)) {
            (Verdict::Nak | Verdict::Later(_), Some(seq)) => self.give_up(ack_subject, seq).await,
            _ => self.say(ack_subject, verdict).await,
        }
    }

    fn ack_wait(&self) -> Duration {
        self.limits.ack_wait
    }

    fn max_deliver(&self) -> u64 {
        self.limits.max_deliver
    }

    async fn depth(&self, role: Role, model: &ModelKey) -> Result<Depth, StreamError> {
        let consumer = consumer_name(role, model);
        let what = format!("reading the depth of {consumer}");
        let stream = self.context.get_stream_no_info(queue_stream(role)).await.map_err(failed(&what))?;
        let info = stream.consumer_info(&consumer).await.map_err(failed(&what))?;
        Ok(Depth { pending: info.num_pending, ack_pending: info.num_ack_pending as u64 })
    }

    async fn room(&self, role: Role) -> Result<u64, StreamError> {
        let name = queue_stream(role);
        let what = format!("reading the room in stream {name}");
        let stream = self.context.get_stream(name).await.map_err(failed(&what))?;
        let info = stream.cached_info();
        // Not above 0: no bound.
        Ok(match u64::try_from(info.config.max_messages) {
            Ok(most @ 1..) => most.saturating_sub(info.state.messages),
            _ => u64::MAX,
        })
    }

    async fn signal_cancel(&self, worker: &WorkerId, signal: &CancelSignal) -> Result<(), StreamError> {
        let payload = serde_json::to_vec(signal).expect("plain data always encodes");
        let what = format!("signalling worker {worker}");
        self.client.publish(signal_subject(worker), payload.into()).await.map_err(failed(what))
    }

    async fn presence(&self, worker: &WorkerId, wait: Duration) -> Result<Presence, StreamError> {
        // An empty signal is a question. The server itself says so if nobody subscribes to it.
        let question = Request::new().timeout(Some(wait));
        match self.client.send_request(signal_subject(worker), question).await {
            Ok(_) => Ok(Presence::Answers),
            Err(error) => match error.kind() {
                RequestErrorKind::NoResponders => Ok(Presence::Gone),
                RequestErrorKind::TimedOut => Ok(Presence::Silent),
                _ => Err(StreamError::new(format!("asking for worker {worker}"), error)),
            },
        }
    }

    async fn cancel_signals(
        &self,
        worker: &WorkerId,
    ) -> Result<BoxStream<'static, CancelSignal>, StreamError> {
        let what = format!("subscribing to signals for {worker}");
        let signals = self.client.subscribe(signal_subject(worker)).await.map_err(failed(what))?;
        let client = self.client.clone();
        let read = move |message: Message| {
            let client = client.clone();
            async move {
                if let Some(reply) = message.reply {
                    let _ = client.publish(reply, Bytes::new()).await;
                }
                serde_json::from_slice(&message.payload).ok()
            }
        };
        Ok(signals.filter_map(read).boxed())
    }
}

impl JetStream {
    /// Puts a task on a subject of a queue's stream.
    pub(super) async fn queue(
        &self,
        subject: String,
        (role, model): (Role, &ModelKey),
        dedup_id: &str,
        payload: Bytes,
    ) -> Result<(), EnqueueError> {
        let give_up = Instant::now() + PUBLISH_PATIENCE;
        let mut pause = PUBLISH_PAUSE;
        loop {
            let mut headers = HeaderMap::new();
            headers.insert(names::NATS_MESSAGE_ID, dedup_id);
            // JetStream only: a core publish into a full stream would vanish without a word.
            let trouble = match self.publish(subject.clone(), headers, payload.clone()).await {
                Ok(_) => return Ok(()),
                Err(PublishError::Refused { code, .. }) if FULL.contains(&code) => {
                    return Err(EnqueueError::Full { role, model: model.clone() });
                }
                Err(PublishError::Refused { code, description }) => format!("{description} ({code})"),
                Err(PublishError::NotStored(cause) | PublishError::Unknown(cause)) => cause,
                Err(PublishError::TooLarge) => "a task larger than the server takes".to_owned(),
            };
            if Instant::now() + pause > give_up {
                let what = format!("queueing a {} task of model {model}", role.as_str());
                return Err(StreamError::new(what, trouble).into());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PUBLISH_PAUSE_MAX);
        }
    }

    /// Says something of a delivered message.
    pub(super) async fn say(&self, ack_subject: &str, verdict: Verdict) -> Result<(), StreamError> {
        let what = || format!("answering {ack_subject}");
        let word = match verdict {
            Verdict::Ack => Bytes::from_static(b"+ACK"),
            Verdict::Nak => Bytes::from_static(b"-NAK"),
            Verdict::Later(delay) => format!("-NAK {{\"delay\":{}}}", delay.as_nanos()).into(),
            Verdict::Progress => Bytes::from_static(b"+WPI"),
        };
        self.client.publish(ack_subject.to_owned(), word).await.map_err(failed(what()))
    }

    /// Waits up to `wait` for one message of a consumer.
    pub(super) async fn pull_from(
        &self,
        stream: &str,
        consumer: &str,
        wait: Duration,
    ) -> Result<Option<Delivery>, StreamError> {
        let what = format!("pulling from {consumer}");
        let lost = self.connection_lost();
        // An inbox of its own: dropping this pull takes the server's interest away with it, so that no task is
        // delivered to a worker that no longer listens.
        let inbox = self.client.new_inbox();
        let mut replies = self.client.subscribe(inbox.clone()).await.map_err(failed(&what))?;
        let query = serde_json::json!({ "batch": 1, "expires": wait.as_nanos() as u64 }).to_string();
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}");
        self.client.publish_with_reply(subject, inbox, query.into()).await.map_err(failed(&what))?;
        let reply = tokio::select! {
            biased;
            reply = tokio::time::timeout(wait + PULL_SLACK, replies.next()) => reply,
            () = lost => return Err(StreamError::new(what, LOST)),
        };
        match reply {
            Ok(Some(reply)) => delivered(reply).map_err(failed(&what)),
            Ok(None) => Err(StreamError::new(what, "the connection was closed")),
            Err(_) => Err(StreamError::new(what, "the server does not answer")),
        }
    }
}

fn signal_subject(worker: &WorkerId) -> String {
    format!("fb.cancel.{worker}")
}

/// What a pull brought: a task, or word that there is none.
fn delivered(reply: Message) -> Result<Option<Delivery>, String> {
    if let Some(status) = reply.status {
        return match status.as_u16() {
            404 | 408 => Ok(None),
            _ => Err(reply.description.unwrap_or_else(|| status.to_string())),
        };
    }
    let ack_subject = reply.reply.ok_or("a task without ack subject")?.to_string();
    let delivery = AckSubject::parse(&ack_subject).map(|parsed| parsed.delivery);
    let delivery = delivery.ok_or_else(|| format!("an ack subject of unknown form: {ack_subject}"))?;
    Ok(Some(Delivery { payload: reply.payload, ack_subject, delivery }))
}

/// What an acknowledgement subject says.
pub(super) struct AckSubject<'a> {
    pub(super) stream: &'a str,
    pub(super) consumer: &'a str,
    /// How often the message has been delivered.
    pub(super) delivery: u64,
    /// The message's sequence within its stream.
    pub(super) seq: u64,
}

impl AckSubject<'_> {
    /// `$JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.…` or, with a domain, `$JS.ACK.<domain>.<account>.<stream>.…`
    pub(super) fn parse(text: &str) -> Option<AckSubject<'_>> {
        let tokens: Vec<&str> = text.strip_prefix("$JS.ACK.")?.split('.').collect();
        let tokens = if tokens.len() >= 9 { &tokens[2..] } else { &tokens[..] };
        let [stream, consumer, delivery, seq, ..] = tokens else { return None };
        Some(AckSubject { stream, consumer, delivery: delivery.parse().ok()?, seq: seq.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ack_subjects_are_read_with_and_without_a_domain() {
        for text in [
            "$JS.ACK.FB_DECODE.own-w-1.2.37.1.1750000000.0",
            "$JS.ACK.hub.hash.FB_DECODE.own-w-1.2.37.1.175.0.x",
        ] {
            let parsed = AckSubject::parse(text).unwrap();
            assert_eq!((parsed.stream, parsed.consumer), ("FB_DECODE", "own-w-1"));
            assert_eq!((parsed.delivery, parsed.seq), (2, 37));
        }
        assert!(AckSubject::parse("memory.ack.7").is_none());
    }
}
