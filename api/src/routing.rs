//! Which worker a request goes to: the one that can answer it soonest with the KV that it has, or whoever has room.
//!
//! `index` knows which worker has which blocks (`follow` keeps it so), `cost` decides, and here it is put together with
//! what the workers' leases say.

pub mod cost;
pub mod explain;
mod follow;
pub mod index;
mod just_routed;

use cost::{Candidate, Given, Weights, Why, decide};
use forebay_schemas::{
    cache::{BLOCK_TOKENS, block_hashes},
    card::{ModelCard, WorkerLease},
    config::LiveConfig,
    event::{Body, Event, RequestAccepted},
    ids::{RequestId, WorkerId},
    task::Role,
};
use forebay_streams::{
    StreamError, Streams,
    environment::in_process,
    registry::Workers,
    settings::{self, Live},
};
use index::Index;
use just_routed::JustRouted;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::{sync::watch, task::JoinSet, time::Instant};

/// How workers are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RoutingMode {
    /// By the KV that they have, and what they do already.
    #[default]
    Kv,
    /// Not at all: whoever has room takes what comes.
    Any,
    /// Each in its turn, if it has room: to compare with.
    RoundRobin,
}

impl std::str::FromStr for RoutingMode {
    type Err = String;

    fn from_str(text: &str) -> Result<RoutingMode, String> {
        match text {
            "kv" => Ok(RoutingMode::Kv),
            "any" => Ok(RoutingMode::Any),
            "round-robin" => Ok(RoutingMode::RoundRobin),
            other => Err(format!("there is no routing {other:?}; there are: kv, any, round-robin")),
        }
    }
}

/// The index, shared between who keeps it and who asks it.
pub(crate) type SharedIndex = Arc<Mutex<Index>>;

/// See the [module](self).
pub(crate) struct Routing {
    mode: RoutingMode,
    index: SharedIndex,
    workers: watch::Receiver<Workers>,
    live: Live,
    just_routed: Mutex<JustRouted>,
    turn: AtomicUsize,
    /// What keeps the index.
    _background: JoinSet<()>,
}

/// Where a request goes, in short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    /// To this worker's own queue; none: to the shared one.
    pub(crate) worker: Option<WorkerId>,
    pub(crate) why: Why,
    pub(crate) hit_blocks: u32,
}

impl Routing {
    pub(crate) async fn start(streams: &Streams, mode: RoutingMode) -> Result<Routing, StreamError> {
        let index = SharedIndex::default();
        let workers = streams.registry.workers().await?;
        let mut background = JoinSet::new();
        if mode == RoutingMode::Kv {
            let events = streams.cache_events.clone();
            background.spawn(in_process(follow::follow(events.clone(), index.clone())));
            background.spawn(in_process(follow::tend(events, index.clone(), workers.clone())));
        }
        Ok(Routing {
            mode,
            index,
            workers,
            live: settings::follow(&*streams.settings).await?,
            just_routed: Mutex::default(),
            turn: AtomicUsize::new(0),
            _background: background,
        })
    }

    /// Chooses for a request, and counts on it that the request goes there.
    pub(crate) fn route(&self, request: RequestId, card: &ModelCard, accepted: &RequestAccepted) -> Route {
        let now = Instant::now();
        let workers = self.workers.borrow().clone();
        let route = match self.mode {
            RoutingMode::Any => Route { worker: None, why: Why::NoOverlap, hit_blocks: 0 },
            RoutingMode::RoundRobin => self.next_in_turn(card, &workers, now),
            RoutingMode::Kv => self.cheapest(request, card, accepted, &workers, now),
        };
        if let Some(worker) = &route.worker {
            let prefill_blocks = prompt_blocks(&accepted.prompt).saturating_sub(route.hit_blocks);
            self.just_routed().add(request, worker.clone(), prefill_blocks, now);
        }
        route
    }

    /// Takes note of an event of a request that this gateway answers: who has claimed one shows so in its lease soon.
    pub(crate) fn observe(&self, event: &Event) {
        match &event.body {
            Body::Claimed(_) => self.just_routed().claimed(event.request, Instant::now()),
            body if body.is_terminal() => self.just_routed().ended(event.request),
            _ => {}
        }
    }

