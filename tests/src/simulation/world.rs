//! What all simulated processes share: the true backend, the weather, and a record of what happened.

use super::{Mutation, Options, network::Link, weather::Weather};
use forebay_schemas::ids::{RequestId, WorkerId};
use forebay_streams::{Streams, environment::Process, log::LogRef};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// A way that messages take, open or not. (Tokio's `watch` would wake those who wait in random order.)
#[derive(Default)]
pub(super) struct Way {
    closed: AtomicBool,
    opened: Notify,
}

impl Way {
    pub(super) fn is_open(&self) -> bool {
        !self.closed.load(Ordering::Relaxed)
    }

    pub(super) fn set_open(&self, open: bool) {
        self.closed.store(!open, Ordering::Relaxed);
        if open {
            self.opened.notify_waiters();
        }
    }

    pub(super) async fn opens(&self) {
        let opened = self.opened.notified();
        if !self.is_open() {
            opened.await;
        }
    }
}

/// See the [module](self).
pub(super) struct World {
    /// The backend as it is, without a network before it.
    pub(super) streams: Streams,
    pub(super) weather: Weather,
    pub(super) mutation: Mutation,
    /// Whether anybody reaches the backend.
    pub(super) backend: Way,
    calm: AtomicBool,
    began: Instant,
    record: Mutex<Record>,
}

/// What happened.
#[derive(Default)]
pub(super) struct Record {
    /// Faults by kind.
    pub(super) faults: BTreeMap<&'static str, u64>,
    /// When each event was stored, and by whom.
    pub(super) stored: BTreeMap<u64, (Instant, Arc<str>)>,
    /// Logs that were begun, or may have been, and by which gateway's process.
    pub(super) logs: BTreeMap<LogRef, Process>,
    /// Logs whose requests were queued.
    pub(super) queued: BTreeSet<LogRef>,
    /// Requests whose author may not know that they failed, or whose dead letter got lost.
    pub(super) unburied: BTreeSet<RequestId>,
    /// Processes that are gone.
    pub(super) gone: BTreeSet<Arc<str>>,
    /// When it was calm.
    pub(super) calm: Option<Instant>,
    /// Whose process a worker is.
    pub(super) workers: BTreeMap<WorkerId, Link>,
    /// All that happened, in words, if anybody wants to know.
    trace: Option<Vec<String>>,
}

impl World {
    pub(super) fn new(streams: Streams, weather: Weather, options: Options) -> World {
        World {
            streams,
            weather,
            mutation: options.mutation,
            backend: Way::default(),
            calm: AtomicBool::new(false),
            began: Instant::now(),
            record: Mutex::new(Record { trace: options.traced.then(Vec::new), ..Record::default() }),
        }
    }

    pub(super) fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().expect("no panics while held")
    }

    /// Whether the faults are over.
    pub(super) fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    pub(super) fn calm_down(&self) {
        self.calm.store(true, Ordering::Relaxed);
        self.record().calm = Some(Instant::now());
        self.trace(|| "calm".to_owned());
    }

    /// Counts a fault. Always true, so that it can follow the condition.
    pub(super) fn count(&self, fault: &'static str) -> bool {
        *self.record().faults.entry(fault).or_default() += 1;
        true
    }

    pub(super) fn trace(&self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.record().trace {
            trace.push(format!("{:>9.3} {}", self.began.elapsed().as_secs_f64(), what()));
        }
    }

    pub(super) fn take_trace(&self) -> Vec<String> {
        self.record().trace.take().unwrap_or_default()
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    pub(super) fn stored(&self, seq: u64, by: &Arc<str>) {
        self.record().stored.insert(seq, (Instant::now(), by.clone()));
    }

    /// How long ago an event was stored.
    pub(super) fn age(&self, seq: u64) -> Duration {
        self.record().stored.get(&seq).map_or(Duration::MAX, |(when, _)| when.elapsed())
    }

    pub(super) fn begun(&self, log: &LogRef, gateway: &Process) {
        self.record().logs.insert(log.clone(), gateway.clone());
    }

    pub(super) fn introduce(&self, worker: &WorkerId, link: &Link) {
        self.record().workers.entry(worker.clone()).or_insert_with(|| link.clone());
    }

    pub(super) fn link_of(&self, worker: &WorkerId) -> Option<Link> {
        self.record().workers.get(worker).cloned()
    }
}
