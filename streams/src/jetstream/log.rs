//! Logs as subjects of the stream `FB_LOG`.

use super::{
    FULL, JetStream, LOST, PublishError, REQUEST_TIMEOUT, WRONG_LAST_SEQUENCE, failed, header, header_number,
    topology::LOG,
};
use crate::{
    StreamError,
    log::{AppendError, EventLog, Live, LogRef, Recorded, Refusal, persist},
};
use async_nats::{HeaderMap, Message, StatusCode, header as names};
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{
    event::Event,
    ids::{GatewayId, RequestId},
    wire,
};
use futures::{StreamExt, stream::BoxStream};
use std::pin::pin;

/// Events read in one request.
pub(super) const READ_BATCH: usize = 512;

/// Lets the expected last sequence be that of other subjects too (nats-server 2.11 and newer).
const EXPECTED_SUBJECT: &str = "Nats-Expected-Last-Subject-Sequence-Subject";

fn subject(log: &LogRef) -> String {
    format!("fb.log.{}.{}", log.gateway, log.request)
}

#[async_trait]
impl EventLog for JetStream {
    async fn append(&self, log: &LogRef, after: u64, event: &Event) -> Result<u64, AppendError> {
        let payload = Bytes::from(wire::encode(event));
        let mut headers = HeaderMap::new();
        if self.limits.fence {
            headers.insert(names::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, after.to_string());
        }
        persist(log, || self.try_append(log, after, headers.clone(), payload.clone())).await
    }

    async fn begin(&self, log: &LogRef, event: &Event) -> Result<u64, AppendError> {
        let payload = Bytes::from(wire::encode(event));
        let mut headers = HeaderMap::new();
        headers.insert(names::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, "0");
        headers.insert(EXPECTED_SUBJECT, format!("fb.log.*.{}", log.request));
        persist(log, || self.try_append(log, 0, headers.clone(), payload.clone())).await
    }

    async fn remove(&self, log: &LogRef) -> Result<(), StreamError> {
        let what = format!("removing the log of {log}");
        let stream = self.context.get_stream_no_info(LOG).await.map_err(failed(&what))?;
        stream.purge().filter(subject(log)).await.map(drop).map_err(failed(what))
    }

    async fn read(&self, log: &LogRef, after: u64) -> Result<Vec<Recorded>, StreamError> {
        let what = format!("reading the log of {log}");
        let mut events = Vec::new();
        let mut from = after + 1;
        loop {
            let (messages, pending) =
                self.read_batch(LOG, &subject(log), from, READ_BATCH).await.map_err(failed(&what))?;
            for message in &messages {
                events.push(recorded(message).map_err(failed(&what))?);
            }
            match events.last() {
                Some(last) if pending && !messages.is_empty() => from = last.seq + 1,
                _ => return Ok(events),
            }
        }
    }

    async fn last_seq(&self, log: &LogRef) -> Result<u64, StreamError> {
        let last = self.last(&subject(log)).await?;
        Ok(last.and_then(|message| header_number(message.headers.as_ref(), "Nats-Sequence")).unwrap_or(0))
    }

    async fn find(&self, request: RequestId) -> Result<Option<LogRef>, StreamError> {
        let last = self.last(&format!("fb.log.*.{request}")).await?;
        Ok(last.and_then(|message| log_of(header(message.headers.as_ref(), "Nats-Subject")?)))
    }

    async fn tail(&self, gateway: &GatewayId) -> Result<BoxStream<'static, Live>, StreamError> {
        self.live(format!("fb.live.{gateway}.>")).await
    }

    async fn watch(&self, log: &LogRef) -> Result<BoxStream<'static, Live>, StreamError> {
        self.live(format!("fb.live.{}.{}", log.gateway, log.request)).await
    }

    async fn tail_all(&self) -> Result<BoxStream<'static, Live>, StreamError> {
        self.live("fb.live.>".to_owned()).await
    }
}

