//! What lies between a simulated process and the backend: latency, loss, partitions, replicas that lag.

mod registry;

use super::{
    Mutation,
    chance::{below, chance},
    world::{Way, World},
};
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{
    cache_event::CacheEvent,
    dead_letter::DeadLetter,
    event::Event,
    ids::{GatewayId, ModelKey, RequestId, WorkerId},
    task::{DecodeTask, Role, Task},
};
use forebay_streams::{
    StreamError, Streams,
    cache_events::{CacheEvents, TellError, Told},
    dead_letters::{DeadLetters, Spent},
    environment::{Condition, Process},
    log::{AppendError, EventLog, Live, LogRef, Recorded, Refusal, persist},
    own_queues::{OwnQueues, Owner},
    tasks::{CancelSignal, Delivery, Depth, EnqueueError, Presence, Tasks, Verdict},
};
use futures::{StreamExt, stream::BoxStream};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, oneshot},
    time::sleep,
};

/// How long a process waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// One process's way to the backend. It has all faces of a backend.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) world: Arc<World>,
    pub(super) process: Process,
    pub(super) name: Arc<str>,
    /// Whether the backend and the process hear each other.
    pub(super) way: Arc<Way>,
}

/// What becomes of one request to the backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Fate {
    there: Duration,
    back: Duration,
    request_lost: bool,
    answer_lost: bool,
}

impl Link {
    pub(super) fn new(world: &Arc<World>, process: Process, name: &str) -> Link {
        Link { world: world.clone(), process, name: name.into(), way: Arc::default() }
    }

    pub(super) fn streams(&self) -> Streams {
        let link = Arc::new(self.clone());
        Streams {
            log: link.clone(),
            tasks: link.clone(),
            own_queues: link.clone(),
            cache_events: link.clone(),
            dead_letters: link.clone(),
            catalog: link.clone(),
            registry: link.clone(),
            settings: link,
        }
    }

    fn passable(&self) -> bool {
        self.way.is_open() && self.world.backend.is_open()
    }

    /// Waits until messages pass. False if the one that waits has got lost meanwhile.
    async fn passes(&self) -> bool {
        if self.passable() {
            return true;
        }
        while !self.passable() {
            self.way.opens().await;
            self.world.backend.opens().await;
        }
        chance(500)
    }

    fn draw(&self) -> Fate {
        let world = &self.world;
        if world.is_calm() {
            return Fate::default();
        }
        let weather = &world.weather;
        let delay = || match chance(weather.slow) {
            true => Duration::from_millis(below(weather.slow_ms)),
            false => Duration::from_millis(below(4) / 3),
        };
        Fate {
            there: delay(),
            back: delay(),
            request_lost: chance(weather.request_lost) && world.count("request lost"),
            answer_lost: chance(weather.answer_lost) && world.count("answer lost"),
        }
    }

    /// Carries a request to the backend and its answer back, or loses either.
    async fn carry<T: Send + 'static>(
        &self,
        what: &str,
        act: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, StreamError> {
        let fate = self.draw();
        if fate == Fate::default() && self.passable() {
            return Ok(act.await);
        }
        self.send(what, PATIENCE, fate, act).await
    }

