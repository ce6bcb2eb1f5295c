//! Following a NATS KV bucket: its content, then every change, across interruptions.

use super::{JetStream, failed, lost_from};
use crate::StreamError;
use async_nats::jetstream::kv::{Entry, Operation, Store, Watch};
use bytes::Bytes;
use futures::StreamExt;
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio::time::Interval;

/// Pause before a watch that ended is begun again.
const WATCH_PAUSE: Duration = Duration::from_millis(250);

/// A change of a bucket, or of what is heard of it.
pub(super) enum Change {
    /// A key has this value now.
    Put(String, Bytes),
    /// A key has no value any more.
    Gone(String),
    /// Changes are not heard for now.
    Away,
    /// They are again, and what came meanwhile follows.
    Back,
    /// Time has passed.
    Tick,
}

impl JetStream {
    pub(super) async fn bucket(&self, name: &str) -> Result<Store, StreamError> {
        self.context.get_key_value(name).await.map_err(failed(format!("opening bucket {name}")))
    }

    /// Feeds a bucket's content and its changes to `on_change` until that returns false. The content at the time
    /// of the call has been fed when this returns.
    pub(super) async fn follow_bucket(
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
        let lost = self.lost.clone();
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(tick.unwrap_or(Duration::from_secs(3600)));
            let mut away = false;
            loop {
                // Asked for before the watch begins: a connection that breaks in between is not overlooked.
                let lost = lost_from(&lost);
                match store.watch_with_history(">").await {
                    Ok(entries) => {
                        let back = !std::mem::take(&mut away) || on_change(Change::Back);
                        if !back || !follow(entries, lost, &mut ticks, &mut on_change).await {
                            return;
                        }
                    }
                    Err(error) => tracing::debug!(bucket = name, %error, "no watch; trying again"),
                }
                away = true;
                if !on_change(Change::Away) {
                    return;
                }
                tokio::time::sleep(WATCH_PAUSE).await;
            }
        });
        Ok(())
    }
}

/// Follows one watch until it ends, or the connection that it came over: the client would resume it, but only after
/// many seconds. False if nobody listens any more.
async fn follow(
    mut entries: Watch,
    lost: impl Future<Output = ()>,
    ticks: &mut Interval,
    on_change: &mut impl FnMut(Change) -> bool,
) -> bool {
    tokio::pin!(lost);
    loop {
        let change = tokio::select! {
            biased;
            () = &mut lost => return true,
            entry = entries.next() => match entry {
                Some(Ok(entry)) => change_of(entry),
                Some(Err(error)) => {
                    tracing::debug!(%error, "watch interrupted; beginning again");
                    return true;
                }
                None => return true,
            },
            _ = ticks.tick() => Change::Tick,
        };
        if !on_change(change) {
            return false;
        }
    }
}

fn change_of(entry: Entry) -> Change {
    match entry.operation {
        Operation::Put => Change::Put(entry.key, entry.value),
        Operation::Delete | Operation::Purge => Change::Gone(entry.key),
    }
}

/// An entry's value; none, and a warning, if it is not what it should be.
pub(super) fn parse<T: DeserializeOwned>(bucket: &str, key: &str, value: &[u8]) -> Option<T> {
    serde_json::from_slice(value)
        .inspect_err(|error| tracing::warn!(bucket, key, %error, "an entry is not readable; ignored"))
        .ok()
}

/// Replaces a value, and says whether the new one differs.
pub(super) fn replace<T: PartialEq>(current: &mut T, new: T) -> bool {
    let differs = *current != new;
    *current = new;
    differs
}
