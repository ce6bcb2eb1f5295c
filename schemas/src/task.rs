//! What lies in the queues: references to logs. A task carries no state of the request; whoever takes one
//! reads the log first, and continues from what it says.

use crate::ids::{GatewayId, ModelKey, RequestId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Which work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs prompts.
    Prefill,
    /// Owns requests and generates their tokens.
    Decode,
}

impl Role {
    /// As in subjects, consumer names and flags.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
        }
    }
}

/// Take this request, and see it to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecodeTask {
    /// Which request.
    pub request: RequestId,
    /// Whose log subject it has.
    pub gateway: GatewayId,
    /// Which model.
    pub model: ModelKey,
}

/// Run this request's prompt for the attempt that asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefillTask {
    /// Which request.
    pub request: RequestId,
    /// Whose log subject it has.
    pub gateway: GatewayId,
    /// Which model.
    pub model: ModelKey,
    /// The attempt that asked; if the log has a newer one, the task is void.
    pub attempt: u32,
}

/// A task that can be queued.
pub trait Task: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Which workers take it.
    const ROLE: Role;

    /// Which model's queue it goes to.
    fn model(&self) -> &ModelKey;

    /// Distinguishes it from every other task: a task published twice is queued once.
    fn dedup_id(&self) -> String;

    /// As MessagePack, fields by name.
    fn encode(&self) -> Vec<u8> {
        rmp_serde::to_vec_named(self).expect("plain data always encodes into memory")
    }

    /// From MessagePack.
    fn decode(bytes: &[u8]) -> Result<Self, rmp_serde::decode::Error> {
        rmp_serde::from_slice(bytes)
    }
}

impl Task for DecodeTask {
    const ROLE: Role = Role::Decode;

    fn model(&self) -> &ModelKey {
        &self.model
    }

    fn dedup_id(&self) -> String {
        format!("{}:d", self.request)
    }
}

impl Task for PrefillTask {
    const ROLE: Role = Role::Prefill;

    fn model(&self) -> &ModelKey {
        &self.model
    }

    fn dedup_id(&self) -> String {
        format!("{}:p:{}", self.request, self.attempt)
    }
}
