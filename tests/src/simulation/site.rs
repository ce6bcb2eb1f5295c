//! A deployment within one simulation: gateways and workers that are started again when they are gone, and what befalls
//! them.

use super::{
    chance::{below, between, between_ms, chance},
    client::MODEL,
    network::Link,
    poison::{Poison, Poisoned},
    weather::Trouble,
    world::World,
};
use axum::{body::Body, http::Request};
use forebay_api::{Gateway, GatewayConfig};
use forebay_schemas::{card::ModelCard, ids::GatewayId, task::Role};
use forebay_streams::environment::{self, Condition, Process};
use forebay_workers::{
    engine::{
        Engine,
        sim::{SimEngine, SimOptions, SimPace},
    },
    kv::KvOptions,
    model::ModelText,
    worker::{self, WorkerConfig},
};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// Tokenizer and template, read once for all seeds.
static TEXT: LazyLock<ModelText> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/gqa4-tied-fp16");
    ModelText::open(&folder).expect("the reference is part of the repository")
});

/// What there is, and its settings.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    gateways: u64,
    decoders: u64,
    prefillers: u64,
    slots: u32,
    pace: SimPace,
    /// What an engine can't do, if there is such a thing.
    pub(super) poison: Option<Poison>,
    /// A gateway that is started again has the name that it had.
    keeps_name: bool,
    worker: WorkerConfig,
    gateway: GatewayConfig,
}

/// A process that lives.
#[derive(Clone)]
struct Life {
    link: Link,
    /// A worker can be told to stop.
    stop: Option<CancellationToken>,
}

/// A gateway that lives.
pub(super) struct RunningGateway {
    pub(super) name: Arc<str>,
    pub(super) process: Process,
    pub(super) gateway: Gateway,
}

impl RunningGateway {
    /// Requests admitted, and logs followed.
    pub(super) async fn held(&self) -> (u64, u64) {
        let request = Request::get("/health").body(Body::empty()).expect("a request");
        let response = self.gateway.router().oneshot(request).await.unwrap_or_else(|never| match never {});
        let body = axum::body::to_bytes(response.into_body(), 1 << 16).await.expect("a body");
        let health: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        let count = |name: &str| health[name].as_u64().expect("a number");
        (count("requests_in_flight"), count("followed_logs"))
    }
}

/// See the [module](self).
pub(super) struct Site {
    pub(super) world: Arc<World>,
    plan: Plan,
    card: ModelCard,
    lives: Mutex<Vec<Life>>,
    gateways: Mutex<Vec<Arc<RunningGateway>>>,
    started: AtomicU64,
}

impl Plan {
    pub(super) fn draw() -> Plan {
        static SITES: AtomicU64 = AtomicU64::new(0);
        let folder = format!("simulated-{}", SITES.fetch_add(1, Ordering::Relaxed));
        let us = |most: u64| between(1..=most) as f64 * 1000.0;
        let request_timeout = if chance(700) { between_ms(20_000..=60_000) } else { between_ms(500..=5000) };
        let poison = chance(300).then(Poison::draw);
        let few = chance(if poison.is_some() { 600 } else { 200 });
        let attempts_max = if few { between(2..=5) as u32 } else { 100 };
        Plan {
            gateways: between(1..=2),
            decoders: between(1..=3),
            prefillers: between(0..=2),
            slots: between(1..=4) as u32,
            pace: SimPace {
                prefill_us: us(10),
                prefill_token_us: us(8) / 8.0,
                decode_us: us(40),
                decode_row_us: us(2),
            },
            poison,
            keeps_name: chance(300),
            worker: WorkerConfig {
                role: Role::Decode,
                max_local_prefill_length: if chance(700) { 0 } else { below(100) as u32 },
                max_prefill_queue_size: if chance(800) { 64 } else { below(3) as u32 },
                chunk_tokens: between(4..=64) as u32,
                step_tokens: between(1..=64) as u32,
                // Of 256 bytes a block: from none to more than all requests need.
                cache_bytes: if chance(300) { 0 } else { between(1..=64) * 256 },
                overlap: chance(900),
                kv_lease: between_ms(100..=1500),
                attempts_max,
                prefill_patience: between_ms(500..=3000),
                grace: between_ms(100..=6000),
                socket_folder: PathBuf::from(folder),
                kv: KvOptions::default(),
            },
            gateway: GatewayConfig {
                gateway: GatewayId::new("gw").expect("a name"),
                request_timeout,
                keep_alive: between_ms(200..=15_000),
                ..GatewayConfig::default()
            },
        }
    }

