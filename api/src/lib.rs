//! The gateway: OpenAI's HTTP API in front of the request log. It keeps nothing that a request needs to go on;
//! what it accepts lies in the log and the queue, and what it answers it reads from the log.
//!
//! Follow one request: `chat` (read) → `asking` (validate, admit) → `models` and `template` (render, tokenize) →
//! `running` (begin the log, queue, follow) → `sse` or the whole answer.

mod admission;
mod asking;
mod body;
mod chat;
mod dead_letters;
mod error;
mod fleet;
mod health;
mod identity;
mod left_behind;
mod meters;
mod models;
mod query;
mod responses;
mod room;
mod router;
pub mod routing;
mod running;
mod serve;
mod sse;
mod template;
mod validate;
mod watch;

use admission::Admission;
use fleet::Fleet;
use forebay_schemas::ids::GatewayId;
use forebay_streams::{StreamError, Streams, environment::in_process, follow::Hub, log::Live};
use health::Reachable;
use models::Models;
use room::Room;
use routing::{Routing, RoutingMode};
use std::{sync::Arc, time::Duration};
use tokio::task::JoinSet;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use watch::Watch;

/// Bounds and times of a gateway.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Its name in log subjects. Two gateways must not share one: each would read the other's requests.
    pub gateway: GatewayId,
    /// Time from accepting a request to its terminal event.
    pub request_timeout: Duration,
    /// Requests under way at once; one more is answered with 429.
    pub in_flight_max: usize,
    /// Open connections at once; more wait to be accepted.
    pub connections_max: usize,
    /// Bytes of a request's body; a longer one is answered with 413.
    pub body_bytes_max: usize,
    /// The longest silence on a stream before a comment is sent.
    pub keep_alive: Duration,
    /// How long running requests may take to finish once the gateway is told to stop.
    pub grace: Duration,
    /// How workers are chosen.
    pub routing: RoutingMode,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        GatewayConfig {
            gateway: GatewayId::random("gw"),
            request_timeout: Duration::from_secs(600),
            in_flight_max: 1024,
            connections_max: 4096,
            body_bytes_max: 4 << 20,
            keep_alive: Duration::from_secs(15),
            grace: Duration::from_secs(30),
            routing: RoutingMode::Kv,
        }
    }
}

/// A gateway that follows its logs and the models, ready to serve.
pub struct Gateway {
    shared: Arc<Shared>,
    /// Its loops, which end with it.
    _background: JoinSet<()>,
}

/// What every request uses.
pub(crate) struct Shared {
    config: GatewayConfig,
    streams: Streams,
    hub: Hub,
    /// Workers that have this gateway's requests.
    watch: Arc<Watch>,
    models: Arc<Models>,
    routing: Arc<Routing>,
    admission: Admission,
    room: Room,
    fleet: Fleet,
    reachable: Reachable,
    /// One task for each request under way; see `running::keeper`.
    keepers: TaskTracker,
    /// The gateway was told to stop: no longer ready.
    draining: CancellationToken,
    /// The grace is over: what still runs ends now.
    closing: CancellationToken,
}

impl Gateway {
    /// Connects a gateway to a backend. Fails if that does not answer.
    pub async fn start(streams: Streams, config: GatewayConfig) -> Result<Gateway, StreamError> {
        // Before any meter is made: those made earlier count nothing.
        if let Err(error) = meters::recorder() {
            tracing::warn!(error, "metrics go to another recorder of this process");
        }
        let watch = Arc::new(Watch::new(streams.registry.lease_time()));
        let watching = watch.clone();
        let routing = Arc::new(Routing::start(&streams, config.routing).await?);
        let routed = routing.clone();
        let observe = move |live: &Live| {
            watching.observe(&live.recorded.event);
            routed.observe(&live.recorded.event);
        };
        let hub = Hub::start(streams.log.clone(), config.gateway.clone(), observe).await?;
        let models = Arc::new(Models::follow(streams.catalog.clone()).await?);
        let mut background = JoinSet::new();
        let (watching, gateway) = (Arc::downgrade(&watch), config.gateway.clone());
        background.spawn(in_process(watch::watch_over(watching, streams.clone(), gateway)));
        background.spawn(in_process(dead_letters::settle(streams.clone())));
        let workers = streams.registry.workers().await?;
        background.spawn(in_process(left_behind::sweep(streams.clone(), workers)));
        let shared = Arc::new(Shared {
            watch,
            routing,
            admission: Admission::new(config.in_flight_max),
            room: Room::default(),
            fleet: Fleet::follow(streams.registry.as_ref()).await?,
            config,
            streams,
            hub,
            models: models.clone(),
            reachable: Reachable::now(),
            keepers: TaskTracker::new(),
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
        });
        background.spawn(in_process(models::preload(models)));
        background.spawn(in_process(health::probe(Arc::downgrade(&shared))));
        background.spawn(in_process(meters::upkeep()));
        background.spawn(in_process(room::probe(Arc::downgrade(&shared))));
        Ok(Gateway { shared, _background: background })
    }
}
