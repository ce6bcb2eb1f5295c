//! Live configuration: a store of texts by key, and what they mean, kept up to date.

use crate::{StreamError, environment};
use async_trait::async_trait;
use forebay_schemas::config::LiveConfig;
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;

/// All values, by key, as they were stored.
pub type Values = Arc<BTreeMap<String, String>>;

/// What is set now. To be looked at with `borrow` when it is needed; nobody needs to wait for a change.
pub type Live = watch::Receiver<Arc<LiveConfig>>;

/// Where settings are kept. It takes any text: who sets checks before, and who reads checks again.
#[async_trait]
pub trait SettingsStore: Send + Sync + 'static {
    /// The value of a key.
    async fn get(&self, key: &str) -> Result<Option<String>, StreamError>;

    /// Sets a key.
    async fn put(&self, key: &str, value: &str) -> Result<(), StreamError>;

    /// Unsets a key, whether or not it is set.
    async fn remove(&self, key: &str) -> Result<(), StreamError>;

    /// All values, those of now to begin with, kept up to date for as long as the receiver lives.
    async fn watch(&self) -> Result<watch::Receiver<Values>, StreamError>;
}

/// What is set, kept up to date for as long as the receiver lives. A bad value is said once in the process's log, and
/// the last good one stays.
pub async fn follow(store: &dyn SettingsStore) -> Result<Live, StreamError> {
    let mut values = store.watch().await?;
    let mut told = Vec::new();
    let mut next = move |current: &LiveConfig, values: &Values| {
        let (config, errors) = current.follow(values);
        for error in errors.iter().filter(|error| !told.contains(*error)) {
            tracing::warn!(%error, "a live setting is ignored");
        }
        told = errors;
        config
    };
    let first = next(&LiveConfig::default(), &values.borrow_and_update());
    let (sender, receiver) = watch::channel(Arc::new(first));
    environment::spawn(async move {
        loop {
            tokio::select! {
                biased;
                () = sender.closed() => return,
                changed = values.changed() => if changed.is_err() { return },
            }
            let config = next(&sender.borrow(), &values.borrow_and_update());
            if **sender.borrow() != config {
                tracing::info!(?config, "live settings changed");
                sender.send_replace(Arc::new(config));
            }
        }
    });
    Ok(receiver)
}