    pub(super) fn engine(&self) -> SimEngine {
        let vocab = TEXT.tokenizer.get_vocab_size(true) as u32;
        let (slots, pace) = (self.slots, self.pace);
        // As in `forebay worker --engine sim`: what is between the special tokens has text.
        SimEngine::new(SimOptions { slots, positions: 256, vocab, drawn: vocab / 4..vocab / 2, pace })
            .expect("memory for a small region")
    }
}

impl Site {
    /// Starts everything.
    pub(super) async fn start(world: Arc<World>, plan: Plan) -> Arc<Site> {
        let card = TEXT.card(MODEL, plan.engine().card(), &world.streams).await.expect("a card");
        let (lives, gateways) = Default::default();
        let site = Arc::new(Site { world, plan, card, lives, gateways, started: AtomicU64::new(0) });
        for number in 0..site.plan.gateways {
            tokio::spawn(site.clone().keep_gateway(number));
        }
        for _ in 0..site.plan.decoders {
            tokio::spawn(site.clone().keep_worker(Role::Decode));
        }
        for _ in 0..site.plan.prefillers {
            tokio::spawn(site.clone().keep_worker(Role::Prefill));
        }
        site
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    pub(super) fn card(&self) -> &ModelCard {
        &self.card
    }

    pub(super) fn tokenizer() -> Arc<tokenizers::Tokenizer> {
        TEXT.tokenizer.clone()
    }

    fn lives(&self) -> MutexGuard<'_, Vec<Life>> {
        self.lives.lock().expect("no panics while held")
    }

    /// Gateways that live.
    pub(super) fn gateways(&self) -> Vec<Arc<RunningGateway>> {
        self.gateways.lock().expect("no panics while held").clone()
    }

