//! Live configuration as keys of a NATS KV bucket.

use super::{
    JetStream,
    bucket::{Change, replace},
    failed,
    topology::CONFIG,
};
use crate::{
    StreamError,
    settings::{SettingsStore, Values},
};
use async_trait::async_trait;
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;

#[async_trait]
impl SettingsStore for JetStream {
    async fn get(&self, key: &str) -> Result<Option<String>, StreamError> {
        let value = self.bucket(CONFIG).await?.get(key).await.map_err(failed(format!("reading {key}")))?;
        Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    async fn put(&self, key: &str, value: &str) -> Result<(), StreamError> {
        let (what, value) = (format!("setting {key}"), value.to_owned().into());
        self.bucket(CONFIG).await?.put(key, value).await.map(drop).map_err(failed(what))
    }

    async fn remove(&self, key: &str) -> Result<(), StreamError> {
        self.bucket(CONFIG).await?.delete(key).await.map_err(failed(format!("unsetting {key}")))
    }

    async fn watch(&self) -> Result<watch::Receiver<Values>, StreamError> {
        let (sender, receiver) = watch::channel(Values::default());
        let mut values = BTreeMap::new();
        self.follow_bucket(CONFIG, None, move |change| {
            match change {
                Change::Put(key, value) => {
                    values.insert(key, String::from_utf8_lossy(&value).into_owned());
                }
                Change::Gone(key) => drop(values.remove(&key)),
                Change::Tick | Change::Away | Change::Back => {}
            }
            sender.send_if_modified(|current| replace(current, Arc::new(values.clone())));
            !sender.is_closed()
        })
        .await?;
        Ok(receiver)
    }
}
