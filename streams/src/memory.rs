//! All of it in one process's memory: for simulation, and for tests that need no server.

mod cache_events;
mod own_queues;
mod registry;

use crate::{
    StreamError, Streams,
    catalog::Models,
    dead_letters::{DeadLetters, Receipt, Spent},
    log::{AppendError, EventLog, Live, LogRef, Recorded},
    own_queues::Owner,
    settings::Values,
    tasks::{CancelSignal, Delivery, Depth, EnqueueError, Presence, Tasks, Verdict},
};
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{
    dead_letter::DeadLetter,
    event::Event,
    ids::{GatewayId, ModelKey, RequestId, WorkerId},
    task::Role,
};
use futures::{StreamExt, stream::BoxStream};
use registry::{Leases, Published};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::{
    sync::{Notify, broadcast},
    time::Instant,
};

/// Live events and signals that wait for each reader; a reader that is slower loses some, as over NATS.
const LIVE_MAX: usize = 1024;

/// What acknowledgement subjects begin with; the number of the delivery follows.
const ACK: &str = "memory.ack.";

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
            max_deliver: 100,
            lease_time: Duration::from_millis(1500),
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
    Streams {
        log: memory.clone(),
        tasks: memory.clone(),
        own_queues: memory.clone(),
        cache_events: memory.clone(),
        dead_letters: memory.clone(),
        catalog: memory.clone(),
        registry: memory.clone(),
        settings: memory,
    }
}

struct Memory {
    limits: Limits,
    state: Mutex<State>,
    live: broadcast::Sender<Live>,
    signals: broadcast::Sender<(WorkerId, CancelSignal)>,
    cache_signs: broadcast::Sender<()>,
    /// Workers that hear signals, and how many of their streams do.
    listening: Arc<Mutex<BTreeMap<WorkerId, usize>>>,
    /// Something was queued or became due again.
    work: Notify,
    models: Published<Models>,
    leases: Arc<Leases>,
    settings: Published<Values>,
}

#[derive(Default)]
struct State {
    seq: u64,
    logs: BTreeMap<LogRef, Vec<Recorded>>,
    queues: BTreeMap<Line, Queue>,
    /// Workers' own queues that may be pulled from.
    open: BTreeSet<Owner>,
    /// Every id that a task was published under.
    published: BTreeSet<String>,
    deliveries: u64,
    blobs: BTreeMap<String, Bytes>,
    letters: Vec<DeadLetter>,
    cache: cache_events::CacheLog,
    /// Tasks that were delivered as often as they may be, and when somebody may find them (again).
    spent: BTreeMap<u64, (Spent, Instant)>,
}

/// Names a queue.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Line {
    role: Role,
    model: ModelKey,
    /// Whose own queue it is; none: all workers'.
    of: Option<WorkerId>,
}

impl Line {
    fn shared(role: Role, model: &ModelKey) -> Line {
        Line { role, model: model.clone(), of: None }
    }
}

#[derive(Default)]
struct Queue {
    pending: VecDeque<Queued>,
    /// By the number of the delivery.
    delivered: BTreeMap<u64, (Queued, Instant)>,
    /// Given back for later.
    waiting: Vec<(Queued, Instant)>,
}

struct Queued {
    payload: Bytes,
    deliveries: u64,
}

impl Queue {
    fn len(&self) -> usize {
        self.pending.len() + self.delivered.len() + self.waiting.len()
    }
}

