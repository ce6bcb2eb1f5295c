//! From what is asked to a request under way, whichever endpoint took it: validate → admit → render and tokenize →
//! begin its log and queue it. If its idempotency key was seen before, it is under way already.

use crate::{
    Shared,
    error::{ApiError, ErrorCode},
    identity::Key,
    running::{NotStarted, Opened, Running, queue},
    validate,
};
use forebay_schemas::{
    event::{FailureCode, RequestAccepted},
    ids::RequestId,
    lifecycle::Phase,
    openai::ChatRequest,
};
use forebay_streams::environment;
use serde_json::{Map, Value};
use std::{sync::Arc, time::Instant};

/// How often a key may name another request because the one before failed unheard.
const RESTARTS_MAX: u32 = 16;

/// The field of a request's echo with what `system_fingerprint` says.
pub(crate) const SYSTEM_FINGERPRINT: &str = "system_fingerprint";

/// What is asked.
pub(crate) struct Asked {
    /// As the log says it.
    pub(crate) endpoint: &'static str,
    pub(crate) request: Arc<ChatRequest>,
    /// It goes on when its client leaves.
    pub(crate) detached: bool,
    /// Its answer can be asked for later.
    pub(crate) stored: bool,
    /// What the endpoint needs to show it again.
    pub(crate) echo: Map<String, Value>,
    /// The client's key, and a digest of what it asked under it.
    pub(crate) key: Option<(Key, String)>,
}

/// Begins what is asked, or reads what was begun under its key. `id` becomes that of the request.
pub(crate) async fn begin(
    gateway: &Arc<Shared>,
    id: &mut RequestId,
    asked: Asked,
    began: Instant,
) -> Result<Running, ApiError> {
    if let Some((key, fingerprint)) = &asked.key {
        let (request, known) = look_up(gateway, key).await?;
        *id = request;
        if let Some(known) = known {
            return again(gateway, known, fingerprint).await;
        }
    }
    let model = gateway.models.get(&asked.request.model).await?;
    let params = validate::params(&asked.request, &model.card, drawn_seed())?;
    gateway.room.check()?;
    let permit = gateway.admission.admit()?;
    params.check_format().await?;
    let prompt = model.prompt(&asked.request).await?;
    let Asked { endpoint, detached, stored, mut echo, key, .. } = asked;
    let fingerprint = key.map(|(_, fingerprint)| fingerprint);
    echo.insert(SYSTEM_FINGERPRINT.to_owned(), model.fingerprint.as_str().into());
    let accepted = RequestAccepted {
        endpoint: endpoint.to_owned(),
        detached,
        stored,
        fingerprint: fingerprint.clone(),
        echo: Some(Value::Object(echo)),
        ..params.accept(&model.card, prompt, gateway.config.request_timeout)?
    };
    match (Running::start(gateway, &model, *id, accepted, permit, began).await, fingerprint) {
        (Ok(running), _) => Ok(running),
        (Err(NotStarted::Refused(error)), _) => Err(error),
        // Another gateway, or this one, was asked the same at the same time.
        (Err(NotStarted::Taken), Some(fingerprint)) => match Opened::find_begun(gateway, *id).await? {
            Some(known) => again(gateway, known, &fingerprint).await,
            None => Err(taken()),
        },
        (Err(NotStarted::Taken), None) => Err(taken()),
    }
}

/// The request that a key names, and its log if it was begun.
async fn look_up(gateway: &Shared, key: &Key) -> Result<(RequestId, Option<Opened>), ApiError> {
    let mut request = key.request(0);
    for failed_before in 1..=RESTARTS_MAX {
        let known = Opened::find(gateway, request).await?;
        let unheard = |known: &Opened| {
            known.state.failure.as_ref().is_some_and(|failed| failed.code == FailureCode::QueueUnavailable)
        };
        if !known.as_ref().is_some_and(unheard) {
            return Ok((request, known));
        }
        // Its client was told to try again, and does.
        request = key.request(failed_before);
    }
    Ok((request, Opened::find(gateway, request).await?))
}

/// Reads a request that is asked again.
async fn again(gateway: &Arc<Shared>, known: Opened, fingerprint: &str) -> Result<Running, ApiError> {
    if known.accepted().fingerprint.as_deref() != Some(fingerprint) {
        let message = "another request was sent under this Idempotency-Key; send this one under another key";
        return Err(ApiError::of(ErrorCode::IdempotencyKeyReused, "Idempotency-Key", message));
    }
    // Perhaps its gateway died before it could.
    if known.state.phase == Phase::Queued && known.state.attempt == 0 {
        queue(gateway, &known.log, known.accepted()).await.map_err(|error| ApiError::from(&error))?;
    }
    Running::attach(gateway, known).await
}

fn taken() -> ApiError {
    ApiError::new(ErrorCode::Internal, "the request's id is taken; try again")
}

/// A seed for a client that gave none: in the log, and small enough to be sent as `seed` to repeat the answer.
fn drawn_seed() -> u64 {
    environment::random() >> 11
}
