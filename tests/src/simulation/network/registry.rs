//! The network's part for what does not go through queues: models, leases of workers, settings.

use super::Link;
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{
    card::{BlobRef, ModelCard, WorkerLease},
    ids::WorkerId,
};
use forebay_streams::{
    StreamError,
    catalog::{Catalog, Models},
    registry::{Registry, Workers},
    settings::{SettingsStore, Values},
};
use std::time::Duration;
use tokio::{sync::watch, time::sleep};

#[async_trait]
impl Catalog for Link {
    async fn publish_model(&self, card: &ModelCard) -> Result<(), StreamError> {
        let (backend, card) = (self.world.streams.catalog.clone(), card.clone());
        self.carry("publish_model", async move { backend.publish_model(&card).await }).await?
    }

    async fn models(&self) -> Result<watch::Receiver<Models>, StreamError> {
        let backend = self.world.streams.catalog.clone();
        self.carry("models", async move { backend.models().await }).await?
    }

    async fn put_blob(&self, bytes: Bytes) -> Result<BlobRef, StreamError> {
        let backend = self.world.streams.catalog.clone();
        self.carry("put_blob", async move { backend.put_blob(bytes).await }).await?
    }

    async fn get_blob(&self, blob: &BlobRef) -> Result<Bytes, StreamError> {
        let (backend, blob) = (self.world.streams.catalog.clone(), blob.clone());
        self.carry("get_blob", async move { backend.get_blob(&blob).await }).await?
    }
}

#[async_trait]
impl Registry for Link {
    async fn renew(&self, lease: &WorkerLease) -> Result<(), StreamError> {
        self.introduce(&lease.worker);
        let (backend, lease) = (self.world.streams.registry.clone(), lease.clone());
        self.carry("renew", async move { backend.renew(&lease).await }).await?
    }

    async fn resign(&self, worker: &WorkerId) -> Result<(), StreamError> {
        let (backend, worker) = (self.world.streams.registry.clone(), worker.clone());
        self.carry("resign", async move { backend.resign(&worker).await }).await?
    }

    fn lease_time(&self) -> Duration {
        self.world.streams.registry.lease_time()
    }

    async fn workers(&self) -> Result<watch::Receiver<Workers>, StreamError> {
        let backend = self.world.streams.registry.clone();
        let all = self.carry("workers", async move { backend.workers().await }).await??;
        Ok(self.carry_news(all))
    }
}

#[async_trait]
impl SettingsStore for Link {
    async fn get(&self, key: &str) -> Result<Option<String>, StreamError> {
        let (backend, key) = (self.world.streams.settings.clone(), key.to_owned());
        self.carry("get", async move { backend.get(&key).await }).await?
    }

    async fn put(&self, key: &str, value: &str) -> Result<(), StreamError> {
        let (backend, key, value) = (self.world.streams.settings.clone(), key.to_owned(), value.to_owned());
        self.carry("put", async move { backend.put(&key, &value).await }).await?
    }

    async fn remove(&self, key: &str) -> Result<(), StreamError> {
        let (backend, key) = (self.world.streams.settings.clone(), key.to_owned());
        self.carry("remove", async move { backend.remove(&key).await }).await?
    }

    async fn watch(&self) -> Result<watch::Receiver<Values>, StreamError> {
        let backend = self.world.streams.settings.clone();
        let all = self.carry("watch", async move { backend.watch().await }).await??;
        Ok(self.carry_news(all))
    }
}

impl Link {
    /// What the backend publishes, as it reaches the process.
    fn carry_news<T: Clone + Send + Sync + 'static>(
        &self,
        mut all: watch::Receiver<T>,
    ) -> watch::Receiver<T> {
        let (sender, receiver) = watch::channel(all.borrow_and_update().clone());
        let link = self.clone();
        tokio::spawn(async move {
            while all.changed().await.is_ok() && !sender.is_closed() {
                sleep(link.draw().there).await;
                link.passes().await;
                sender.send_replace(all.borrow_and_update().clone());
            }
        });
        receiver
    }
}