impl JetStream {
    async fn try_append(
        &self,
        log: &LogRef,
        after: u64,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<u64, Refusal> {
        let bytes = payload.len();
        self.publish(subject(log), headers, payload).await.map_err(|error| match error {
            PublishError::Refused { code, .. } if WRONG_LAST_SEQUENCE.contains(&code) => {
                Refusal::Final(AppendError::Conflict { log: log.clone(), after })
            }
            PublishError::Refused { code, description } if FULL.contains(&code) => {
                Refusal::Final(AppendError::Full(description))
            }
            PublishError::TooLarge => Refusal::Final(AppendError::TooLarge { log: log.clone(), bytes }),
            PublishError::Refused { code, description } => {
                Refusal::Unknown(format!("{description} ({code})"))
            }
            PublishError::NotStored(cause) | PublishError::Unknown(cause) => Refusal::Unknown(cause),
        })
    }

    async fn live(&self, subject: String) -> Result<BoxStream<'static, Live>, StreamError> {
        let what = format!("subscribing to {subject}");
        let subscription = self.client.subscribe(subject).await.map_err(failed(what))?;
        let events = subscription.filter_map(|message| async move {
            let live = live_event(&message);
            if live.is_none() {
                tracing::warn!(subject = %message.subject, "a live event is not readable; it will be read from the log");
            }
            live
        });
        Ok(events.boxed())
    }

    /// The last message of a subject (which may have wildcards).
    async fn last(&self, subject: &str) -> Result<Option<Message>, StreamError> {
        let what = format!("reading the last event of {subject}");
        let query = serde_json::json!({ "last_by_subj": subject }).to_string();
        let lost = self.connection_lost();
        let reply = tokio::select! {
            biased;
            reply = self.client.request(format!("$JS.API.DIRECT.GET.{LOG}"), query.into()) => reply,
            () = lost => return Err(StreamError::new(what, LOST)),
        };
        let reply = reply.map_err(failed(&what))?;
        match reply.status {
            None => Ok(Some(reply)),
            Some(StatusCode::NOT_FOUND) => Ok(None),
            Some(status) => Err(StreamError::new(what, status)),
        }
    }

    /// At most `batch` messages of a subject from a sequence on, and whether there are more: a batched direct get (ADR-31).
    pub(super) async fn read_batch(
        &self,
        stream: &str,
        subject: &str,
        from: u64,
        batch: usize,
    ) -> Result<(Vec<Message>, bool), String> {
        let mut lost = pin!(self.connection_lost());
        let inbox = self.client.new_inbox();
        let mut replies = self.client.subscribe(inbox.clone()).await.map_err(|error| error.to_string())?;
        let query = serde_json::json!({ "seq": from, "batch": batch, "next_by_subj": subject }).to_string();
        self.client
            .publish_with_reply(format!("$JS.API.DIRECT.GET.{stream}"), inbox, query.into())
            .await
            .map_err(|error| error.to_string())?;
        let mut messages = Vec::new();
        loop {
            let reply = tokio::select! {
                biased;
                reply = tokio::time::timeout(REQUEST_TIMEOUT, replies.next()) => reply,
                () = &mut lost => return Err(LOST.into()),
            };
            let reply = reply
                .map_err(|_| format!("no answer within {REQUEST_TIMEOUT:?}"))?
                .ok_or("the connection was closed")?;
            match reply.status {
                None => messages.push(reply),
                Some(StatusCode::NOT_FOUND) => return Ok((messages, false)),
                Some(status) if status.as_u16() == 204 => {
                    let pending = header_number(reply.headers.as_ref(), "Nats-Num-Pending").unwrap_or(0);
                    return Ok((messages, pending > 0));
                }
                Some(status) => return Err(status.to_string()),
            }
        }
    }
}

/// The log that a subject (`fb.log.<gateway>.<request>` or `fb.live.…`) belongs to.
fn log_of(subject: &str) -> Option<LogRef> {
    let mut tokens = subject.split('.').skip(2);
    Some(LogRef { gateway: GatewayId::new(tokens.next()?).ok()?, request: tokens.next()?.parse().ok()? })
}

fn recorded(message: &Message) -> Result<Recorded, String> {
    let seq = header_number(message.headers.as_ref(), "Nats-Sequence")
        .ok_or("a stored message without sequence")?;
    let event =
        wire::decode(&message.payload).map_err(|error| format!("event at sequence {seq}: {error}"))?;
    Ok(Recorded { seq, event })
}

fn live_event(message: &Message) -> Option<Live> {
    Some(Live {
        log: log_of(&message.subject)?,
        previous: header_number(message.headers.as_ref(), "Nats-Last-Sequence")?,
        recorded: recorded(message).ok()?,
    })
}
