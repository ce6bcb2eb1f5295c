//! Connecting, and refusing servers that can't do what is needed.

use super::{JetStream, Limits, topology};
use crate::{StreamError, Streams};
use async_nats::{ConnectOptions, Event};
use std::time::Duration;
use tokio::sync::watch;

/// Oldest server that works: batched direct reads.
const SERVER_MIN: (i64, i64) = (2, 11);

/// How to connect.
#[derive(Clone, Debug)]
pub struct Options {
    /// Server, such as `nats://127.0.0.1:4222`; several are separated by commas.
    pub url: String,
    /// Shown in the server's list of connections, such as `gateway gw-1`.
    pub name: String,
    /// Each role receives replies under its own prefix, so that permissions can keep roles apart.
    pub inbox_prefix: String,
    /// Credentials file (`.creds`), if the server wants one.
    pub credentials: Option<std::path::PathBuf>,
    /// Bounds and times of streams and consumers, where they are not there yet.
    pub limits: Limits,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing answers there.
    #[error(
        "no NATS server answers at {url}: {cause}; start one with JetStream (`nats-server -js`), or let `forebay up` do it"
    )]
    Unreachable {
        /// Where.
        url: String,
        /// What the client said.
        cause: String,
    },
    /// The server is too old.
    #[error("the NATS server at {url} is version {found}, 2.11 or newer is needed (2.12 is recommended)")]
    TooOld {
        /// Where.
        url: String,
        /// Its version.
        found: String,
    },
    /// JetStream is off, or not allowed for this account.
    #[error(
        "the NATS server at {url} has no JetStream for this account ({cause}); start it with `-js`, or enable JetStream in its configuration"
    )]
    NoJetStream {
        /// Where.
        url: String,
        /// What the server said.
        cause: String,
    },
    /// The credentials file is unusable.
    #[error("NATS credentials {path}: {cause}")]
    Credentials {
        /// Which file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// Streams or buckets could not be made, or are not as needed.
    #[error(transparent)]
    Topology(#[from] StreamError),
}

/// Connects, checks the server, and makes what is missing of the topology.
pub async fn connect(options: Options) -> Result<Streams, ConnectError> {
    let url = options.url.clone();
    let (losing, lost) = watch::channel(0);
    let mut nats = ConnectOptions::new()
        .name(&options.name)
        .custom_inbox_prefix(&options.inbox_prefix)
        .connection_timeout(Duration::from_secs(5))
        .ping_interval(Duration::from_secs(10))
        .reconnect_delay_callback(|attempts| Duration::from_millis(50 << attempts.min(5)))
        .event_callback(move |event| {
            if matches!(event, Event::Disconnected) {
                losing.send_modify(|times| *times += 1);
            }
            async move { note(&event) }
        });
    if let Some(path) = &options.credentials {
        let bad = |cause: std::io::Error| ConnectError::Credentials {
            path: path.clone(),
            cause: cause.to_string(),
        };
        let text = std::fs::read_to_string(path).map_err(bad)?;
        nats = nats.credentials(&text).map_err(bad)?;
    }
    let servers: Vec<&str> = options.url.split(',').map(str::trim).collect();
    let client = nats
        .connect(servers)
        .await
        .map_err(|error| ConnectError::Unreachable { url: url.clone(), cause: error.to_string() })?;
    if !client.is_server_compatible(SERVER_MIN.0, SERVER_MIN.1, 0) {
        return Err(ConnectError::TooOld { url, found: client.server_info().version });
    }
    let context = async_nats::jetstream::new(client.clone());
    context
        .query_account()
        .await
        .map_err(|error| ConnectError::NoJetStream { url, cause: error.to_string() })?;
    topology::ensure(&context, &options.limits).await?;
    Ok(JetStream { client, context, limits: options.limits, lost }.streams())
}

fn note(event: &Event) {
    match event {
        Event::Connected => tracing::info!("connected to NATS"),
        Event::Disconnected => tracing::warn!("lost the connection to NATS; reconnecting"),
        Event::SlowConsumer(_) => {
            tracing::warn!("live events came faster than they were read; reading the log instead");
        }
        other => tracing::debug!(event = %other, "NATS"),
    }
}
