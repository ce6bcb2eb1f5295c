//! Events of prefix caches in the stream `FB_KV`, one subject for each worker.

use super::{
    JetStream, PublishError, WRONG_LAST_SEQUENCE, failed, header, header_number,
    topology::{KV, KV_SIGNS},
};
use crate::{
    StreamError,
    cache_events::{CacheEvents, TellError, Told},
    own_queues::Owner,
};
use async_nats::{HeaderMap, Message, header as names};
use async_trait::async_trait;
use forebay_schemas::{
    cache_event::{CacheChange, CacheEvent},
    ids::{ModelKey, WorkerId},
};
use futures::{StreamExt, stream::BoxStream};

/// Events read in one request: some of them are large.
const READ_BATCH: usize = 64;

fn subject(of: &Owner) -> String {
    format!("fb.kv.{}.{}", of.model, of.worker)
}

#[async_trait]
impl CacheEvents for JetStream {
    async fn tell(&self, of: &Owner, event: &CacheEvent, after: u64) -> Result<u64, TellError> {
        let what = || format!("telling of the cache of {}", of.worker);
        let mut headers = HeaderMap::new();
        match event.change {
            CacheChange::Snapshot { part: 0, .. } => headers.insert("Nats-Rollup", "sub"),
            _ => headers.insert(names::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, after.to_string()),
        }
        match self.publish(subject(of), headers, event.encode().into()).await {
            Ok(seq) => Ok(seq),
            Err(PublishError::Refused { code, .. }) if WRONG_LAST_SEQUENCE.contains(&code) => {
                Err(TellError::Overtaken(of.worker.clone()))
            }
            Err(error) => Err(StreamError::new(what(), error.cause()).into()),
        }
    }

    async fn told(&self, of: Option<&Owner>, after: u64) -> Result<Vec<Told>, StreamError> {
        let subject = of.map_or_else(|| "fb.kv.*.*".to_owned(), subject);
        let what = "reading the events of prefix caches";
        let (messages, _) =
            self.read_batch(KV, &subject, after + 1, READ_BATCH).await.map_err(failed(what))?;
        messages.iter().map(|message| told(message).map_err(failed(what))).collect()
    }

    async fn last_told(&self) -> Result<u64, StreamError> {
        let what = "asking for the last event of prefix caches";
        let stream = self.context.get_stream(KV).await.map_err(failed(what))?;
        Ok(stream.cached_info().state.last_sequence)
    }

    async fn signs(&self) -> Result<BoxStream<'static, ()>, StreamError> {
        let what = "listening for events of prefix caches";
        let signs = self.client.subscribe(format!("{KV_SIGNS}.>")).await.map_err(failed(what))?;
        Ok(signs.map(drop).boxed())
    }

    async fn forget(&self, of: &Owner) -> Result<(), StreamError> {
        let what = format!("dropping what is known of the cache of {}", of.worker);
        let stream = self.context.get_stream_no_info(KV).await.map_err(failed(&what))?;
        stream.purge().filter(subject(of)).await.map(drop).map_err(failed(what))
    }
}

fn told(message: &Message) -> Result<Told, &'static str> {
    let headers = message.headers.as_ref();
    let seq = header_number(headers, "Nats-Sequence").ok_or("a stored message without sequence")?;
    let subject = header(headers, "Nats-Subject").ok_or("a stored message without subject")?;
    let of = owner_of(subject).ok_or("a subject of unknown form")?;
    let event = CacheEvent::decode(&message.payload)
        .inspect_err(
            |error| tracing::debug!(worker = %of.worker, %error, "an event of a cache is not readable"),
        )
        .ok()
        .filter(|event| event.worker == of.worker);
    Ok(Told { seq, of, event })
}

/// Whose subject (`fb.kv.<model>.<worker>`) it is.
fn owner_of(subject: &str) -> Option<Owner> {
    let (model, worker) = subject.strip_prefix("fb.kv.")?.split_once('.')?;
    Some(Owner { model: ModelKey::new(model).ok()?, worker: WorkerId::new(worker).ok()? })
}