    fn cheapest(
        &self,
        request: RequestId,
        card: &ModelCard,
        accepted: &RequestAccepted,
        workers: &Workers,
        now: Instant,
    ) -> Route {
        let weights = weights(&self.live.borrow());
        let routed = self.just_routed().by_worker(now);
        let index = self.index.lock().expect("no panics while held");
        let hits = match index.held() {
            0 => BTreeMap::new(),
            _ => hits(&index, card, accepted.cache_salt.as_deref(), &accepted.prompt),
        };
        let candidates = candidates(card, workers, &hits, &routed);
        let decision = decide(prompt_blocks(&accepted.prompt), &candidates, weights);
        tracing::debug!(%request, to = ?decision.worker, why = ?decision.why, hit_blocks = decision.hit_blocks,
            choices = ?decision.choices, "routed");
        let (worker, why, hit_blocks) = (decision.worker.cloned(), decision.why, decision.hit_blocks);
        Route { worker, why, hit_blocks }
    }

    fn next_in_turn(&self, card: &ModelCard, workers: &Workers, now: Instant) -> Route {
        let routed = self.just_routed().by_worker(now);
        let all = candidates(card, workers, &BTreeMap::new(), &routed);
        let able: Vec<&Candidate<'_>> =
            all.iter().filter(|one| one.free_slots > one.just_routed.requests).collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let worker = (!able.is_empty()).then(|| able[turn % able.len()].worker.clone());
        Route { worker, why: Why::NoOverlap, hit_blocks: 0 }
    }

    fn just_routed(&self) -> MutexGuard<'_, JustRouted> {
        self.just_routed.lock().expect("no panics while held")
    }
}

/// The weights as they are set, or the gateway's own.
fn weights(live: &LiveConfig) -> Weights {
    let own = Weights::default();
    Weights {
        prefill: live.router_prefill_weight.unwrap_or(own.prefill),
        kv_load: live.router_kv_load_weight.unwrap_or(own.kv_load),
        active: live.router_active_weight.unwrap_or(own.active),
    }
}

/// Blocks that a prompt takes, the last one perhaps not whole.
fn prompt_blocks(prompt: &[u32]) -> u32 {
    (prompt.len() as u32).div_ceil(BLOCK_TOKENS)
}

/// How many of a prompt's blocks each worker has.
fn hits<'a>(
    index: &'a Index,
    card: &ModelCard,
    salt: Option<&str>,
    prompt: &[u32],
) -> BTreeMap<&'a WorkerId, u32> {
    index.overlap(&block_hashes(card.layout_hash, salt, prompt)).into_iter().collect()
}

/// Whether a worker takes requests for this model from a queue of its own.
fn is_candidate(lease: &WorkerLease, card: &ModelCard) -> bool {
    lease.role == Role::Decode
        && lease.own_queue
        && !lease.draining
        && lease.model == card.key
        && lease.layout_hash == card.layout_hash
}

fn candidates<'a>(
    card: &ModelCard,
    workers: &'a Workers,
    hits: &BTreeMap<&WorkerId, u32>,
    just_routed: &BTreeMap<WorkerId, Given>,
) -> Vec<Candidate<'a>> {
    let leases = workers.values().filter(|lease| is_candidate(lease, card));
    leases
        .map(|lease| Candidate {
            worker: &lease.worker,
            hit_blocks: hits.get(&lease.worker).copied().unwrap_or(0),
            queued_blocks: lease.prefill_tokens.div_ceil(BLOCK_TOKENS),
            kv_blocks: lease.active_tokens.div_ceil(BLOCK_TOKENS),
            active: lease.slots.saturating_sub(lease.free_slots),
            free_slots: lease.free_slots,
            just_routed: just_routed.get(&lease.worker).copied().unwrap_or_default(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_that_are_set_and_otherwise_the_gateways_own() {
        assert_eq!(weights(&LiveConfig::default()), Weights::default());
        let mut live = LiveConfig::default();
        for (key, value) in
            [("router_prefill_weight", "3"), ("router_kv_load_weight", "5"), ("router_active_weight", "7")]
        {
            live.set(key, Some(value)).unwrap();
        }
        assert_eq!(weights(&live), Weights { prefill: 3.0, kv_load: 5.0, active: 7.0 });
    }
}