    async fn send<T: Send + 'static>(
        &self,
        what: &str,
        patience: Duration,
        fate: Fate,
        act: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, StreamError> {
        let (mut answer, answered) = oneshot::channel();
        let link = self.clone();
        tokio::spawn(async move {
            sleep(fate.there).await;
            if fate.request_lost || !link.passes().await {
                return answer.closed().await;
            }
            let done = act.await;
            sleep(fate.back).await;
            if fate.answer_lost || !link.passes().await {
                return answer.closed().await;
            }
            drop(answer.send(done));
        });
        match tokio::time::timeout(patience, answered).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(_)) | Err(_) => {
                self.world.trace(|| format!("{}: no answer to: {what}", self.name));
                Err(StreamError::new(what, "no answer"))
            }
        }
    }

    /// Live events as they come through.
    fn live(&self, mut events: BoxStream<'static, Live>) -> BoxStream<'static, Live> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let link = self.clone();
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    event = events.next() => event,
                };
                let Some(event) = event else { return };
                link.deliver(&sender, event);
            }
        });
        futures::stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.map(|event| (event, receiver))
        })
        .boxed()
    }

    fn deliver(&self, to: &mpsc::UnboundedSender<Live>, event: Live) {
        let (world, weather) = (&self.world, &self.world.weather);
        let calm = world.is_calm();
        if !self.passable() || !calm && chance(weather.live_lost) {
            world.count("live event lost");
            return;
        }
        if !calm && chance(weather.live_twice) && world.count("live event twice") {
            let _ = to.send(event.clone());
        }
        if calm || !(chance(weather.live_late) && world.count("live event late")) {
            let _ = to.send(event);
            return;
        }
        let (to, late) = (to.clone(), Duration::from_millis(below(weather.slow_ms)));
        tokio::spawn(async move {
            sleep(late).await;
            let _ = to.send(event);
        });
    }

    /// What a replica answers that may lag behind: events up to some time ago.
    fn stale(&self, mut events: Vec<Recorded>) -> Vec<Recorded> {
        let (world, weather) = (&self.world, &self.world.weather);
        if !world.is_calm() && chance(weather.stale_read) {
            let lag = Duration::from_millis(below(weather.stale_ms + 1));
            let known = events.len();
            events.retain(|recorded| world.age(recorded.seq) >= lag);
            if events.len() < known {
                world.count("stale read");
            }
        }
        events
    }

    async fn try_append(
        &self,
        log: &LogRef,
        event: &Event,
        act: impl Future<Output = Result<u64, AppendError>> + Send + 'static,
    ) -> Result<u64, Refusal> {
        let name = event.body.name();
        let link = self.clone();
        let of = log.clone();
        let attempt = event.attempt;
        let stored = async move {
            let done = act.await;
            let world = &link.world;
            match &done {
                Ok(seq) => {
                    world.stored(*seq, &link.name);
                    world.trace(|| format!("{}: {of} {seq}: {name} of {attempt}", link.name));
                }
                Err(error) => world.trace(|| format!("{}: {name} of {attempt} refused: {error}", link.name)),
            }
            done
        };
        match self.carry(name, stored).await {
            Ok(Ok(seq)) => Ok(seq),
            Ok(Err(error)) => Err(Refusal::Final(error)),
            Err(error) => Err(Refusal::Unknown(error.to_string())),
        }
    }

    /// Nobody keeps a dead letter of what it does not know of, and if it gets lost, there is none.
    fn unburied(&self, if_so: bool, request: RequestId) {
        if if_so {
            self.world.record().unburied.insert(request);
        }
    }

    /// A task is in a queue.
    fn queued(&self, role: Role, payload: &[u8]) {
        if let (Role::Decode, Ok(task)) = (role, DecodeTask::decode(payload)) {
            let log = LogRef { gateway: task.gateway, request: task.request };
            self.world.record().queued.insert(log);
        }
    }

    /// What a pull brings.
    async fn pulled(
        &self,
        queue: &'static str,
        wait: Duration,
        pull: impl Future<Output = Result<Option<Delivery>, StreamError>> + Send + 'static,
    ) -> Result<Option<Delivery>, StreamError> {
        let fate = self.draw();
        let (wanted, given_up) = oneshot::channel::<()>();
        let link = self.clone();
        let pull = async move {
            let pulled = tokio::select! {
                biased;
                // Whoever stops listening takes away its interest, and gets nothing more.
                _ = given_up => return Ok(None),
                pulled = pull => pulled,
            };
            if let Ok(Some(delivery)) = &pulled {
                link.world
                    .trace(|| format!("{}: gets {queue} task, delivery {}", link.name, delivery.delivery));
            }
            pulled
        };
        let pulled = self.send("pull", wait + PATIENCE, fate, pull).await;
        drop(wanted);
        pulled?
    }

    /// The world must know whose process a worker is.
    fn introduce(&self, worker: &WorkerId) {
        self.world.introduce(worker, self);
    }
}

