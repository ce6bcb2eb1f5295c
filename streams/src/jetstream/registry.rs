//! Models and workers as keys of NATS KV buckets, tokenizers as objects.

use super::{
    JetStream, failed,
    topology::{BLOBS, MODELS, WORKERS},
};
use crate::{
    StreamError,
    registry::{Models, Registry, Workers, blob_name},
};
use async_nats::jetstream::kv::{Entry, Operation, Store};
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{
    card::{BlobRef, ModelCard, WorkerLease},
    ids::WorkerId,
};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};
use tokio::{io::AsyncReadExt, sync::watch, time::Instant};

/// Pause before a watch that ended is begun again.
const WATCH_PAUSE: Duration = Duration::from_secs(1);

/// How long what a starting worker publishes is tried.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// Pause between two tries.
const START_PAUSE: Duration = Duration::from_millis(200);

/// Tries again for a while: of a stream that was just made, not all servers of a cluster know at once.
async fn patiently<T, F: Future<Output = Result<T, StreamError>>>(
    mut attempt: impl FnMut() -> F,
) -> Result<T, StreamError> {
    let give_up = Instant::now() + START_PATIENCE;
    loop {
        match attempt().await {
            Err(error) if Instant::now() < give_up => {
                tracing::debug!(%error, "trying again");
                tokio::time::sleep(START_PAUSE).await;
            }
            other => return other,
        }
    }
}

#[async_trait]
impl Registry for JetStream {
    async fn publish_model(&self, card: &ModelCard) -> Result<(), StreamError> {
        let value = Bytes::from(serde_json::to_vec(card).expect("plain data always encodes"));
        patiently(|| self.put_card(card, value.clone())).await
    }

    async fn models(&self) -> Result<watch::Receiver<Models>, StreamError> {
        let (sender, receiver) = watch::channel(Models::default());
        let mut cards: HashMap<String, Arc<ModelCard>> = HashMap::new();
        self.follow_bucket(MODELS, None, move |change| {
            match change {
                Change::Put(key, value) => {
                    if let Some(card) = parse::<ModelCard>(MODELS, &key, &value) {
                        cards.insert(key, Arc::new(card));
                    }
                }
                Change::Gone(key) => drop(cards.remove(&key)),
                Change::Tick => {}
            }
            let models: BTreeMap<_, _> =
                cards.values().map(|card| (card.name.clone(), card.clone())).collect();
            sender.send_if_modified(|current| replace(current, Arc::new(models)));
            !sender.is_closed()
        })
        .await?;
        Ok(receiver)
    }

    async fn renew(&self, lease: &WorkerLease) -> Result<(), StreamError> {
        let value = serde_json::to_vec(lease).expect("plain data always encodes");
        let what = format!("renewing the lease of {}", lease.worker);
        let bucket = self.bucket(WORKERS).await?;
        bucket.put(lease.worker.as_str(), value.into()).await.map(drop).map_err(failed(what))
    }

    async fn resign(&self, worker: &WorkerId) -> Result<(), StreamError> {
        let bucket = self.bucket(WORKERS).await?;
        bucket.purge(worker.as_str()).await.map_err(failed(format!("ending the lease of {worker}")))
    }

    fn lease_time(&self) -> Duration {
        self.limits.lease_time
    }

    async fn workers(&self) -> Result<watch::Receiver<Workers>, StreamError> {
        let (sender, receiver) = watch::channel(Workers::default());
        let lease_time = self.limits.lease_time;
        let mut leases: HashMap<String, (Arc<WorkerLease>, Instant)> = HashMap::new();
        // A key that expires in the bucket tells nobody: each lease is timed here too, by this clock.
        self.follow_bucket(WORKERS, Some(lease_time / 10), move |change| {
            match change {
                Change::Put(key, value) => {
                    if let Some(lease) = parse::<WorkerLease>(WORKERS, &key, &value) {
                        leases.insert(key, (Arc::new(lease), Instant::now()));
                    }
                }
                Change::Gone(key) => drop(leases.remove(&key)),
                Change::Tick => {}
            }
            leases.retain(|_, (_, renewed)| renewed.elapsed() < lease_time);
            let workers: BTreeMap<_, _> =
                leases.values().map(|(lease, _)| (lease.worker.clone(), lease.clone())).collect();
            sender.send_if_modified(|current| replace(current, Arc::new(workers)));
            !sender.is_closed()
        })
        .await?;
        Ok(receiver)
    }

