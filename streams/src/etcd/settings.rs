//! Live configuration as keys in etcd.

use super::{
    Etcd,
    follow::{Change, follow},
    wire::{Done, Range, encode},
};
use crate::{
    StreamError,
    settings::{SettingsStore, Values},
};
use async_trait::async_trait;
use serde_json::json;
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;

/// What the keys of settings begin with.
const CONFIG: &str = "/forebay/config/";

#[async_trait]
impl SettingsStore for Etcd {
    async fn get(&self, key: &str) -> Result<Option<String>, StreamError> {
        let body = json!({ "key": encode(format!("{CONFIG}{key}")) });
        let range: Range = self.client.call(&format!("reading {key}"), "kv/range", body).await?;
        Ok(range.kvs.first().map(|kv| String::from_utf8_lossy(&kv.value).into_owned()))
    }

    async fn put(&self, key: &str, value: &str) -> Result<(), StreamError> {
        let body = json!({ "key": encode(format!("{CONFIG}{key}")), "value": encode(value) });
        self.client.call::<Done>(&format!("setting {key}"), "kv/put", body).await.map(drop)
    }

    async fn remove(&self, key: &str) -> Result<(), StreamError> {
        let body = json!({ "key": encode(format!("{CONFIG}{key}")) });
        self.client.call::<Done>(&format!("unsetting {key}"), "kv/deleterange", body).await.map(drop)
    }

    async fn watch(&self) -> Result<watch::Receiver<Values>, StreamError> {
        let (sender, receiver) = watch::channel(Values::default());
        let mut values = BTreeMap::new();
        follow(self.client.clone(), CONFIG, move |change| {
            match change {
                Change::Put(key, value) => {
                    values.insert(key, String::from_utf8_lossy(&value).into_owned());
                }
                Change::Gone(key) => drop(values.remove(&key)),
                Change::Back | Change::Tick => return !sender.is_closed(),
            }
            sender.send_if_modified(|current| {
                let differs = **current != values;
                *current = Arc::new(values.clone());
                differs
            });
            !sender.is_closed()
        })
        .await?;
        Ok(receiver)
    }
}
