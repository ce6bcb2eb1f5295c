//! Models as keys of a NATS KV bucket, tokenizers as objects.

use super::{
    JetStream,
    bucket::{Change, parse, replace},
    failed,
    topology::{BLOBS, MODELS},
};
use crate::{
    StreamError,
    catalog::{Catalog, Models, blob_name},
};
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::card::{BlobRef, ModelCard};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};
use tokio::{io::AsyncReadExt, sync::watch, time::Instant};

/// How long what a starting worker publishes is tried.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// Pause between two tries.
const START_PAUSE: Duration = Duration::from_millis(200);

/// Tries again for a while: of what was just made, not all servers of a cluster know at once.
pub(super) async fn patiently<T, F: Future<Output = Result<T, StreamError>>>(
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
impl Catalog for JetStream {
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
                Change::Tick | Change::Away | Change::Back => {}
            }
            let models: BTreeMap<_, _> =
                cards.values().map(|card| (card.name.clone(), card.clone())).collect();
            sender.send_if_modified(|current| replace(current, Arc::new(models)));
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
}
