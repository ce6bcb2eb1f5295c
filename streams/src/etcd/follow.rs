//! Following all keys of a prefix: what there is, then every change, across interruptions of any kind.

use super::{
    client::Client,
    wire::{KeyValue, Range, WatchLine, Watched, encode, range_end},
};
use crate::StreamError;
use reqwest::Response;
use serde_json::json;
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// Pause before a watch that ended is begun again.
const WATCH_PAUSE: Duration = Duration::from_millis(250);

/// Longest line of a watch: some thousand changes of a few hundred bytes. A longer one ends it, and what there is is
/// listed again.
const LINE_MAX: usize = 16 << 20;

/// How often a listener is told that time passes.
const TICK: Duration = Duration::from_millis(200);

/// A change of a key, named without the prefix, or of what is heard.
pub(super) enum Change {
    /// It has this value now.
    Put(String, Vec<u8>),
    /// It has no value any more.
    Gone(String),
    /// Changes are heard again after an interruption; those that were missed follow.
    Back,
    /// Time has passed.
    Tick,
}

/// Feeds the keys of a prefix and their changes to `on_change` until that returns false. What there is at the time of
/// the call has been fed when this returns.
///
/// After an interruption everything is listed again, rather than watched from the last revision that was seen: so it
/// does not matter what etcd has compacted since, nor whether it still is the same etcd.
pub(super) async fn follow(
    client: Arc<Client>,
    prefix: &'static str,
    mut on_change: impl FnMut(Change) -> bool + Send + 'static,
) -> Result<(), StreamError> {
    let mut keys = BTreeSet::new();
    let mut revision = list(&client, prefix, &mut keys, &mut on_change).await?;
    tokio::spawn(async move {
        loop {
            if !watch(&client, prefix, revision, &mut keys, &mut on_change).await {
                return;
            }
            revision = loop {
                tokio::time::sleep(WATCH_PAUSE).await;
                if !on_change(Change::Tick) {
                    return;
                }
                let mut back = false;
                let mut returned = |change| {
                    if !std::mem::replace(&mut back, true) {
                        on_change(Change::Back);
                    }
                    on_change(change)
                };
                match list(&client, prefix, &mut keys, &mut returned).await {
                    Ok(revision) => break revision,
                    Err(error) => tracing::debug!(prefix, %error, "etcd is away; trying again"),
                }
            };
        }
    });
    Ok(())
}

/// Feeds what there is now, and what there is no more. Returns the revision of it.
async fn list(
    client: &Client,
    prefix: &str,
    keys: &mut BTreeSet<String>,
    on_change: &mut impl FnMut(Change) -> bool,
) -> Result<i64, StreamError> {
    let body = json!({ "key": encode(prefix), "range_end": range_end(prefix) });
    let range: Range = client.call(&format!("listing {prefix} in etcd"), "kv/range", body).await?;
    let mut gone = std::mem::take(keys);
    // Said even if there is nothing, so that a listener hears of the return.
    on_change(Change::Tick);
    for kv in range.kvs {
        let (key, value) = named(prefix, kv);
        gone.remove(&key);
        keys.insert(key.clone());
        on_change(Change::Put(key, value));
    }
    for key in gone {
        on_change(Change::Gone(key));
    }
    Ok(range.header.revision)
}

/// Feeds changes after a revision until something interrupts them. False if nobody listens any more.
async fn watch(
    client: &Client,
    prefix: &str,
    revision: i64,
    keys: &mut BTreeSet<String>,
    on_change: &mut impl FnMut(Change) -> bool,
) -> bool {
    let create = json!({
        "key": encode(prefix),
        "range_end": range_end(prefix),
        "start_revision": (revision + 1).to_string(),
    });
    let what = format!("watching {prefix} in etcd");
    let response = match client.watch(&what, json!({ "create_request": create })).await {
        Ok(response) => response,
        Err(error) => {
            tracing::debug!(%error, "no watch; trying again");
            return true;
        }
    };
    let mut lines = Lines { response, buffer: Vec::new() };
    let mut ticks = tokio::time::interval(TICK);
    loop {
        let line = tokio::select! {
            biased;
            line = lines.next() => line,
            _ = ticks.tick() => {
                if !on_change(Change::Tick) {
                    return false;
                }
                continue;
            }
        };
        let watched = match line {
            Ok(Some(watched)) if !watched.canceled => watched,
            Ok(_) => {
                tracing::debug!(prefix, "etcd has ended a watch; listing again");
                return true;
            }
            Err(cause) => {
                tracing::debug!(prefix, cause, "watch interrupted; listing again");
                return true;
            }
        };
        if watched.created {
            tracing::trace!(prefix, revision, "watching");
        }
        for event in watched.events {
            let (key, value) = named(prefix, event.kv);
            let change = match event.kind.as_deref() {
                Some("DELETE") => {
                    keys.remove(&key);
                    Change::Gone(key)
                }
                _ => {
                    keys.insert(key.clone());
                    Change::Put(key, value)
                }
            };
            if !on_change(change) {
                return false;
            }
        }
    }
}

fn named(prefix: &str, kv: KeyValue) -> (String, Vec<u8>) {
    let key = String::from_utf8_lossy(&kv.key);
    (key.strip_prefix(prefix).unwrap_or(&key).to_owned(), kv.value)
}

/// The lines of a watch.
struct Lines {
    response: Response,
    buffer: Vec<u8>,
}

impl Lines {
    /// The next one; none at the end. Can be dropped at any time.
    async fn next(&mut self) -> Result<Option<Watched>, String> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let line: WatchLine = serde_json::from_slice(&line).map_err(|error| error.to_string())?;
                return Ok(line.result);
            }
            if self.buffer.len() > LINE_MAX {
                return Err(format!("a line of more than {LINE_MAX} bytes"));
            }
            match self.response.chunk().await.map_err(|error| error.to_string())? {
                Some(bytes) => self.buffer.extend_from_slice(&bytes),
                None => return Ok(None),
            }
        }
    }
}
