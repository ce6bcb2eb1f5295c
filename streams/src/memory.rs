//! All of it in one process's memory: for simulation, and for tests that need no server.

use crate::{
    StreamError, Streams,
    log::{AppendError, EventLog, Live, LogRef, Recorded},
    registry::{Models, Registry, Workers, blob_name},
    tasks::{CancelSignal, Delivery, Depth, EnqueueError, Tasks, Verdict},
};
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{
    card::{BlobRef, ModelCard, WorkerLease},
    event::Event,
    ids::{GatewayId, ModelKey, RequestId, WorkerId},
    task::Role,
};
use futures::{StreamExt, stream::BoxStream};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::{
    sync::{Notify, broadcast, watch},
    time::Instant,
};

/// Live events and signals that wait for each reader; a reader that is slower loses some, as over NATS.
const LIVE_MAX: usize = 65_536;

/// Bounds and times of the in-memory backend.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Tasks that one queue holds.
    pub queue_max: usize,
    /// Time without a verdict after which a task is delivered again.
    pub ack_wait: Duration,
    /// Deliveries of one task.
    pub max_deliver: u64,
    /// Time that a worker's lease lasts.
    pub lease_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            queue_max: 4096,
            ack_wait: Duration::from_secs(30),
            max_deliver: 5,
            lease_time: Duration::from_secs(10),
        }
    }
}

/// A fresh backend with default limits.
pub fn streams() -> Streams {
    streams_with(Limits::default())
}

/// A fresh backend.
pub fn streams_with(limits: Limits) -> Streams {
    let memory = Arc::new(Memory::new(limits));
    Streams { log: memory.clone(), tasks: memory.clone(), registry: memory }
}

struct Memory {
    limits: Limits,
    state: Mutex<State>,
    live: broadcast::Sender<Live>,
    signals: broadcast::Sender<(WorkerId, CancelSignal)>,
    /// Something was queued or became due again.
    work: Notify,
    models: watch::Sender<Models>,
    leases: Arc<Leases>,
}

struct Leases {
    until: Mutex<HashMap<WorkerId, (WorkerLease, Instant)>>,
    living: watch::Sender<Workers>,
}

impl Leases {
    fn change(&self, change: impl FnOnce(&mut HashMap<WorkerId, (WorkerLease, Instant)>)) {
        let mut leases = self.until.lock().expect("no panics while held");
        change(&mut leases);
        let now = Instant::now();
        leases.retain(|_, (_, until)| *until > now);
        let living =
            leases.iter().map(|(worker, (lease, _))| (worker.clone(), Arc::new(lease.clone()))).collect();
        self.living.send_replace(Arc::new(living));
    }
}

#[derive(Default)]
struct State {
    seq: u64,
    logs: HashMap<LogRef, Vec<Recorded>>,
    queues: HashMap<(Role, ModelKey), Queue>,
    /// Every id that a task was published under.
    published: HashSet<String>,
    deliveries: u64,
    blobs: HashMap<String, Bytes>,
}

#[derive(Default)]
struct Queue {
    pending: VecDeque<Queued>,
    delivered: HashMap<String, (Queued, Instant)>,
}

struct Queued {
    payload: Bytes,
    deliveries: u64,
}

