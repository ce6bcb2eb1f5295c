//! What end-to-end tests are made of: a [`Deployment`] of real processes around a nats-server of its own, a
//! [`client`] that reads what any client would, and the [`invariants`] that every log must keep, whatever died.
//! In [`simulation`] the same code runs on one thread and a virtual clock, thousands of times.

pub mod chaos;
pub mod client;
pub mod deployment;
pub mod etcd;
pub mod files;
pub mod invariants;
pub mod namespaces;
pub mod process;
pub mod python;
pub mod simulation;

pub use client::{Answer, Chat, Client};
pub use deployment::{Deployment, Gateway, Worker};

use std::{future::Future, time::Duration};

/// How long anything may take that must happen. Long, since test machines are busy; nothing waits it out but
/// what fails.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Says that a test is left out and why, on the descriptor itself: the harness keeps what a test prints to itself if it passes.
pub fn skipped(why: &str) {
    let _ = rustix::io::write(rustix::stdio::stderr(), format!("SKIPPED: {why}\n").as_bytes());
}

/// Waits for something that must happen.
///
/// # Panics
/// If it does not within [`PATIENCE`].
pub async fn soon<T>(what: &str, event: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, event).await {
        Ok(value) => value,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}
