//! Which request an HTTP request is about: a fresh one, the one that its idempotency key names, or the one whose
//! stream it wants the rest of.

use crate::error::{ApiError, ErrorCode};
use axum::{
    http::{HeaderMap, HeaderName, HeaderValue},
    response::{IntoResponse, Response},
};
use forebay_schemas::ids::RequestId;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::str::FromStr;

/// Every answer carries its request's id, errors too: it finds the log.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const IDEMPOTENCY_KEY: &str = "idempotency-key";
const LAST_EVENT_ID: &str = "last-event-id";

/// Characters of an idempotency key.
const KEY_MAX: usize = 255;

/// A client's name for a request: asked again under the same one, it is the same request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key(String);

impl Key {
    /// The key in the headers, if there is one.
    pub(crate) fn of(headers: &HeaderMap) -> Result<Option<Key>, ApiError> {
        let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
        match value.to_str() {
            Ok(key) if (1..=KEY_MAX).contains(&key.len()) => Ok(Some(Key(key.to_owned()))),
            _ => {
                let message = format!("the Idempotency-Key must have 1 to {KEY_MAX} printable characters");
                Err(ApiError::of(ErrorCode::InvalidValue, "Idempotency-Key", message))
            }
        }
    }

    /// The request under this key, the same at every gateway. The key names another one after each that failed before
    /// anything was done for it.
    pub(crate) fn request(&self, failed_before: u32) -> RequestId {
        let mut digest = Sha256::new_with_prefix(&self.0);
        if failed_before > 0 {
            digest.update([0]);
            digest.update(failed_before.to_be_bytes());
        }
        let digest = digest.finalize();
        RequestId::from_digest(*digest.first_chunk().expect("SHA-256 has 32 bytes"))
    }
}

/// A digest of what is asked: the same for the same request, however its JSON was written.
pub(crate) fn fingerprint(endpoint: &str, request: &impl Serialize) -> String {
    let mut request = serde_json::to_value(request).expect("plain data always encodes into memory");
    request.sort_all_objects();
    let digest =
        Sha256::new_with_prefix(endpoint).chain_update([0]).chain_update(request.to_string()).finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A place in a stream: after the event with this id. Ids are `<request>/<sequence>`, with `.<part>` if one event of
/// the log makes several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) request: RequestId,
    /// Sequence in the log; in streams of responses, the `sequence_number`.
    pub(crate) seq: u64,
    pub(crate) part: u64,
}

impl Cursor {
    /// Where a client that lost its stream goes on, if it says so.
    pub(crate) fn of(headers: &HeaderMap) -> Result<Option<Cursor>, ApiError> {
        let Some(value) = headers.get(LAST_EVENT_ID).filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        Cursor::read("Last-Event-ID", value.to_str().unwrap_or_default()).map(Some)
    }

    /// The same, if it is a place in the stream of this request.
    pub(crate) fn within(self, request: RequestId) -> Result<Cursor, ApiError> {
        if self.request == request {
            return Ok(self);
        }
        let message = format!("the last event is of request {}, not of {request}", self.request);
        Err(ApiError::of(ErrorCode::InvalidValue, "Last-Event-ID", message))
    }

    /// From a named part of a request.
    pub(crate) fn read(param: &str, text: &str) -> Result<Cursor, ApiError> {
        text.parse().map_err(|NoCursor| {
            let message = format!("{param} is {text:?}; give the id of an event of this stream");
            ApiError::of(ErrorCode::InvalidValue, param, message)
        })
    }
}

/// A text that is no id of an event.
#[derive(Debug)]
pub(crate) struct NoCursor;

impl FromStr for Cursor {
    type Err = NoCursor;

    fn from_str(text: &str) -> Result<Cursor, NoCursor> {
        let (request, place) = text.split_once('/').ok_or(NoCursor)?;
        let (seq, part) = match place.split_once('.') {
            Some((seq, part)) => (seq, number(part)?),
            // The only part, or all of them.
            None => (place, u64::MAX),
        };
        Ok(Cursor { request: request.parse().map_err(|_| NoCursor)?, seq: number(seq)?, part })
    }
}

/// Digits and nothing else.
fn number(text: &str) -> Result<u64, NoCursor> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().map_err(|_| NoCursor)
    } else {
        Err(NoCursor)
    }
}

/// The answer to a request about the request that a path names.
pub(crate) async fn about(
    name: &str,
    answer: impl AsyncFnOnce(RequestId) -> Result<Response, ApiError>,
) -> Response {
    match name.parse() {
        Ok(id) => named(id, answer(id).await),
        Err(_) => {
            let message = format!("there is nothing with the id {name:?}; it is no id");
            ApiError::new(ErrorCode::RequestNotFound, message).into_response()
        }
    }
}

/// An answer with the id of the request that it is about.
pub(crate) fn named(id: RequestId, answer: Result<Response, ApiError>) -> Response {
    let mut response = answer.unwrap_or_else(IntoResponse::into_response);
    let value = HeaderValue::try_from(id.to_string()).expect("an id is hexadecimal");
    response.headers_mut().insert(REQUEST_ID, value);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_events_read_back() {
        let request = RequestId::from_digest([7; 16]);
        let read = |text: &str| format!("{request}/{text}").parse::<Cursor>().ok();
        assert_eq!(read("12.1"), Some(Cursor { request, seq: 12, part: 1 }));
        assert_eq!(read("12"), Some(Cursor { request, seq: 12, part: u64::MAX }));
        for bad in ["", "x", "-1", "+1", "1.", "1.x", "99999999999999999999"] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert!("12".parse::<Cursor>().is_err() && "nobody/12".parse::<Cursor>().is_err());
    }

    #[test]
    fn a_key_names_one_request_and_then_another() {
        let headers = |key: &str| {
            [(HeaderName::from_static(IDEMPOTENCY_KEY), key.parse().unwrap())].into_iter().collect()
        };
        let key = |text: &str| Key::of(&headers(text)).unwrap().unwrap();
        assert_eq!(key("a").request(0), key("a").request(0));
        assert_ne!(key("a").request(0), key("b").request(0));
        assert_ne!(key("a").request(0), key("a").request(1));
        assert_eq!(Key::of(&HeaderMap::new()), Ok(None));
        assert!(Key::of(&headers("")).is_err());
        assert!(Key::of(&headers(&"k".repeat(KEY_MAX + 1))).is_err());
    }

    #[test]
    fn the_same_request_has_the_same_fingerprint() {
        let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        let one = fingerprint("chat", &json(r#"{"a": 1, "b": 2}"#));
        assert_eq!(one, fingerprint("chat", &json(r#"{"b":2,"a":1}"#)));
        assert_ne!(one, fingerprint("chat", &json(r#"{"a": 1}"#)));
        assert_ne!(one, fingerprint("responses", &json(r#"{"a": 1, "b": 2}"#)));
    }
}