#[async_trait]
impl EventLog for Link {
    async fn append(&self, log: &LogRef, after: u64, event: &Event) -> Result<u64, AppendError> {
        persist(log, || {
            let (world, to, what) = (self.world.clone(), log.clone(), event.clone());
            self.try_append(log, event, async move {
                let after = match world.mutation {
                    Mutation::Fence => world.streams.log.last_seq(&to).await?,
                    _ => after,
                };
                world.streams.log.append(&to, after, &what).await
            })
        })
        .await
        .inspect_err(|_| self.unburied(event.body.is_terminal(), log.request))
    }

    async fn begin(&self, log: &LogRef, event: &Event) -> Result<u64, AppendError> {
        self.world.begun(log, &self.process);
        persist(log, || {
            let (backend, to, what) = (self.world.streams.log.clone(), log.clone(), event.clone());
            self.try_append(log, event, async move { backend.begin(&to, &what).await })
        })
        .await
    }

    async fn remove(&self, log: &LogRef) -> Result<(), StreamError> {
        let (backend, log) = (self.world.streams.log.clone(), log.clone());
        self.carry("remove", async move { backend.remove(&log).await }).await?
    }

    async fn read(&self, log: &LogRef, after: u64) -> Result<Vec<Recorded>, StreamError> {
        let (link, log) = (self.clone(), log.clone());
        let read = async move {
            let events = link.world.streams.log.read(&log, after).await?;
            Ok(link.stale(events))
        };
        self.carry("read", read).await?
    }

    async fn last_seq(&self, log: &LogRef) -> Result<u64, StreamError> {
        if self.world.mutation == Mutation::Probe {
            return Ok(0);
        }
        let (link, log) = (self.clone(), log.clone());
        let read = async move {
            let events = link.world.streams.log.read(&log, 0).await?;
            Ok(link.stale(events).last().map_or(0, |last| last.seq))
        };
        self.carry("last_seq", read).await?
    }

    async fn find(&self, request: RequestId) -> Result<Option<LogRef>, StreamError> {
        let link = self.clone();
        let find = async move {
            let Some(log) = link.world.streams.log.find(request).await? else { return Ok(None) };
            let events = link.world.streams.log.read(&log, 0).await?;
            Ok((!link.stale(events).is_empty()).then_some(log))
        };
        self.carry("find", find).await?
    }

    async fn tail(&self, gateway: &GatewayId) -> Result<BoxStream<'static, Live>, StreamError> {
        let (backend, gateway) = (self.world.streams.log.clone(), gateway.clone());
        let events = self.carry("tail", async move { backend.tail(&gateway).await }).await??;
        Ok(self.live(events))
    }

    async fn watch(&self, log: &LogRef) -> Result<BoxStream<'static, Live>, StreamError> {
        let (backend, log) = (self.world.streams.log.clone(), log.clone());
        let events = self.carry("watch", async move { backend.watch(&log).await }).await??;
        Ok(self.live(events))
    }

    async fn tail_all(&self) -> Result<BoxStream<'static, Live>, StreamError> {
        let backend = self.world.streams.log.clone();
        let events = self.carry("tail_all", async move { backend.tail_all().await }).await??;
        Ok(self.live(events))
    }
}

#[async_trait]
impl Tasks for Link {
    async fn ensure(&self, model: &ModelKey) -> Result<(), StreamError> {
        let (backend, model) = (self.world.streams.tasks.clone(), model.clone());
        self.carry("ensure", async move { backend.ensure(&model).await }).await?
    }

    async fn publish(
        &self,
        role: Role,
        model: &ModelKey,
        dedup_id: &str,
        payload: Bytes,
    ) -> Result<(), EnqueueError> {
        let (link, model, id) = (self.clone(), model.clone(), dedup_id.to_owned());
        let publish = async move {
            link.world.trace(|| format!("{}: queues {id}", link.name));
            link.world.streams.tasks.publish(role, &model, &id, payload.clone()).await?;
            link.queued(role, &payload);
            Ok(())
        };
        self.carry("publish", publish).await?
    }

