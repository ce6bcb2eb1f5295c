//! Calls to etcd over its HTTP gateway: whichever server of the cluster answers, and with a token if it wants one.

use super::wire::{Authenticated, Refusal};
use crate::StreamError;
use reqwest::{Response, StatusCode, header::AUTHORIZATION};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// How long a server may take to take a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(700);

/// How long one call may take: less than the time of the shortest lease.
const CALL_TIMEOUT: Duration = Duration::from_millis(1500);

/// A watch is silent while nothing changes; so the kernel asks whether its server is still there.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Has etcd end a watch at a server that has lost the others, and would tell of no change.
const HAS_LEADER: &str = "Grpc-Metadata-hasleader";

/// Where etcd is, and who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// Such as `http://127.0.0.1:2379`, one for each server.
    pub(super) servers: Vec<String>,
    /// User and password.
    pub(super) user: Option<(String, String)>,
}

/// A connection to etcd.
pub(super) struct Client {
    http: reqwest::Client,
    address: Address,
    /// The server that answered last.
    current: AtomicUsize,
    token: Mutex<Option<String>>,
}

/// Why a call has no answer.
enum CallError {
    /// The server was not reached, or did not answer: another one may.
    Unreachable(String),
    /// It does not know the token (any more).
    Unauthorized(String),
    /// It answers, and refuses.
    Refused(String),
}

impl From<reqwest::Error> for CallError {
    fn from(error: reqwest::Error) -> CallError {
        // The cause says more than the outermost error.
        let mut cause: &dyn std::error::Error = &error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        CallError::Unreachable(cause.to_string())
    }
}

impl Client {
    pub(super) fn new(address: Address) -> Result<Client, StreamError> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_keepalive(KEEPALIVE)
            .tcp_keepalive_interval(KEEPALIVE)
            .tcp_keepalive_retries(2)
            .build()
            .map_err(|error| StreamError::new("making an HTTP client", error))?;
        Ok(Client { http, address, current: AtomicUsize::new(0), token: Mutex::default() })
    }

    /// One call and its answer.
    pub(super) async fn call<T: DeserializeOwned>(
        &self,
        what: &str,
        path: &str,
        body: Value,
    ) -> Result<T, StreamError> {
        let response = self.ask(what, path, &body, Some(CALL_TIMEOUT)).await?;
        let answer = response.bytes().await.map_err(|error| StreamError::new(what, error))?;
        serde_json::from_slice(&answer).map_err(|error| StreamError::new(what, error))
    }

    /// Begins a watch, whose lines are then read.
    pub(super) async fn watch(&self, what: &str, body: Value) -> Result<Response, StreamError> {
        self.ask(what, "watch", &body, None).await
    }

    /// Asks one server after the other, beginning with the one that answered last. A token that is not known any more
    /// is replaced once.
    async fn ask(
        &self,
        what: &str,
        path: &str,
        body: &Value,
        timeout: Option<Duration>,
    ) -> Result<Response, StreamError> {
        let servers = &self.address.servers;
        let first = self.current.load(Ordering::Relaxed);
        let mut errors = Vec::new();
        for offset in 0..servers.len() {
            let index = (first + offset) % servers.len();
            let server = &servers[index];
            let mut answer = self.post_authorized(server, path, body, timeout).await;
            if let Err(CallError::Unauthorized(_)) = answer {
                *self.token() = None;
                answer = self.post_authorized(server, path, body, timeout).await;
            }
            match answer {
                Ok(response) => {
                    self.current.store(index, Ordering::Relaxed);
                    return Ok(response);
                }
                Err(CallError::Unreachable(cause)) => errors.push(format!("{server}: {cause}")),
                Err(CallError::Unauthorized(cause) | CallError::Refused(cause)) => {
                    return Err(StreamError::new(what, cause));
                }
            }
        }
        Err(StreamError::new(what, errors.join("; ")))
    }

    async fn post_authorized(
        &self,
        server: &str,
        path: &str,
        body: &Value,
        timeout: Option<Duration>,
    ) -> Result<Response, CallError> {
        if let Some((name, password)) = &self.address.user {
            let authorized = self.token().is_some();
            if !authorized {
                let body = json!({ "name": name, "password": password });
                let answer = self.post(server, "auth/authenticate", &body, Some(CALL_TIMEOUT)).await?;
                let authenticated: Authenticated = answer.json().await?;
                *self.token() = Some(authenticated.token);
            }
        }
        self.post(server, path, body, timeout).await
    }

    fn token(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.token.lock().expect("no panics while held")
    }

    async fn post(
        &self,
        server: &str,
        path: &str,
        body: &Value,
        timeout: Option<Duration>,
    ) -> Result<Response, CallError> {
        let mut request = self.http.post(format!("{server}/v3/{path}")).header(HAS_LEADER, "true").json(body);
        if let Some(token) = &*self.token() {
            request = request.header(AUTHORIZATION, token);
        }
        if let Some(timeout) = timeout {
            request = request.timeout(timeout);
        }
        // Without a time-out of its own, what follows the beginning of the answer may take for ever.
        let begun = tokio::time::timeout(CALL_TIMEOUT, request.send()).await;
        let response = begun.map_err(|_| CallError::Unreachable("no answer in time".into()))??;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        let refusal: Refusal = serde_json::from_str(&text).unwrap_or_default();
        let cause = if refusal.message.is_empty() { format!("it answers {status}") } else { refusal.message };
        Err(match status {
            StatusCode::UNAUTHORIZED => CallError::Unauthorized(cause),
            // It has no leader, or is about to stop.
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => CallError::Unreachable(cause),
            _ => CallError::Refused(cause),
        })
    }
}
