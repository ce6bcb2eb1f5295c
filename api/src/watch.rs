//! Fast failover: the gateway watches over the workers that have its requests, and gives the tasks of one that has died
//! back at once, long before the queue would.

mod owners;

use forebay_schemas::{
    event::Event,
    ids::{GatewayId, RequestId, WorkerId},
};
use forebay_streams::{
    Streams, environment,
    log::LogRef,
    tasks::{Presence, Verdict},
};
use futures::future::join_all;
use owners::Owners;
use std::{
    sync::{Arc, Mutex, Weak},
    time::Duration,
};
use tokio::time::{Instant, MissedTickBehavior};

/// How often it is looked who has fallen silent.
const LOOK: Duration = Duration::from_millis(50);

/// How long a worker has to answer.
const ANSWER: Duration = Duration::from_millis(300);

/// Workers that hold this gateway's requests.
pub(crate) struct Watch(Mutex<Owners>);

impl Watch {
    /// Nobody is watched yet. A worker that does not answer for `patience` counts as dead.
    pub(crate) fn new(patience: Duration) -> Watch {
        Watch(Mutex::new(Owners::new(patience)))
    }

    /// Takes note of an event of a request that this gateway answers. Twice does no harm.
    pub(crate) fn observe(&self, event: &Event) {
        self.owners(|owners| owners.observe(event, Instant::now()));
    }

    /// A request is no longer answered here.
    pub(crate) fn forget(&self, request: RequestId) {
        self.owners(|owners| owners.forget(request));
    }

    fn owners<T>(&self, act: impl FnOnce(&mut Owners) -> T) -> T {
        act(&mut self.0.lock().expect("no panics while held"))
    }
}

/// Asks silent workers, and gives back what dead ones held, for as long as the gateway lives.
pub(crate) async fn watch_over(watch: Weak<Watch>, streams: Streams, gateway: GatewayId) {
    // Any log will do: what counts is that the backend answers.
    let nobody = LogRef { gateway, request: RequestId::from_parts(0, &[0; 10]) };
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let Some(watch) = watch.upgrade() else { return };
        let silent = watch.owners(|owners| owners.silent(Instant::now()));
        if !silent.is_empty() {
            environment::spawn(ask(watch, streams.clone(), nobody.clone(), silent));
        }
    }
}

/// Asks some workers at once, and whether NATS answers this gateway at all.
async fn ask(watch: Arc<Watch>, streams: Streams, nobody: LogRef, silent: Vec<WorkerId>) {
    let questions = join_all(silent.iter().map(|worker| streams.tasks.presence(worker, ANSWER)));
    let sound = tokio::time::timeout(ANSWER, streams.log.last_seq(&nobody));
    let (answers, sound) = tokio::join!(questions, sound);
    let now = Instant::now();
    if !matches!(sound, Ok(Ok(_))) || answers.iter().any(Result::is_err) {
        watch.owners(|owners| owners.trouble(now));
        return;
    }
    for (worker, presence) in silent.iter().zip(answers.into_iter().flatten()) {
        let given_back = watch.owners(|owners| owners.answered(worker, presence, now));
        if given_back.is_empty() {
            continue;
        }
        let how = if presence == Presence::Gone { "gone" } else { "silent" };
        tracing::warn!(%worker, how, tasks = given_back.len(), "a worker has died; its tasks go to others");
        for ack_subject in given_back {
            if let Err(error) = streams.tasks.answer(&ack_subject, Verdict::Nak).await {
                tracing::debug!(%error, "a task was not given back; it will come again by itself");
            }
        }
    }
}