impl Memory {
    fn new(limits: Limits) -> Memory {
        Memory {
            limits,
            state: Mutex::default(),
            live: broadcast::channel(LIVE_MAX).0,
            signals: broadcast::channel(LIVE_MAX).0,
            cache_signs: broadcast::channel(LIVE_MAX).0,
            listening: Arc::default(),
            work: Notify::new(),
            models: Published::default(),
            leases: Arc::default(),
            settings: Published::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panics while held")
    }

    fn subscribe(&self, wanted: impl Fn(&Live) -> bool + Send + 'static) -> BoxStream<'static, Live> {
        received(self.live.subscribe()).filter(move |live| futures::future::ready(wanted(live))).boxed()
    }

    /// Takes a task that waits, or puts back those whose time is up and tells when the next one's is.
    fn take(&self, line: &Line) -> Result<Delivery, Option<Instant>> {
        let mut state = self.state();
        state.deliveries += 1;
        let number = state.deliveries;
        let State { queues, spent, deliveries: numbers, .. } = &mut *state;
        let queue = queues.entry(line.clone()).or_default();
        let now = Instant::now();
        let late: Vec<u64> =
            queue.delivered.iter().filter(|(_, (_, until))| *until <= now).map(|(key, _)| *key).collect();
        for key in late {
            let (task, _) = queue.delivered.remove(&key).expect("just listed");
            queue.pending.push_front(task);
        }
        for (task, _) in queue.waiting.extract_if(.., |(_, until)| *until <= now) {
            queue.pending.push_front(task);
        }
        while let Some(mut task) = queue.pending.pop_front() {
            if task.deliveries >= self.limits.max_deliver {
                *numbers += 1;
                let receipt = Receipt { ack_subject: String::new(), seq: *numbers };
                let (payload, deliveries) = (task.payload, task.deliveries);
                spent.insert(*numbers, (Spent { role: line.role, payload, deliveries, receipt }, now));
                self.work.notify_waiters();
                continue;
            }
            task.deliveries += 1;
            let delivery = Delivery {
                payload: task.payload.clone(),
                ack_subject: format!("{ACK}{number}"),
                delivery: task.deliveries,
            };
            queue.delivered.insert(number, (task, now + self.limits.ack_wait));
            return Ok(delivery);
        }
        let delivered = queue.delivered.values().map(|(_, until)| *until);
        Err(delivered.chain(queue.waiting.iter().map(|(_, until)| *until)).min())
    }
}

impl Memory {
    fn queue(&self, line: Line, dedup_id: &str, payload: Bytes) -> Result<(), EnqueueError> {
        let mut state = self.state();
        if state.published.contains(dedup_id) {
            return Ok(());
        }
        let queue = state.queues.entry(line.clone()).or_default();
        if queue.len() >= self.limits.queue_max {
            return Err(EnqueueError::Full { role: line.role, model: line.model });
        }
        queue.pending.push_back(Queued { payload, deliveries: 0 });
        state.published.insert(dedup_id.to_owned());
        drop(state);
        self.work.notify_waiters();
        Ok(())
    }

    async fn wait_for(&self, line: &Line, wait: Duration) -> Option<Delivery> {
        let deadline = Instant::now() + wait;
        loop {
            let queued = self.work.notified();
            let next_due = match self.take(line) {
                Ok(delivery) => return Some(delivery),
                Err(next_due) => next_due,
            };
            let until = next_due.unwrap_or(deadline).min(deadline);
            let woken = tokio::time::timeout_at(until, queued).await.is_ok();
            if !woken && until == deadline {
                return None;
            }
        }
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

/// A worker hears signals for as long as this lives.
struct Listens {
    all: Arc<Mutex<BTreeMap<WorkerId, usize>>>,
    worker: WorkerId,
}

impl Listens {
    fn new(all: &Arc<Mutex<BTreeMap<WorkerId, usize>>>, worker: &WorkerId) -> Listens {
        *all.lock().expect("no panics while held").entry(worker.clone()).or_default() += 1;
        Listens { all: all.clone(), worker: worker.clone() }
    }
}

impl Drop for Listens {
    fn drop(&mut self) {
        let mut all = self.all.lock().expect("no panics while held");
        if let Some(count) = all.get_mut(&self.worker) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.worker);
            }
        }
    }
}

#[async_trait]
impl DeadLetters for Memory {
    async fn bury(&self, letter: &DeadLetter) -> Result<(), StreamError> {
        let letters = &mut self.state().letters;
        letters.retain(|old| (old.request, old.role) != (letter.request, letter.role));
        letters.push(letter.clone());
        Ok(())
    }

    async fn list(&self) -> Result<Vec<DeadLetter>, StreamError> {
        Ok(self.state().letters.clone())
    }

    async fn drop_letter(&self, request: RequestId) -> Result<u64, StreamError> {
        Ok(self.state().letters.extract_if(.., |letter| letter.request == request).count() as u64)
    }

