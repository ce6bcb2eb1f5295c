//! What does not go through queues: models, leases of workers, settings.

use super::Memory;
use crate::{
    StreamError,
    catalog::{Catalog, Models, blob_name},
    registry::{Registry, Workers},
    settings::{SettingsStore, Values},
};
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{
    card::{BlobRef, ModelCard, WorkerLease},
    ids::WorkerId,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};

/// A value that others keep up with, each over a channel of its own: a shared one wakes them in random order.
#[derive(Default)]
pub(super) struct Published<T>(Mutex<(T, Vec<watch::Sender<T>>)>);

impl<T: Clone> Published<T> {
    fn get(&self) -> T {
        self.0.lock().expect("no panics while held").0.clone()
    }

    fn subscribe(&self) -> watch::Receiver<T> {
        let (value, subscribers) = &mut *self.0.lock().expect("no panics while held");
        let (sender, receiver) = watch::channel(value.clone());
        subscribers.push(sender);
        receiver
    }

    fn publish(&self, change: impl FnOnce(&mut T)) {
        let (value, subscribers) = &mut *self.0.lock().expect("no panics while held");
        change(value);
        subscribers.retain(|subscriber| subscriber.send(value.clone()).is_ok());
    }
}

#[derive(Default)]
pub(super) struct Leases {
    until: Mutex<BTreeMap<WorkerId, (WorkerLease, Instant)>>,
    living: Published<Workers>,
}

impl Leases {
    fn change(&self, change: impl FnOnce(&mut BTreeMap<WorkerId, (WorkerLease, Instant)>)) {
        let mut leases = self.until.lock().expect("no panics while held");
        change(&mut leases);
        let now = Instant::now();
        leases.retain(|_, (_, until)| *until > now);
        let living =
            leases.iter().map(|(worker, (lease, _))| (worker.clone(), Arc::new(lease.clone()))).collect();
        self.living.publish(|workers| *workers = Arc::new(living));
    }
}

#[async_trait]
impl Catalog for Memory {
    async fn publish_model(&self, card: &ModelCard) -> Result<(), StreamError> {
        self.models.publish(|models| {
            Arc::make_mut(models).insert(card.name.clone(), Arc::new(card.clone()));
        });
        Ok(())
    }

    async fn models(&self) -> Result<watch::Receiver<Models>, StreamError> {
        Ok(self.models.subscribe())
    }

    async fn put_blob(&self, bytes: Bytes) -> Result<BlobRef, StreamError> {
        let blob = BlobRef { name: blob_name(&bytes), bytes: bytes.len() as u64 };
        self.state().blobs.insert(blob.name.clone(), bytes);
        Ok(blob)
    }

    async fn get_blob(&self, blob: &BlobRef) -> Result<Bytes, StreamError> {
        let stored = self.state().blobs.get(&blob.name).cloned();
        stored.ok_or_else(|| StreamError::new(format!("reading blob {}", blob.name), "no such blob"))
    }
}

#[async_trait]
impl Registry for Memory {
    async fn renew(&self, lease: &WorkerLease) -> Result<(), StreamError> {
        let until = Instant::now() + self.limits.lease_time;
        self.leases.change(|leases| drop(leases.insert(lease.worker.clone(), (lease.clone(), until))));
        let leases = self.leases.clone();
        tokio::spawn(async move {
            tokio::time::sleep_until(until).await;
            leases.change(|_| {});
        });
        Ok(())
    }

    async fn resign(&self, worker: &WorkerId) -> Result<(), StreamError> {
        self.leases.change(|leases| drop(leases.remove(worker)));
        Ok(())
    }

    fn lease_time(&self) -> Duration {
        self.limits.lease_time
    }

    async fn workers(&self) -> Result<watch::Receiver<Workers>, StreamError> {
        Ok(self.leases.living.subscribe())
    }
}

#[async_trait]
impl SettingsStore for Memory {
    async fn get(&self, key: &str) -> Result<Option<String>, StreamError> {
        Ok(self.settings.get().get(key).cloned())
    }

    async fn put(&self, key: &str, value: &str) -> Result<(), StreamError> {
        self.settings.publish(|values| drop(Arc::make_mut(values).insert(key.into(), value.into())));
        Ok(())
    }

    async fn remove(&self, key: &str) -> Result<(), StreamError> {
        self.settings.publish(|values| drop(Arc::make_mut(values).remove(key)));
        Ok(())
    }

    async fn watch(&self) -> Result<watch::Receiver<Values>, StreamError> {
        Ok(self.settings.subscribe())
    }
}