    async fn put_blob(&self, bytes: Bytes) -> Result<BlobRef, StreamError> {
        let blob = BlobRef { name: blob_name(&bytes), bytes: bytes.len() as u64 };
        patiently(|| self.store_blob(&blob, bytes.clone())).await?;
        Ok(blob)
    }

    async fn get_blob(&self, blob: &BlobRef) -> Result<Bytes, StreamError> {
        let what = format!("reading blob {}", blob.name);
        let store = self.context.get_object_store(BLOBS).await.map_err(failed(&what))?;
        let object = store.get(&blob.name).await.map_err(failed(&what))?;
        let mut bytes = Vec::with_capacity(blob.bytes as usize);
        object.take(blob.bytes + 1).read_to_end(&mut bytes).await.map_err(failed(&what))?;
        if blob_name(&bytes) != blob.name {
            return Err(StreamError::new(what, "its content does not fit its digest"));
        }
        Ok(bytes.into())
    }
}

/// A change of a bucket, or the passing of time.
enum Change {
    Put(String, Bytes),
    Gone(String),
    Tick,
}

impl JetStream {
    async fn put_card(&self, card: &ModelCard, value: Bytes) -> Result<(), StreamError> {
        let what = format!("publishing model {}", card.name);
        let bucket = self.bucket(MODELS).await?;
        bucket.put(card.key.as_str(), value).await.map(drop).map_err(failed(what))
    }

    async fn store_blob(&self, blob: &BlobRef, bytes: Bytes) -> Result<(), StreamError> {
        let what = format!("storing blob {}", blob.name);
        let store = self.context.get_object_store(BLOBS).await.map_err(failed(&what))?;
        if store.info(&blob.name).await.is_err() {
            store.put(blob.name.as_str(), &mut bytes.as_ref()).await.map_err(failed(&what))?;
        }
        Ok(())
    }

    async fn bucket(&self, name: &str) -> Result<Store, StreamError> {
        self.context.get_key_value(name).await.map_err(failed(format!("opening bucket {name}")))
    }

    /// Feeds a bucket's content and its changes to `on_change` until that returns false. The content at the time
    /// of the call has been fed when this returns.
    async fn follow_bucket(
        &self,
        name: &'static str,
        tick: Option<Duration>,
        mut on_change: impl FnMut(Change) -> bool + Send + 'static,
    ) -> Result<(), StreamError> {
        let store = self.bucket(name).await?;
        let what = format!("reading bucket {name}");
        let mut keys = store.keys().await.map_err(failed(&what))?;
        while let Some(key) = keys.next().await {
            let key = key.map_err(failed(&what))?;
            if let Some(value) = store.get(&key).await.map_err(failed(&what))? {
                on_change(Change::Put(key, value));
            }
        }
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(tick.unwrap_or(Duration::from_secs(3600)));
            loop {
                let Ok(mut entries) = store.watch_with_history(">").await else {
                    tokio::time::sleep(WATCH_PAUSE).await;
                    continue;
                };
                loop {
                    let change = tokio::select! {
                        entry = entries.next() => match entry {
                            Some(Ok(entry)) => change_of(entry),
                            Some(Err(error)) => {
                                tracing::debug!(bucket = name, %error, "watch interrupted; beginning again");
                                break;
                            }
                            None => break,
                        },
                        _ = ticks.tick() => Change::Tick,
                    };
                    if !on_change(change) {
                        return;
                    }
                }
                tokio::time::sleep(WATCH_PAUSE).await;
            }
        });
        Ok(())
    }
}

fn change_of(entry: Entry) -> Change {
    match entry.operation {
        Operation::Put => Change::Put(entry.key, entry.value),
        Operation::Delete | Operation::Purge => Change::Gone(entry.key),
    }
}

fn parse<T: DeserializeOwned>(bucket: &str, key: &str, value: &[u8]) -> Option<T> {
    serde_json::from_slice(value)
        .inspect_err(|error| tracing::warn!(bucket, key, %error, "an entry is not readable; ignored"))
        .ok()
}

fn replace<T: PartialEq>(current: &mut T, new: T) -> bool {
    let differs = *current != new;
    *current = new;
    differs
}
