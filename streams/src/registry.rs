//! Which workers live: each holds a lease, renews it, and says its load with it.

use crate::StreamError;
use async_trait::async_trait;
use forebay_schemas::{card::WorkerLease, ids::WorkerId};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::sync::watch;

/// All living workers.
pub type Workers = Arc<BTreeMap<WorkerId, Arc<WorkerLease>>>;

/// Leases of workers.
#[async_trait]
pub trait Registry: Send + Sync + 'static {
    /// Renews a worker's lease; it lapses after [`Registry::lease_time`].
    async fn renew(&self, lease: &WorkerLease) -> Result<(), StreamError>;

    /// Ends a worker's lease now.
    async fn resign(&self, worker: &WorkerId) -> Result<(), StreamError>;

    /// How long a lease lasts after its last renewal.
    fn lease_time(&self) -> Duration;

    /// All living workers, kept up to date for as long as the receiver lives. While the backend is away, those that
    /// lived last stand: who can't be heard is not dead.
    async fn workers(&self) -> Result<watch::Receiver<Workers>, StreamError>;
}