    async fn spent(&self, wait: Duration) -> Result<Option<Spent>, StreamError> {
        let find = || {
            let (mut state, now) = (self.state(), Instant::now());
            if let Some((spent, from)) = state.spent.values_mut().find(|(_, from)| *from <= now) {
                *from = now + self.limits.ack_wait;
                return Ok(spent.clone());
            }
            Err(state.spent.values().map(|(_, from)| *from).min())
        };
        let deadline = Instant::now() + wait;
        loop {
            let news = self.work.notified();
            let next_due = match find() {
                Ok(spent) => return Ok(Some(spent)),
                Err(next_due) => next_due,
            };
            let until = next_due.unwrap_or(deadline).min(deadline);
            let woken = tokio::time::timeout_at(until, news).await.is_ok();
            if !woken && until == deadline {
                return Ok(None);
            }
        }
    }

    async fn settle(&self, spent: &Spent) -> Result<(), StreamError> {
        self.state().spent.remove(&spent.receipt.seq);
        Ok(())
    }
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

    async fn begin(&self, log: &LogRef, event: &Event) -> Result<u64, AppendError> {
        if self.state().logs.keys().any(|known| known.request == log.request) {
            return Err(AppendError::Conflict { log: log.clone(), after: 0 });
        }
        self.append(log, 0, event).await
    }

    async fn remove(&self, log: &LogRef) -> Result<(), StreamError> {
        self.state().logs.remove(log);
        Ok(())
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

    async fn tail_all(&self) -> Result<BoxStream<'static, Live>, StreamError> {
        Ok(self.subscribe(|_| true))
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
        self.queue(Line::shared(role, model), dedup_id, payload)
    }

    async fn pull(
        &self,
        role: Role,
        model: &ModelKey,
        wait: Duration,
    ) -> Result<Option<Delivery>, StreamError> {
        Ok(self.wait_for(&Line::shared(role, model), wait).await)
    }

    async fn answer(&self, ack_subject: &str, verdict: Verdict) -> Result<(), StreamError> {
        let mut state = self.state();
        let Some(number) = ack_subject.strip_prefix(ACK).and_then(|number| number.parse().ok()) else {
            return Ok(());
        };
        let mut moved = None;
        for (line, queue) in &mut state.queues {
            if verdict == Verdict::Progress {
                if let Some((_, until)) = queue.delivered.get_mut(&number) {
                    *until = Instant::now() + self.limits.ack_wait;
                }
                continue;
            }
            let Some((task, _)) = queue.delivered.remove(&number) else { continue };
            match verdict {
                Verdict::Nak | Verdict::Later(_) if line.of.is_some() => {
                    moved = Some((line.role, line.model.clone(), task));
                }
                Verdict::Nak => queue.pending.push_front(task),
                Verdict::Later(delay) => queue.waiting.push((task, Instant::now() + delay)),
                Verdict::Ack | Verdict::Progress => {}
            }
        }
        if let Some((role, model, task)) = moved {
            state.move_to_shared(role, &model, task);
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
        Ok(state.queues.get(&Line::shared(role, model)).map_or(Depth::default(), |queue| Depth {
            pending: queue.pending.len() as u64,
            ack_pending: (queue.delivered.len() + queue.waiting.len()) as u64,
        }))
    }

    async fn room(&self, role: Role) -> Result<u64, StreamError> {
        let state = self.state();
        let of_role = state.queues.iter().filter(|(line, _)| line.role == role);
        let fullest = of_role.map(|(_, queue)| queue.len()).max().unwrap_or(0);
        Ok(self.limits.queue_max.saturating_sub(fullest) as u64)
    }

    async fn signal_cancel(&self, worker: &WorkerId, signal: &CancelSignal) -> Result<(), StreamError> {
        let _ = self.signals.send((worker.clone(), signal.clone()));
        Ok(())
    }

    async fn cancel_signals(
        &self,
        worker: &WorkerId,
    ) -> Result<BoxStream<'static, CancelSignal>, StreamError> {
        let listens = Listens::new(&self.listening, worker);
        let worker = worker.clone();
        let mine = move |(to, signal): (WorkerId, CancelSignal)| {
            futures::future::ready((to == worker).then_some(signal))
        };
        let signals = received(self.signals.subscribe()).filter_map(mine);
        Ok(signals.map(move |signal| (signal, &listens).0).boxed())
    }

    async fn presence(&self, worker: &WorkerId, _wait: Duration) -> Result<Presence, StreamError> {
        let listening = self.listening.lock().expect("no panics while held");
        Ok(if listening.contains_key(worker) { Presence::Answers } else { Presence::Gone })
    }
}
