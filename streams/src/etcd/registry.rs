//! Leases of workers as keys with an etcd lease.

use super::{
    Etcd,
    follow::{Change, follow},
    roster::Roster,
    wire::{Done, Granted, KeptAlive, encode},
};
use crate::{
    StreamError,
    registry::{Registry, Workers},
};
use async_trait::async_trait;
use forebay_schemas::{card::WorkerLease, ids::WorkerId};
use serde_json::json;
use std::time::Duration;
use tokio::{sync::watch, time::Instant};

/// What workers' keys begin with.
const WORKERS: &str = "/forebay/workers/";

/// A lease that this process holds in etcd.
pub(super) struct Held {
    /// Etcd's number of it.
    id: String,
    /// What was written with it last.
    value: Vec<u8>,
}

#[async_trait]
impl Registry for Etcd {
    /// Keeps the lease alive, which costs etcd no write; what the worker says of itself is written only when it differs.
    async fn renew(&self, lease: &WorkerLease) -> Result<(), StreamError> {
        let what = format!("renewing the lease of {}", lease.worker);
        let value = serde_json::to_vec(lease).expect("plain data always encodes");
        // Taken out meanwhile: after anything unexpected there is a new one, and the old one ends by itself.
        let held = self.held().remove(&lease.worker);
        let mut held = match held {
            Some(held) if self.is_kept_alive(&what, &held.id).await? => held,
            _ => Held { id: self.grant(&what).await?, value: Vec::new() },
        };
        if held.value != value {
            let key = encode(format!("{WORKERS}{}", lease.worker));
            let body = json!({ "key": key, "value": encode(&value), "lease": held.id });
            self.client.call::<Done>(&what, "kv/put", body).await?;
            held.value = value;
        }
        self.held().insert(lease.worker.clone(), held);
        Ok(())
    }

    async fn resign(&self, worker: &WorkerId) -> Result<(), StreamError> {
        let what = format!("ending the lease of {worker}");
        let held = self.held().remove(worker);
        let body = json!({ "key": encode(format!("{WORKERS}{worker}")) });
        self.client.call::<Done>(&what, "kv/deleterange", body).await?;
        if let Some(held) = held {
            self.client.call::<Done>(&what, "lease/revoke", json!({ "ID": held.id })).await?;
        }
        Ok(())
    }

    fn lease_time(&self) -> Duration {
        Duration::from_secs(self.lease_s)
    }

    async fn workers(&self) -> Result<watch::Receiver<Workers>, StreamError> {
        let (sender, receiver) = watch::channel(Workers::default());
        let mut roster = Roster::default();
        follow(self.client.clone(), WORKERS, move |change| {
            let now = Instant::now();
            match change {
                Change::Put(key, value) => match serde_json::from_slice::<WorkerLease>(&value) {
                    Ok(lease) => roster.present(lease),
                    Err(error) => tracing::warn!(key, %error, "an entry in etcd is not readable; ignored"),
                },
                Change::Gone(key) => roster.gone(&key),
                Change::Back => roster.back(now),
                Change::Tick => {}
            }
            let workers = roster.living(now);
            sender.send_if_modified(|current| {
                let differs = *current != workers;
                *current = workers;
                differs
            });
            !sender.is_closed()
        })
        .await?;
        Ok(receiver)
    }
}

impl Etcd {
    async fn grant(&self, what: &str) -> Result<String, StreamError> {
        let body = json!({ "TTL": self.lease_s.to_string() });
        Ok(self.client.call::<Granted>(what, "lease/grant", body).await?.id)
    }

    async fn is_kept_alive(&self, what: &str, id: &str) -> Result<bool, StreamError> {
        let kept: KeptAlive = self.client.call(what, "lease/keepalive", json!({ "ID": id })).await?;
        Ok(kept.result.seconds > 0)
    }
}
