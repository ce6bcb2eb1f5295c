//! Reading a log as it grows, with nothing missing.
//!
//! Live events come over plain NATS and may be lost: to a slow consumer, a reconnect, or a full buffer here.
//! Every live event names its predecessor, so a hole shows at the next one, and the missing part is read from
//! the stream. A lost *last* event shows no hole: after a silence the log's last sequence is asked for.

use crate::{
    StreamError, environment,
    log::{EventLog, Live, LogRef, Recorded},
};
use forebay_schemas::ids::{GatewayId, RequestId};
use futures::{Stream, StreamExt, stream::BoxStream};
use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::sync::mpsc;

/// Live events that wait for one follower. What does not fit is dropped, and read from the stream later: a
/// stuck client costs this much memory and nobody else's time.
const LIVE_MAX: usize = 64;

/// Silence after which the log is asked whether something was missed; doubles up to [`PROBE_MAX`].
const PROBE_FIRST: Duration = Duration::from_millis(500);

/// The longest silence without a probe.
const PROBE_MAX: Duration = Duration::from_secs(5);

/// A log being followed: yields each of its events once, in order.
pub struct Follow {
    backend: Arc<dyn EventLog>,
    log: LogRef,
    seen: u64,
    repaired: VecDeque<Recorded>,
    live: BoxStream<'static, Live>,
    /// Something is known to be missing. Kept here, so that a caller that gives up on [`Follow::next`] in the middle
    /// of a repair loses nothing.
    hole: bool,
    silence: Duration,
}

impl Follow {
    /// Follows a log through a stream of live events that may be incomplete, from after a sequence.
    pub fn new(
        backend: Arc<dyn EventLog>,
        log: LogRef,
        after: u64,
        live: BoxStream<'static, Live>,
    ) -> Follow {
        Follow {
            backend,
            log,
            seen: after,
            repaired: VecDeque::new(),
            live,
            hole: false,
            silence: PROBE_FIRST,
        }
    }

    /// Watches one log on its own subscription.
    pub async fn watch(backend: Arc<dyn EventLog>, log: LogRef, after: u64) -> Result<Follow, StreamError> {
        let live = backend.watch(&log).await?;
        Ok(Follow::new(backend, log, after, live))
    }

    /// Reads what there is already before it waits for a sign of more: for a log that was begun before it was followed.
    pub fn catching_up(mut self) -> Follow {
        self.hole = true;
        self
    }

    /// The sequence of the last event that was returned.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// The next event, however long it takes to happen. Cancel-safe: an event is returned or kept.
    pub async fn next(&mut self) -> Result<Recorded, StreamError> {
        loop {
            if let Some(recorded) = self.repaired.pop_front() {
                self.seen = recorded.seq;
                self.silence = PROBE_FIRST;
                return Ok(recorded);
            }
            if self.hole {
                self.repair().await?;
                continue;
            }
            match tokio::time::timeout(self.silence, self.live.next()).await {
                Ok(Some(live)) if live.recorded.seq <= self.seen => {}
                Ok(Some(live)) if live.previous == self.seen => self.repaired.push_back(live.recorded),
                Ok(Some(_)) => self.hole = true,
                Ok(None) => {
                    // The subscription is gone; the log is still there, and is read at the pace of the probe.
                    self.live = futures::stream::pending().boxed();
                    self.hole = true;
                }
                Err(_) => {
                    self.silence = (self.silence * 2).min(PROBE_MAX);
                    self.hole = self.backend.last_seq(&self.log).await? > self.seen;
                }
            }
        }
    }

    async fn repair(&mut self) -> Result<(), StreamError> {
        let missing = self.backend.read(&self.log, self.seen).await?;
        tracing::debug!(log = %self.log, events = missing.len(), "read what the live tail missed");
        self.repaired.extend(missing);
        self.hole = false;
        Ok(())
    }
}

/// By request, then by the follower's number: a client may come back while its old connection is not known to be gone.
type Followers = BTreeMap<RequestId, Vec<(u64, mpsc::Sender<Live>)>>;

/// A gateway's one subscription, dealt out to the followers of its requests.
pub struct Hub {
    backend: Arc<dyn EventLog>,
    gateway: GatewayId,
    followers: Arc<Mutex<Followers>>,
    next: AtomicU64,
    pump: tokio::task::JoinHandle<()>,
}

impl Hub {
    /// Subscribes to all logs of a gateway. `observe` sees every event that comes, whether or not somebody follows
    /// its log; it must be quick.
    pub async fn start(
        backend: Arc<dyn EventLog>,
        gateway: GatewayId,
        observe: impl Fn(&Live) + Send + 'static,
    ) -> Result<Hub, StreamError> {
        let live = backend.tail(&gateway).await?;
        let followers = Arc::<Mutex<Followers>>::default();
        let pump = environment::spawn(pump(live, Arc::downgrade(&followers), observe));
        Ok(Hub { backend, gateway, followers, next: AtomicU64::new(0), pump })
    }

    /// Follows the log of a request that this gateway accepted, from after a sequence. To see it from its first event,
    /// follow before creating the log.
    pub fn follow(&self, request: RequestId, after: u64) -> Follow {
        let (sender, receiver) = mpsc::channel(LIVE_MAX);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut followers = self.followers.lock().expect("no panics while held");
        followers.entry(request).or_default().push((number, sender));
        drop(followers);
        let live = Subscription { receiver, request, number, followers: Arc::downgrade(&self.followers) };
        let log = LogRef { gateway: self.gateway.clone(), request };
        Follow::new(self.backend.clone(), log, after, live.boxed())
    }

    /// How many requests are followed.
    pub fn followed(&self) -> usize {
        self.followers.lock().expect("no panics while held").len()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

async fn pump(
    mut live: BoxStream<'static, Live>,
    followers: Weak<Mutex<Followers>>,
    observe: impl Fn(&Live) + Send,
) {
    while let Some(event) = live.next().await {
        observe(&event);
        let Some(followers) = followers.upgrade() else { return };
        let followers = followers.lock().expect("no panics while held");
        let Some(of_this) = followers.get(&event.log.request) else { continue };
        let (last, others) = of_this.split_last().expect("a request without followers has no entry");
        // Full: the follower finds the hole and reads it from the stream.
        for (_, follower) in others {
            let _ = follower.try_send(event.clone());
        }
        let _ = last.1.try_send(event);
    }
}

/// One follower's end of the hub; leaves the hub when dropped.
struct Subscription {
    receiver: mpsc::Receiver<Live>,
    request: RequestId,
    number: u64,
    followers: Weak<Mutex<Followers>>,
}

impl Stream for Subscription {
    type Item = Live;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Live>> {
        self.receiver.poll_recv(context)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let Some(followers) = self.followers.upgrade() else { return };
        let mut followers = followers.lock().expect("no panics while held");
        if let Some(of_this) = followers.get_mut(&self.request) {
            of_this.retain(|(number, _)| *number != self.number);
            if of_this.is_empty() {
                followers.remove(&self.request);
            }
        }
    }
}