impl Memory {
    fn new(limits: Limits) -> Memory {
        Memory {
            limits,
            state: Mutex::default(),
            live: broadcast::channel(LIVE_MAX).0,
            signals: broadcast::channel(LIVE_MAX).0,
            work: Notify::new(),
            models: watch::channel(Models::default()).0,
            leases: Arc::new(Leases {
                until: Mutex::default(),
                living: watch::channel(Workers::default()).0,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panics while held")
    }

    fn subscribe(&self, wanted: impl Fn(&Live) -> bool + Send + 'static) -> BoxStream<'static, Live> {
        received(self.live.subscribe()).filter(move |live| futures::future::ready(wanted(live))).boxed()
    }

    /// Takes a task that waits, or puts back those whose time is up and tells when the next one's is.
    fn take(&self, role: Role, model: &ModelKey) -> Result<Delivery, Option<Instant>> {
        let mut state = self.state();
        state.deliveries += 1;
        let ack_subject = format!("memory.ack.{}", state.deliveries);
        let queue = state.queues.entry((role, model.clone())).or_default();
        let now = Instant::now();
        let due: Vec<String> = queue
            .delivered
            .iter()
            .filter(|(_, (_, until))| *until <= now)
            .map(|(key, _)| key.clone())
            .collect();
        for key in due {
            let (task, _) = queue.delivered.remove(&key).expect("just listed");
            queue.pending.push_front(task);
        }
        while let Some(mut task) = queue.pending.pop_front() {
            if task.deliveries >= self.limits.max_deliver {
                continue;
            }
            task.deliveries += 1;
            let delivery = Delivery {
                payload: task.payload.clone(),
                ack_subject: ack_subject.clone(),
                delivery: task.deliveries,
            };
            queue.delivered.insert(ack_subject, (task, now + self.limits.ack_wait));
            return Ok(delivery);
        }
        Err(queue.delivered.values().map(|(_, until)| *until).min())
    }
}

/// What a receiver gets; what it was too slow for is missing, as it is over NATS.
fn received<T: Clone + Send + 'static>(receiver: broadcast::Receiver<T>) -> BoxStream<'static, T> {
    futures::stream::unfold(receiver, |mut receiver| async {
        loop {
            match receiver.recv().await {
                Ok(item) => return Some((item, receiver)),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    })
    .boxed()
}

#[async_trait]
impl EventLog for Memory {
    async fn append(&self, log: &LogRef, after: u64, event: &Event) -> Result<u64, AppendError> {
        let mut state = self.state();
        let seq = state.seq + 1;
        let events = state.logs.entry(log.clone()).or_default();
        let previous = events.last().map_or(0, |last| last.seq);
        if previous != after {
            return Err(AppendError::Conflict { log: log.clone(), after });
        }
        let recorded = Recorded { seq, event: event.clone() };
        events.push(recorded.clone());
        state.seq = seq;
        let _ = self.live.send(Live { log: log.clone(), previous, recorded });
        Ok(seq)
    }

    async fn read(&self, log: &LogRef, after: u64) -> Result<Vec<Recorded>, StreamError> {
        let state = self.state();
        let events = state.logs.get(log).map_or(&[][..], Vec::as_slice);
        Ok(events.iter().filter(|recorded| recorded.seq > after).cloned().collect())
    }

    async fn last_seq(&self, log: &LogRef) -> Result<u64, StreamError> {
        Ok(self.state().logs.get(log).and_then(|events| events.last()).map_or(0, |last| last.seq))
    }

    async fn find(&self, request: RequestId) -> Result<Option<LogRef>, StreamError> {
        Ok(self.state().logs.keys().find(|log| log.request == request).cloned())
    }

    async fn tail(&self, gateway: &GatewayId) -> Result<BoxStream<'static, Live>, StreamError> {
        let gateway = gateway.clone();
        Ok(self.subscribe(move |live| live.log.gateway == gateway))
    }

    async fn watch(&self, log: &LogRef) -> Result<BoxStream<'static, Live>, StreamError> {
        let log = log.clone();
        Ok(self.subscribe(move |live| live.log == log))
    }
}

#[async_trait]
impl Tasks for Memory {
    async fn ensure(&self, _model: &ModelKey) -> Result<(), StreamError> {
        Ok(())
    }

    async fn publish(
        &self,
        role: Role,
        model: &ModelKey,
        dedup_id: &str,
        payload: Bytes,
    ) -> Result<(), EnqueueError> {
        let mut state = self.state();
        if state.published.contains(dedup_id) {
            return Ok(());
        }
        let queue = state.queues.entry((role, model.clone())).or_default();
        if queue.pending.len() + queue.delivered.len() >= self.limits.queue_max {
            return Err(EnqueueError::Full { role, model: model.clone() });
        }
        queue.pending.push_back(Queued { payload, deliveries: 0 });
        state.published.insert(dedup_id.to_owned());
        drop(state);
        self.work.notify_waiters();
        Ok(())
    }

    async fn pull(
        &self,
        role: Role,
        model: &ModelKey,
        wait: Duration,
    ) -> Result<Option<Delivery>, StreamError> {
        let deadline = Instant::now() + wait;
        loop {
            let queued = self.work.notified();
            let next_due = match self.take(role, model) {
                Ok(delivery) => return Ok(Some(delivery)),
                Err(next_due) => next_due,
            };
            let until = next_due.unwrap_or(deadline).min(deadline);
            let woken = tokio::time::timeout_at(until, queued).await.is_ok();
            if !woken && until == deadline {
                return Ok(None);
            }
        }
    }

    async fn answer(&self, ack_subject: &str, verdict: Verdict) -> Result<(), StreamError> {
        let mut state = self.state();
        for queue in state.queues.values_mut() {
            match verdict {
                Verdict::Ack => drop(queue.delivered.remove(ack_subject)),
                Verdict::Nak => {
                    if let Some((task, _)) = queue.delivered.remove(ack_subject) {
                        queue.pending.push_front(task);
                    }
                }
                Verdict::Progress => {
                    if let Some((_, until)) = queue.delivered.get_mut(ack_subject) {
                        *until = Instant::now() + self.limits.ack_wait;
                    }
                }
            }
        }
        drop(state);
        self.work.notify_waiters();
        Ok(())
    }

    fn ack_wait(&self) -> Duration {
        self.limits.ack_wait
    }

    fn max_deliver(&self) -> u64 {
        self.limits.max_deliver
    }

    async fn depth(&self, role: Role, model: &ModelKey) -> Result<Depth, StreamError> {
        let state = self.state();
        Ok(state.queues.get(&(role, model.clone())).map_or(Depth::default(), |queue| Depth {
            pending: queue.pending.len() as u64,
            ack_pending: queue.delivered.len() as u64,
        }))
    }

    async fn signal_cancel(&self, worker: &WorkerId, signal: &CancelSignal) -> Result<(), StreamError> {
        let _ = self.signals.send((worker.clone(), signal.clone()));
        Ok(())
    }

    async fn cancel_signals(
        &self,
        worker: &WorkerId,
    ) -> Result<BoxStream<'static, CancelSignal>, StreamError> {
        let worker = worker.clone();
        let mine = move |(to, signal): (WorkerId, CancelSignal)| {
            futures::future::ready((to == worker).then_some(signal))
        };
        Ok(received(self.signals.subscribe()).filter_map(mine).boxed())
    }
}

#[async_trait]
impl Registry for Memory {
    async fn publish_model(&self, card: &ModelCard) -> Result<(), StreamError> {
        self.models.send_modify(|models| {
            Arc::make_mut(models).insert(card.name.clone(), Arc::new(card.clone()));
        });
        Ok(())
    }

    async fn models(&self) -> Result<watch::Receiver<Models>, StreamError> {
        Ok(self.models.subscribe())
    }

    async fn renew(&self, lease: &WorkerLease) -> Result<(), StreamError> {
        let until = Instant::now() + self.limits.lease_time;
        self.leases.change(|leases| drop(leases.insert(lease.worker.clone(), (lease.clone(), until))));
        let leases = self.leases.clone();
        tokio::spawn(async move {
            tokio::time::sleep_until(until).await;
            leases.change(|_| {});
        });
        Ok(())
    }

    async fn resign(&self, worker: &WorkerId) -> Result<(), StreamError> {
        self.leases.change(|leases| drop(leases.remove(worker)));
        Ok(())
    }

    fn lease_time(&self) -> Duration {
        self.limits.lease_time
    }

    async fn workers(&self) -> Result<watch::Receiver<Workers>, StreamError> {
        Ok(self.leases.living.subscribe())
    }

    async fn put_blob(&self, bytes: Bytes) -> Result<BlobRef, StreamError> {
        let blob = BlobRef { name: blob_name(&bytes), bytes: bytes.len() as u64 };
        self.state().blobs.insert(blob.name.clone(), bytes);
        Ok(blob)
    }

    async fn get_blob(&self, blob: &BlobRef) -> Result<Bytes, StreamError> {
        let stored = self.state().blobs.get(&blob.name).cloned();
        stored.ok_or_else(|| StreamError::new(format!("reading blob {}", blob.name), "no such blob"))
    }
}
