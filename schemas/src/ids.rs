//! Names of requests, workers and gateways.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use uuid::Uuid;

/// A request: a UUIDv7, so that ids sort by time of acceptance, or a UUIDv8 if the client's idempotency key decides.
/// Shown without dashes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(Uuid);

impl RequestId {
    /// A fresh id for a request accepted now.
    pub fn new() -> RequestId {
        RequestId(Uuid::now_v7())
    }

    /// An id from parts: milliseconds since the Unix epoch and 74 bits of randomness, for simulations.
    pub fn from_parts(unix_ms: u64, random: &[u8; 10]) -> RequestId {
        RequestId(uuid::Builder::from_unix_timestamp_millis(unix_ms, random).into_uuid())
    }

    /// The id that follows from a digest, the same at every gateway: of its 128 bits, 122 count.
    pub fn from_digest(digest: [u8; 16]) -> RequestId {
        RequestId(uuid::Builder::from_custom_bytes(digest).into_uuid())
    }
}

impl Default for RequestId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.simple())
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A text that is no id of the kind asked for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is no {what}: {expected}")]
pub struct BadId {
    text: String,
    what: &'static str,
    expected: &'static str,
}

impl FromStr for RequestId {
    type Err = BadId;

    /// Takes the bare id, with or without dashes, and OpenAI's forms of it (`chatcmpl-…`, `resp_…`).
    fn from_str(text: &str) -> Result<Self, BadId> {
        let bare = ["chatcmpl-", "resp_"].iter().find_map(|prefix| text.strip_prefix(prefix)).unwrap_or(text);
        Uuid::try_parse(bare).map(RequestId).map_err(|_| BadId {
            text: text.to_owned(),
            what: "request id",
            expected: "32 hexadecimal digits, as in chatcmpl-01997a5ce2b47d0c8e3f0f8ddc0c6a11",
        })
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks that the text can stand as one token of a NATS subject: 1 to 64 of `A-Z a-z 0-9 - _`.
            pub fn new(text: impl Into<String>) -> Result<Self, BadId> {
                let text = text.into();
                let fits = (1..=64).contains(&text.len())
                    && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
                if fits { Ok(Self(text)) } else {
                    Err(BadId { text, what: $what, expected: "1 to 64 letters, digits, '-' or '_'" })
                }
            }

            /// A fresh name: the prefix and eight random hexadecimal digits.
            pub fn random(prefix: &str) -> Self {
                let low = Uuid::new_v4().as_u128() as u32;
                Self::new(format!("{prefix}-{low:08x}")).expect("prefix fits a subject token")
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadId;
            fn try_from(text: String) -> Result<Self, BadId> {
                Self::new(text)
            }
        }

        impl FromStr for $name {
            type Err = BadId;
            fn from_str(text: &str) -> Result<Self, BadId> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// One life of one worker process.
    WorkerId, "worker id"
);
name!(
    /// A gateway: the middle token of a request's log subject, so that one subscription brings a gateway
    /// the events of all requests that it answers.
    GatewayId, "gateway id"
);
name!(
    /// A served model's name made fit for subjects and consumer names; see [`ModelKey::of`].
    ModelKey, "model key"
);

impl ModelKey {
    /// Derives the key from the name that clients use: other characters become `-`. Names that are changed by
    /// that get a hash at the end, so that different names keep different keys.
    pub fn of(model: &str) -> ModelKey {
        if let Ok(key) = ModelKey::new(model) {
            return key;
        }
        let mut text: String = model
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' })
            .take(48)
            .collect();
        text.push_str(&format!("-{:08x}", fnv1a(model.as_bytes()) as u32));
        ModelKey::new(text).expect("characters were replaced and the length was cut")
    }
}

/// FNV-1a, 64 bits (<http://www.isthe.com/chongo/tech/comp/fnv/>): stable across builds and platforms, for
/// hashes that are stored or sent.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_read_back_in_every_form() {
        let id = RequestId::new();
        let text = id.to_string();
        assert_eq!(text.len(), 32);
        assert_eq!(text.parse::<RequestId>().unwrap(), id);
        assert_eq!(format!("chatcmpl-{text}").parse::<RequestId>().unwrap(), id);
        assert_eq!(format!("resp_{text}").parse::<RequestId>().unwrap(), id);
        assert!("chatcmpl-xyz".parse::<RequestId>().is_err());
    }

    #[test]
    fn a_digest_is_an_id_of_its_own_version() {
        let id = RequestId::from_digest([0xff; 16]);
        assert_eq!(id.to_string(), "ffffffffffff8fffbfffffffffffffff");
        assert_eq!(id, RequestId::from_digest([0xff; 16]));
    }

    #[test]
    fn model_keys_fit_subjects_and_stay_apart() {
        assert_eq!(ModelKey::of("demo").as_str(), "demo");
        let (a, b) = (ModelKey::of("Qwen/Qwen3-0.6B"), ModelKey::of("Qwen/Qwen3-0-6B"));
        assert_ne!(a, b);
        assert!(a.as_str().starts_with("Qwen-Qwen3-0-6B-"));
        assert!(GatewayId::new("a.b").is_err());
    }
}
