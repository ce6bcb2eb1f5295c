//! What an owner says of its region to whoever connects.

use forebay_schemas::{
    ids::WorkerId,
    kv::{KvHandle, KvLayout, LayoutHash},
};
use serde::{Deserialize, Serialize};

/// A greeting is a small JSON object.
pub(super) const GREETING_MAX: usize = 4096;

/// Who an owner is, and how its bytes lie. A reader compares it with its handle's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Greeting {
    pub(super) worker: WorkerId,
    pub(super) incarnation: u64,
    pub(super) layout: KvLayout,
    pub(super) layout_hash: LayoutHash,
}

impl Greeting {
    /// What the owner of a handle's bytes says.
    pub(super) fn of(handle: &KvHandle) -> Greeting {
        Greeting {
            worker: handle.agent.clone(),
            incarnation: handle.incarnation,
            layout: handle.layout,
            layout_hash: handle.layout_hash,
        }
    }
}
