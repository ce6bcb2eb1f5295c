//! The backend that is deployed: NATS with JetStream.

mod bucket;
mod cache_events;
mod catalog;
mod connect;
mod dead_letters;
mod ledger;
mod log;
mod own_queues;
mod registry;
mod settings;
mod tasks;
mod topology;

pub use connect::{ConnectError, Options, connect};
pub use topology::{Limits, consumer_name, queue_stream};

use crate::{StreamError, Streams};
use async_nats::{Client, HeaderMap, Request, client::RequestErrorKind, jetstream::Context};
use bytes::Bytes;
use serde::Deserialize;
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

/// Time that one request to the server may take. A server that restarts within it is waited for.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The JetStream implementation of all faces.
pub(crate) struct JetStream {
    client: Client,
    context: Context,
    limits: Limits,
    /// How often the connection was lost.
    lost: watch::Receiver<u64>,
}

impl JetStream {
    fn streams(self) -> Streams {
        let shared = Arc::new(self);
        Streams {
            log: shared.clone(),
            tasks: shared.clone(),
            own_queues: shared.clone(),
            cache_events: shared.clone(),
            dead_letters: shared.clone(),
            catalog: shared.clone(),
            registry: shared.clone(),
            settings: shared,
        }
    }

    /// Resolves when the connection breaks: an answer that is outstanding then will not come.
    fn connection_lost(&self) -> impl Future<Output = ()> + Send + use<> {
        lost_from(&self.lost)
    }

    /// Publishes into a stream and returns the sequence that it was stored at.
    async fn publish(
        &self,
        subject: String,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<u64, PublishError> {
        let request = Request::new().headers(headers).payload(payload).timeout(Some(REQUEST_TIMEOUT));
        let lost = self.connection_lost();
        let reply = tokio::select! {
            biased;
            reply = self.client.send_request(subject, request) => reply,
            () = lost => return Err(PublishError::Unknown(LOST.into())),
        };
        let reply = reply.map_err(|error| match error.kind() {
            // Nothing was sent, or no stream listens (the server is starting): certainly not stored.
            RequestErrorKind::NoResponders | RequestErrorKind::InvalidSubject => {
                PublishError::NotStored(error.to_string())
            }
            RequestErrorKind::MaxPayloadExceeded => PublishError::TooLarge,
            _ => PublishError::Unknown(error.to_string()),
        })?;
        let ack: PublishAck = serde_json::from_slice(&reply.payload)
            .map_err(|error| PublishError::Unknown(error.to_string()))?;
        match ack.error {
            Some(error) => {
                Err(PublishError::Refused { code: error.err_code, description: error.description })
            }
            None => Ok(ack.seq),
        }
    }
}

/// Resolves when the connection breaks after this call.
fn lost_from(lost: &watch::Receiver<u64>) -> impl Future<Output = ()> + Send + use<> {
    let mut lost = lost.clone();
    lost.mark_unchanged();
    async move {
        if lost.changed().await.is_err() {
            // The client itself is gone, and says so by itself.
            std::future::pending::<()>().await;
        }
    }
}

/// What a request says whose answer will not come any more.
const LOST: &str = "the connection was lost";

/// The server's answer to a publish.
#[derive(Deserialize)]
struct PublishAck {
    #[serde(default)]
    seq: u64,
    error: Option<ApiError>,
}

/// An error of the JetStream API.
#[derive(Deserialize)]
struct ApiError {
    #[serde(default)]
    err_code: u32,
    #[serde(default)]
    description: String,
}

/// Why a publish has no sequence.
enum PublishError {
    /// The server refused, with its error code.
    Refused { code: u32, description: String },
    /// The message was certainly not stored.
    NotStored(String),
    /// The server takes no message of this size.
    TooLarge,
    /// No answer: it may be stored.
    Unknown(String),
}

impl PublishError {
    /// In words, where all that counts is that it was not stored, or perhaps not.
    fn cause(self) -> String {
        match self {
            PublishError::Refused { code, description } => format!("{description} ({code})"),
            PublishError::NotStored(cause) | PublishError::Unknown(cause) => cause,
            PublishError::TooLarge => "larger than the server takes".to_owned(),
        }
    }
}

/// The last sequence of the subject is another than expected (and two codes of clustered servers for the same).
const WRONG_LAST_SEQUENCE: [u32; 3] = [10071, 10163, 10164];

/// The stream is full: maximum messages, bytes, messages per subject, or storage exceeded.
const FULL: [u32; 4] = [10077, 10047, 10023, 10122];

/// A header's text.
fn header<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    headers?.get(name).map(|value| value.as_str())
}

/// A header's number.
fn header_number(headers: Option<&HeaderMap>, name: &str) -> Option<u64> {
    header(headers, name)?.parse().ok()
}

/// An error of a named operation.
fn failed<E: std::fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> StreamError {
    let what = what.into();
    move |error| StreamError::new(what, error)
}