    async fn pull(
        &self,
        role: Role,
        model: &ModelKey,
        wait: Duration,
    ) -> Result<Option<Delivery>, StreamError> {
        let (backend, model) = (self.world.streams.tasks.clone(), model.clone());
        self.pulled(role.as_str(), wait, async move { backend.pull(role, &model, wait).await }).await
    }

    async fn answer(&self, ack_subject: &str, verdict: Verdict) -> Result<(), StreamError> {
        let (link, subject) = (self.clone(), ack_subject.to_owned());
        let answer = async move {
            if verdict != Verdict::Progress {
                link.world.trace(|| format!("{}: {verdict:?} to {subject}", link.name));
            }
            link.world.streams.tasks.answer(&subject, verdict).await
        };
        self.carry("answer", answer).await?
    }

    fn ack_wait(&self) -> Duration {
        self.world.streams.tasks.ack_wait()
    }

    fn max_deliver(&self) -> u64 {
        self.world.streams.tasks.max_deliver()
    }

    async fn room(&self, role: Role) -> Result<u64, StreamError> {
        let backend = self.world.streams.tasks.clone();
        self.carry("room", async move { backend.room(role).await }).await?
    }

    async fn depth(&self, role: Role, model: &ModelKey) -> Result<Depth, StreamError> {
        let (backend, model) = (self.world.streams.tasks.clone(), model.clone());
        self.carry("depth", async move { backend.depth(role, &model).await }).await?
    }

    async fn signal_cancel(&self, worker: &WorkerId, signal: &CancelSignal) -> Result<(), StreamError> {
        let (backend, worker, signal) = (self.world.streams.tasks.clone(), worker.clone(), signal.clone());
        self.carry("signal_cancel", async move { backend.signal_cancel(&worker, &signal).await }).await?
    }

    async fn presence(&self, worker: &WorkerId, wait: Duration) -> Result<Presence, StreamError> {
        let (link, worker) = (self.clone(), worker.clone());
        let ask = async move {
            let world = &link.world;
            let Some(other) = world.link_of(&worker) else { return Ok(Presence::Gone) };
            match other.process.condition() {
                Condition::Dead => Ok(Presence::Gone),
                Condition::Runs if other.passable() => world.streams.tasks.presence(&worker, wait).await,
                Condition::Runs | Condition::Stands => {
                    sleep(wait).await;
                    Ok(Presence::Silent)
                }
            }
        };
        self.send("presence", wait + PATIENCE, self.draw(), ask).await?
    }

    async fn cancel_signals(
        &self,
        worker: &WorkerId,
    ) -> Result<BoxStream<'static, CancelSignal>, StreamError> {
        self.introduce(worker);
        let (backend, worker) = (self.world.streams.tasks.clone(), worker.clone());
        let signals = self.carry("cancel_signals", async move { backend.cancel_signals(&worker).await });
        let link = self.clone();
        let heard = move |_: &CancelSignal| {
            let lost = !link.passable() || !link.world.is_calm() && chance(link.world.weather.live_lost);
            std::future::ready(!lost)
        };
        Ok(signals.await??.filter(heard).boxed())
    }
}

#[async_trait]
impl OwnQueues for Link {
    async fn open(&self, owner: &Owner) -> Result<(), StreamError> {
        let (backend, owner) = (self.world.streams.own_queues.clone(), owner.clone());
        self.carry("open", async move { backend.open(&owner).await }).await?
    }

    async fn publish_to(&self, owner: &Owner, dedup_id: &str, payload: Bytes) -> Result<(), EnqueueError> {
        let (link, owner, id) = (self.clone(), owner.clone(), dedup_id.to_owned());
        let publish = async move {
            link.world.trace(|| format!("{}: queues {id} for {}", link.name, owner.worker));
            link.world.count("routed to a worker");
            link.world.streams.own_queues.publish_to(&owner, &id, payload.clone()).await?;
            link.queued(Role::Decode, &payload);
            Ok(())
        };
        self.carry("publish", publish).await?
    }

    async fn pull_own(&self, owner: &Owner, wait: Duration) -> Result<Option<Delivery>, StreamError> {
        let (backend, owner) = (self.world.streams.own_queues.clone(), owner.clone());
        self.pulled("own", wait, async move { backend.pull_own(&owner, wait).await }).await
    }