    /// A gateway, once there is one.
    pub(super) async fn any_gateway(&self) -> Arc<RunningGateway> {
        loop {
            let gateways = self.gateways();
            if !gateways.is_empty() {
                return gateways[below(gateways.len() as u64) as usize].clone();
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    fn begin(&self, kind: &str, stop: Option<CancellationToken>) -> Life {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let skew_us = below(200_000) as i64 - 100_000;
        let link = Link::new(&self.world, Process::new(skew_us), &format!("{kind}#{number}"));
        let life = Life { link, stop };
        self.lives().push(life.clone());
        life
    }

    fn end(&self, life: &Life) {
        life.link.process.set(Condition::Dead);
        self.lives().retain(|other| other.link.name != life.link.name);
        self.world.record().gone.insert(life.link.name.clone());
        self.world.trace(|| format!("{} is gone", life.link.name));
    }

    async fn keep_worker(self: Arc<Self>, role: Role) {
        loop {
            let stop = CancellationToken::new();
            let life = self.begin(role.as_str(), Some(stop.clone()));
            let (engine, poison) = (self.plan.engine(), self.plan.poison.clone());
            let engine = Box::new(Poisoned { engine, poison });
            let config = WorkerConfig { role, ..self.plan.worker.clone() };
            let (card, tokenizer, streams) = (self.card.clone(), Site::tokenizer(), life.link.streams());
            let process = life.link.process.clone();
            let run = async move {
                let work = worker::run(config, engine, card, tokenizer, streams, stop);
                process.run(work).await
            };
            tokio::select! {
                biased;
                () = life.link.process.died() => {}
                outcome = tokio::spawn(run) => {
                    self.world.trace(|| format!("{}: ends: {outcome:?}", life.link.name));
                }
            }
            self.end(&life);
            sleep(between_ms(50..=3000)).await;
        }
    }

    async fn keep_gateway(self: Arc<Self>, number: u64) {
        loop {
            let life = self.begin("gateway", None);
            let process = life.link.process.clone();
            let gateway = match self.plan.keeps_name {
                true => GatewayId::new(format!("gw-{number}")).expect("a name"),
                false => environment::name("gw"),
            };
            let config = GatewayConfig { gateway, ..self.plan.gateway.clone() };
            self.world.trace(|| format!("{} is {}", life.link.name, config.gateway));
            let start = Gateway::start(life.link.streams(), config);
            tokio::select! {
                biased;
                () = process.died() => {}
                started = process.run(start) => match started {
                    Ok(gateway) => {
                        let running = Arc::new(RunningGateway {
                            name: life.link.name.clone(),
                            process: process.clone(),
                            gateway,
                        });
                        self.gateways.lock().expect("no panics while held").push(running.clone());
                        process.died().await;
                        self.gateways
                            .lock()
                            .expect("no panics while held")
                            .retain(|other| !Arc::ptr_eq(other, &running));
                        // A dead process does not clean up: what it holds stays until the simulation ends.
                        std::mem::forget(running);
                    }
                    Err(error) => self.world.trace(|| format!("{}: {error}", life.link.name)),
                }
            }
            self.end(&life);
            sleep(between_ms(50..=3000)).await;
        }
    }

    /// Brings trouble until the storm is over, then peace.
    pub(super) async fn trouble(&self, storm: Duration) {
        let over = Instant::now() + storm;
        loop {
            let next = Instant::now() + between_ms(1..=self.world.weather.pause_ms);
            sleep_until(next.min(over)).await;
            if next >= over {
                break;
            }
            if let Some(trouble) = self.world.weather.trouble() {
                self.befall(trouble);
            }
        }
        self.world.calm_down();
        self.world.backend.set_open(true);
        for life in self.lives().iter() {
            life.link.way.set_open(true);
            life.link.process.set(Condition::Runs);
        }
    }

    fn befall(&self, trouble: Trouble) {
        let lives = self.lives();
        if lives.is_empty() {
            return;
        }
        let life = lives[below(lives.len() as u64) as usize].clone();
        drop(lives);
        let (name, world) = (life.link.name.clone(), self.world.clone());
        let lasts = between_ms(20..=6000);
        match trouble {
            Trouble::Crash => {
                world.count("crash");
                world.trace(|| format!("{name} crashes"));
                life.link.process.set(Condition::Dead);
            }
            Trouble::Freeze => {
                world.count("freeze");
                world.trace(|| format!("{name} stands still for {lasts:?}"));
                life.link.process.set(Condition::Stands);
                tokio::spawn(async move {
                    sleep(lasts).await;
                    world.trace(|| format!("{name} goes on"));
                    life.link.process.set(Condition::Runs);
                });
            }
            Trouble::Cut => {
                world.count("partition");
                world.trace(|| format!("{name} is cut off for {lasts:?}"));
                life.link.way.set_open(false);
                tokio::spawn(async move {
                    sleep(lasts).await;
                    world.trace(|| format!("{name} is connected again"));
                    life.link.way.set_open(true);
                });
            }
            Trouble::Drain => {
                if let Some(stop) = life.stop {
                    world.count("drain");
                    world.trace(|| format!("{name} is told to stop"));
                    stop.cancel();
                }
            }
            Trouble::Away => {
                world.count("backend away");
                world.trace(|| format!("the backend is away for {lasts:?}"));
                world.backend.set_open(false);
                tokio::spawn(async move {
                    sleep(lasts).await;
                    world.trace(|| "the backend is back".to_owned());
                    world.backend.set_open(true);
                });
            }
        }
    }
}
