//! Leases of workers as keys of a NATS KV bucket.

use super::{
    JetStream, LOST,
    bucket::{Change, parse, replace},
    failed,
    ledger::Ledger,
    topology::WORKERS,
};
use crate::{
    StreamError,
    registry::{Registry, Workers},
};
use async_trait::async_trait;
use forebay_schemas::{card::WorkerLease, ids::WorkerId};
use std::time::Duration;
use tokio::{sync::watch, time::Instant};

#[async_trait]
impl Registry for JetStream {
    async fn renew(&self, lease: &WorkerLease) -> Result<(), StreamError> {
        let value = serde_json::to_vec(lease).expect("plain data always encodes");
        let what = format!("renewing the lease of {}", lease.worker);
        let lost = self.connection_lost();
        let put = async {
            let bucket = self.bucket(WORKERS).await?;
            bucket.put(lease.worker.as_str(), value.into()).await.map(drop).map_err(failed(what.clone()))
        };
        tokio::select! {
            biased;
            done = put => done,
            // The next renewal goes out with the next connection; this one's answer would be waited for in vain.
            () = lost => Err(StreamError::new(what.clone(), LOST)),
        }
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
        let mut ledger = Ledger::new(lease_time);
        // A key that expires in the bucket tells nobody: each lease is timed here too, by this clock.
        self.follow_bucket(WORKERS, Some(lease_time / 10), move |change| {
            let now = Instant::now();
            match change {
                Change::Put(key, value) => {
                    if let Some(lease) = parse::<WorkerLease>(WORKERS, &key, &value) {
                        ledger.renewed(lease, now);
                    }
                }
                Change::Gone(key) => ledger.resigned(&key),
                Change::Away => ledger.away(),
                Change::Back => ledger.back(now),
                Change::Tick => {}
            }
            let workers = ledger.living(now);
            sender.send_if_modified(|current| replace(current, workers));
            !sender.is_closed()
        })
        .await?;
        Ok(receiver)
    }
}