    async fn close(&self, owner: &Owner) -> Result<u64, StreamError> {
        let (link, owner) = (self.clone(), owner.clone());
        let close = async move {
            let moved = link.world.streams.own_queues.close(&owner).await;
            link.world.trace(|| format!("{}: closes the queue of {}: {moved:?}", link.name, owner.worker));
            moved
        };
        self.carry("close", close).await?
    }

    async fn filled(&self) -> Result<Vec<Owner>, StreamError> {
        let backend = self.world.streams.own_queues.clone();
        self.carry("filled", async move { backend.filled().await }).await?
    }
}

#[async_trait]
impl CacheEvents for Link {
    async fn tell(&self, of: &Owner, event: &CacheEvent, after: u64) -> Result<u64, TellError> {
        let (backend, of, event) = (self.world.streams.cache_events.clone(), of.clone(), event.clone());
        self.carry("tell", async move { backend.tell(&of, &event, after).await }).await?
    }

    async fn told(&self, of: Option<&Owner>, after: u64) -> Result<Vec<Told>, StreamError> {
        let (link, of) = (self.clone(), of.cloned());
        let told = async move {
            let mut events = link.world.streams.cache_events.told(of.as_ref(), after).await?;
            // A replica that lags lacks the last ones.
            if !link.world.is_calm() && chance(link.world.weather.stale_read) && !events.is_empty() {
                link.world.count("stale read");
                events.truncate(below(events.len() as u64) as usize);
            }
            Ok(events)
        };
        self.carry("told", told).await?
    }

    async fn last_told(&self) -> Result<u64, StreamError> {
        let backend = self.world.streams.cache_events.clone();
        self.carry("last_told", async move { backend.last_told().await }).await?
    }

    async fn signs(&self) -> Result<BoxStream<'static, ()>, StreamError> {
        let backend = self.world.streams.cache_events.clone();
        let signs = self.carry("signs", async move { backend.signs().await }).await??;
        let link = self.clone();
        let heard = move |_: &()| {
            let lost = !link.passable() || !link.world.is_calm() && chance(link.world.weather.live_lost);
            std::future::ready(!lost)
        };
        Ok(signs.filter(heard).boxed())
    }

    async fn forget(&self, of: &Owner) -> Result<(), StreamError> {
        let (backend, of) = (self.world.streams.cache_events.clone(), of.clone());
        self.carry("forget", async move { backend.forget(&of).await }).await?
    }
}

#[async_trait]
impl DeadLetters for Link {
    async fn bury(&self, letter: &DeadLetter) -> Result<(), StreamError> {
        let (link, what) = (self.clone(), letter.clone());
        let bury = async move {
            link.world.trace(|| format!("{}: buries {}: {}", link.name, what.request, what.reason));
            link.world.streams.dead_letters.bury(&what).await
        };
        let buried = self.carry("bury", bury).await;
        // A gateway finds the spent task again.
        self.unburied(buried.is_err() && !self.name.starts_with("gateway"), letter.request);
        buried?
    }

    async fn list(&self) -> Result<Vec<DeadLetter>, StreamError> {
        let backend = self.world.streams.dead_letters.clone();
        self.carry("list", async move { backend.list().await }).await?
    }

    async fn drop_letter(&self, request: RequestId) -> Result<u64, StreamError> {
        let backend = self.world.streams.dead_letters.clone();
        self.carry("drop_letter", async move { backend.drop_letter(request).await }).await?
    }

    async fn spent(&self, wait: Duration) -> Result<Option<Spent>, StreamError> {
        let backend = self.world.streams.dead_letters.clone();
        self.send("spent", wait + PATIENCE, self.draw(), async move { backend.spent(wait).await }).await?
    }

    async fn settle(&self, spent: &Spent) -> Result<(), StreamError> {
        let (backend, spent) = (self.world.streams.dead_letters.clone(), spent.clone());
        self.carry("settle", async move { backend.settle(&spent).await }).await?
    }
}
