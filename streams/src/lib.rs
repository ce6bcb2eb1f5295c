//! The log of every request and the queues of tasks, behind traits with two implementations that pass one
//! conformance suite: [`jetstream`] (what is deployed) and [`memory`] (simulation and tests).
//!
//! A request's way through here: a gateway creates its log ([`writer::LogWriter`]), follows it
//! ([`follow::Follow`]) and queues a task ([`tasks::Tasks`]); workers pull the task, claim by appending with
//! the fence, and append what happens; [`catalog::Catalog`] says which models there
//! are, [`registry::Registry`] which workers, and [`settings::SettingsStore`] how they should behave now.

pub mod cache_events;
pub mod cancel;
pub mod catalog;
pub mod dead_letters;
pub mod environment;
pub mod etcd;
pub mod follow;
pub mod jetstream;
pub mod log;
pub mod memory;
pub mod own_queues;
pub mod registry;
pub mod server;
pub mod settings;
pub mod tasks;
pub mod writer;

use std::sync::Arc;

/// The faces of a backend.
#[derive(Clone)]
pub struct Streams {
    /// Logs of requests.
    pub log: Arc<dyn log::EventLog>,
    /// Queues of tasks.
    pub tasks: Arc<dyn tasks::Tasks>,
    /// Queues of single decode workers.
    pub own_queues: Arc<dyn own_queues::OwnQueues>,
    /// What workers say of their prefix caches.
    pub cache_events: Arc<dyn cache_events::CacheEvents>,
    /// Tasks that nobody could do.
    pub dead_letters: Arc<dyn dead_letters::DeadLetters>,
    /// Models.
    pub catalog: Arc<dyn catalog::Catalog>,
    /// Workers.
    pub registry: Arc<dyn registry::Registry>,
    /// Live configuration.
    pub settings: Arc<dyn settings::SettingsStore>,
}

/// Why an operation on the backend failed. Retrying may help: the backend is unreachable, or answered with
/// something unexpected; what it did before is unchanged.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {cause}")]
pub struct StreamError {
    /// What was tried.
    pub what: String,
    /// What came of it.
    pub cause: String,
}

impl StreamError {
    /// From an operation's name and what it answered.
    pub fn new(what: impl Into<String>, cause: impl std::fmt::Display) -> StreamError {
        StreamError { what: what.into(), cause: cause.to_string() }
    }
}
