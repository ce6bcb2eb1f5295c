//! Events as bytes: a MessagePack map with the header, then a MessagePack map with the body, fields by name.
//!
//! The header carries the type's name and version, so a reader knows what it can't read before it tries.
//! Unknown fields are skipped; an unknown type or version is an error, so that no projection silently misses
//! something that it does not understand.

use crate::{
    event::{Body, Event},
    ids::RequestId,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Why bytes are no event.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The header is no MessagePack map with the fields of a header.
    #[error("unreadable event header: {0}")]
    Header(#[source] rmp_serde::decode::Error),
    /// An event of a newer Forebay.
    #[error("event type {name} version {version} is not known here: this build is older than the writer's")]
    Unknown {
        /// Type in the header.
        name: String,
        /// Version in the header.
        version: u16,
    },
    /// The body does not fit its type.
    #[error("unreadable {name} version {version}: {source}")]
    Body {
        /// Type in the header.
        name: String,
        /// Version in the header.
        version: u16,
        /// What does not fit.
        source: rmp_serde::decode::Error,
    },
}

#[derive(Serialize, Deserialize)]
struct Header<'a> {
    #[serde(rename = "type", borrow)]
    name: &'a str,
    version: u16,
    request: RequestId,
    attempt: u32,
    time_us: u64,
}

/// The newest version of an event's type: what is written today.
pub fn version(_body: &Body) -> u16 {
    1
}

/// Encodes an event, in the newest version of its type.
pub fn encode(event: &Event) -> Vec<u8> {
    let header = Header {
        name: event.body.name(),
        version: version(&event.body),
        request: event.request,
        attempt: event.attempt,
        time_us: event.time_us,
    };
    let mut bytes = Vec::with_capacity(192);
    put(&mut bytes, &header);
    match &event.body {
        Body::RequestAccepted(body) => put(&mut bytes, body),
        Body::Claimed(body) => put(&mut bytes, body),
        Body::PrefillQueued(body) => put(&mut bytes, body),
        Body::PrefillClaimed(body) => put(&mut bytes, body),
        Body::KvReady(body) => put(&mut bytes, body),
        Body::PrefillCompleted(body) => put(&mut bytes, body),
        Body::KvTransferred(body) => put(&mut bytes, body),
        Body::KvLost(body) => put(&mut bytes, body),
        Body::TokensGenerated(body) => put(&mut bytes, body),
        Body::Released(body) => put(&mut bytes, body),
        Body::RequestCompleted(body) => put(&mut bytes, body),
        Body::RequestFailed(body) => put(&mut bytes, body),
        Body::RequestCancelled(body) => put(&mut bytes, body),
    }
    bytes
}

fn put(bytes: &mut Vec<u8>, value: &impl Serialize) {
    rmp_serde::encode::write_named(bytes, value).expect("plain data always encodes into memory");
}

/// Decodes an event of any version that this build knows; older versions are brought up to the newest.
pub fn decode(bytes: &[u8]) -> Result<Event, DecodeError> {
    let mut reader = rmp_serde::Deserializer::from_read_ref(bytes);
    let header = Header::deserialize(&mut reader).map_err(DecodeError::Header)?;
    let Header { name, version, request, attempt, time_us } = header;
    let body = match (name, version) {
        ("RequestAccepted", 1) => Body::RequestAccepted(take(reader, name, version)?),
        ("Claimed", 1) => Body::Claimed(take(reader, name, version)?),
        ("PrefillQueued", 1) => Body::PrefillQueued(take(reader, name, version)?),
        ("PrefillClaimed", 1) => Body::PrefillClaimed(take(reader, name, version)?),
        ("KvReady", 1) => Body::KvReady(take(reader, name, version)?),
        ("PrefillCompleted", 1) => Body::PrefillCompleted(take(reader, name, version)?),
        ("KvTransferred", 1) => Body::KvTransferred(take(reader, name, version)?),
        ("KvLost", 1) => Body::KvLost(take(reader, name, version)?),
        ("TokensGenerated", 1) => Body::TokensGenerated(take(reader, name, version)?),
        ("Released", 1) => Body::Released(take(reader, name, version)?),
        ("RequestCompleted", 1) => Body::RequestCompleted(take(reader, name, version)?),
        ("RequestFailed", 1) => Body::RequestFailed(take(reader, name, version)?),
        ("RequestCancelled", 1) => Body::RequestCancelled(take(reader, name, version)?),
        _ => return Err(DecodeError::Unknown { name: name.to_owned(), version }),
    };
    Ok(Event { request, attempt, time_us, body })
}

fn take<'de, T: DeserializeOwned>(
    mut reader: rmp_serde::Deserializer<rmp_serde::decode::ReadRefReader<'de, [u8]>>,
    name: &str,
    version: u16,
) -> Result<T, DecodeError> {
    T::deserialize(&mut reader).map_err(|source| DecodeError::Body { name: name.to_owned(), version, source })
}
