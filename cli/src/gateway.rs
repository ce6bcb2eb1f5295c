//! `forebay gateway`.

use crate::config::{NatsArgs, RegistryArgs, end_with_parent, init_logging, runtime, told_to_stop};
use anyhow::Context;
use clap::Args;
use forebay_api::{Gateway, GatewayConfig, routing::RoutingMode};
use forebay_schemas::ids::GatewayId;
use std::{net::SocketAddr, time::Duration};
use tokio::net::TcpListener;

/// Where the gateway listens, and its bounds.
#[derive(Args, Clone, Debug)]
pub(crate) struct HttpArgs {
    /// Address of the HTTP API.
    #[arg(long, env = "FOREBAY_LISTEN", default_value = "127.0.0.1:8000", value_name = "HOST:PORT")]
    pub(crate) listen: SocketAddr,
    /// Seconds from accepting a request to its end; what takes longer is ended with an error.
    #[arg(long, env = "FOREBAY_REQUEST_TIMEOUT_S", default_value_t = 600, value_name = "SECONDS")]
    request_timeout_s: u64,
    /// Requests under way at once; more are refused with 429.
    #[arg(long, env = "FOREBAY_IN_FLIGHT_MAX", default_value_t = 1024, value_name = "REQUESTS")]
    in_flight_max: usize,
    /// How workers are chosen: `kv`, `any`, or `round-robin`. For comparisons.
    #[arg(long, env = "FOREBAY_ROUTING", default_value = "kv", value_name = "HOW", hide = true)]
    routing: RoutingMode,
}

#[derive(Args, Debug)]
pub(crate) struct GatewayArgs {
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    registry: RegistryArgs,
    #[command(flatten)]
    http: HttpArgs,
    /// Name in log subjects; drawn if not given. No two running gateways may share one.
    #[arg(long, env = "FOREBAY_GATEWAY_ID", value_name = "NAME")]
    id: Option<GatewayId>,
    /// Threads that serve.
    #[arg(long, env = "FOREBAY_GATEWAY_THREADS", default_value_t = 2, value_name = "N")]
    threads: usize,
    /// Seconds that running requests get to finish after Ctrl-C or SIGTERM.
    #[arg(long, env = "FOREBAY_GRACE_S", default_value_t = 30, value_name = "SECONDS")]
    grace_s: u64,
}

/// Binds a listening socket, and says what to do if the port is taken.
pub(crate) fn listen(address: SocketAddr) -> anyhow::Result<std::net::TcpListener> {
    std::net::TcpListener::bind(address).with_context(|| {
        format!("can't listen on {address}; stop what uses it, or choose another with --listen HOST:PORT")
    })
}

pub(crate) fn run(args: GatewayArgs) -> anyhow::Result<()> {
    init_logging("info");
    end_with_parent();
    let listener = listen(args.http.listen)?;
    runtime(args.threads)?.block_on(async move {
        let config = GatewayConfig {
            gateway: args.id.unwrap_or_else(|| GatewayId::random("gw")),
            request_timeout: Duration::from_secs(args.http.request_timeout_s),
            in_flight_max: args.http.in_flight_max,
            grace: Duration::from_secs(args.grace_s),
            routing: args.http.routing,
            ..GatewayConfig::default()
        };
        let streams = args.nats.connect("gateway", config.gateway.as_str()).await?;
        let streams = args.registry.apply(streams).await?;
        let gateway = Gateway::start(streams, config).await?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        gateway.serve(listener, told_to_stop()).await.context("serving HTTP")
    })
}
