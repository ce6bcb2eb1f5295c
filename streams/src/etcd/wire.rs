//! What goes over the wire to etcd: its gRPC messages as JSON, where bytes are base64 and 64-bit numbers are strings.
//! <https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway/>

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Deserializer, de::Error};

/// Bytes as a request has them.
pub(super) fn encode(bytes: impl AsRef<[u8]>) -> String {
    BASE64_STANDARD.encode(bytes)
}

/// The end of the range of all keys that begin with a prefix: the prefix, its last byte one higher.
pub(super) fn range_end(prefix: &str) -> String {
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().expect("prefixes are not empty") += 1;
    encode(end)
}

fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    BASE64_STANDARD.decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
}

fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
}

/// What every answer begins with.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Header {
    /// Of the whole store.
    #[serde(default, deserialize_with = "number")]
    pub(super) revision: i64,
}

/// A key and its value; an empty value is left out.
#[derive(Debug, Deserialize)]
pub(super) struct KeyValue {
    #[serde(deserialize_with = "bytes")]
    pub(super) key: Vec<u8>,
    #[serde(default, deserialize_with = "bytes")]
    pub(super) value: Vec<u8>,
}

/// To `kv/range`.
#[derive(Debug, Deserialize)]
pub(super) struct Range {
    pub(super) header: Header,
    #[serde(default)]
    pub(super) kvs: Vec<KeyValue>,
}

/// To `lease/grant`.
#[derive(Debug, Deserialize)]
pub(super) struct Granted {
    /// Only ever handed back.
    #[serde(rename = "ID")]
    pub(super) id: String,
}

/// To `lease/keepalive`.
#[derive(Debug, Deserialize)]
pub(super) struct KeptAlive {
    pub(super) result: TimeToLive,
}

/// How long a lease goes on.
#[derive(Debug, Deserialize)]
pub(super) struct TimeToLive {
    /// Left out if the lease is not known (any more).
    #[serde(default, rename = "TTL", deserialize_with = "number")]
    pub(super) seconds: i64,
}

/// To `auth/authenticate`.
#[derive(Debug, Deserialize)]
pub(super) struct Authenticated {
    pub(super) token: String,
}

/// To what does not matter.
#[derive(Debug, Deserialize)]
pub(super) struct Done {}

/// A refusal. Older servers say it twice.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Refusal {
    pub(super) message: String,
}

/// One line of a watch.
#[derive(Debug, Deserialize)]
pub(super) struct WatchLine {
    #[serde(default)]
    pub(super) result: Option<Watched>,
}

/// What happened.
#[derive(Debug, Deserialize)]
pub(super) struct Watched {
    #[serde(default)]
    pub(super) created: bool,
    /// The server ends the watch: what it was to begin at was compacted, or there is no leader.
    #[serde(default)]
    pub(super) canceled: bool,
    #[serde(default)]
    pub(super) events: Vec<WatchEvent>,
}

/// A change of one key.
#[derive(Debug, Deserialize)]
pub(super) struct WatchEvent {
    /// `DELETE`, or left out.
    #[serde(default, rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) kv: KeyValue,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_etcd_says_is_read() {
        let range: Range = serde_json::from_str(
            r#"{"header":{"cluster_id":"3","revision":"4"},"kvs":[{"key":"L2E=","mod_revision":"4"}],"count":"1"}"#,
        )
        .unwrap();
        assert_eq!(
            (range.header.revision, &*range.kvs[0].key, &*range.kvs[0].value),
            (4, &b"/a"[..], &[][..])
        );
        let gone: KeptAlive = serde_json::from_str(r#"{"result":{"ID":"1234"}}"#).unwrap();
        assert_eq!(gone.result.seconds, 0);
        let line: WatchLine = serde_json::from_str(
            r#"{"result":{"header":{"revision":"3"},"events":[{"type":"DELETE","kv":{"key":"L2E="}}]}}"#,
        )
        .unwrap();
        assert_eq!(line.result.unwrap().events[0].kind.as_deref(), Some("DELETE"));
        let line: WatchLine =
            serde_json::from_str(r#"{"result":{"header":{},"canceled":true,"compact_revision":"4"}}"#)
                .unwrap();
        assert!(line.result.unwrap().canceled);
    }

    #[test]
    fn a_range_ends_after_all_keys_of_its_prefix() {
        assert_eq!(range_end("/forebay/config/"), encode("/forebay/config0"));
    }
}
