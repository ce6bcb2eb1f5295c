//! What gateways know of models and workers.

use crate::{
    ids::{ModelKey, WorkerId},
    kv::LayoutHash,
    task::Role,
};
use serde::{Deserialize, Serialize};

/// A served model, as its workers publish it. It outlives them: a model scaled to zero is still listed, and
/// requests for it wait for a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    /// The name that clients use.
    pub name: String,
    /// The name in subjects.
    pub key: ModelKey,
    /// When it was first published, in seconds since the Unix epoch.
    pub created_s: u64,
    /// Token ids below this exist.
    pub vocab_size: u32,
    /// Most tokens of prompt and answer together.
    pub context_tokens: u32,
    /// Token ids that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// The tokenizer (`tokenizer.json`), by digest in the blob store.
    pub tokenizer: BlobRef,
    /// The chat template, in Jinja.
    pub chat_template: Option<String>,
    /// Text of the special tokens that a template may name (`bos_token`, `eos_token` …).
    pub special_tokens: Vec<(String, String)>,
    /// Sampling where the client says nothing, from `generation_config.json`.
    pub defaults: SamplingDefaults,
    /// Meaning of KV bytes; see [`LayoutHash`].
    pub layout_hash: LayoutHash,
    /// The weights as they are run, such as `int4/32`.
    pub weights: String,
}

/// Sampling parameters where the client gives none.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingDefaults {
    /// See [`crate::sampling::Sampling`].
    pub temperature: f32,
    /// See [`crate::sampling::Sampling`].
    pub top_p: f32,
    /// See [`crate::sampling::Sampling`].
    pub top_k: u32,
    /// See [`crate::sampling::Sampling`].
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    /// OpenAI's.
    fn default() -> SamplingDefaults {
        SamplingDefaults { temperature: 1.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0 }
    }
}

/// A reference to bytes in the blob store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlobRef {
    /// Object name: a digest of the content.
    pub name: String,
    /// Size.
    pub bytes: u64,
}

/// A living worker, as it says of itself in its lease.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerLease {
    /// Who.
    pub worker: WorkerId,
    /// Which life.
    pub incarnation: u64,
    /// What it does.
    pub role: Role,
    /// For which model.
    pub model: ModelKey,
    /// What its KV means.
    pub layout_hash: LayoutHash,
    /// Sequences that it can hold.
    pub slots: u32,
    /// Of these, how many are free.
    pub free_slots: u32,
    /// Host and boot id: equal ids share memory.
    pub host: String,
    /// Unix socket where peers on the same host get its region.
    pub kv_socket: String,
    /// Where peers on other hosts read its KV over TCP, as `address:port`, if it serves them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_tcp: Option<String>,
    /// It introduces its NIXL agent to who asks there, so that its KV can be read over `nixl` too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kv_nixl: bool,
    /// Tokens whose KV its running sequences hold.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub active_tokens: u32,
    /// Tokens of prompts that it has taken and not run yet.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub prefill_tokens: u32,
    /// It was told to stop, and takes nothing new.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// Slots whose KV is sealed for others and not released yet.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub kv_leases: u32,
    /// It takes tasks from a queue of its own too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_queue: bool,
}

impl WorkerLease {
    /// The lease of a worker that holds nothing, has room for nothing and can't be reached: to be filled in.
    pub fn of(worker: WorkerId, role: Role, model: ModelKey) -> WorkerLease {
        WorkerLease {
            worker,
            incarnation: 0,
            role,
            model,
            layout_hash: LayoutHash(0),
            slots: 0,
            free_slots: 0,
            host: String::new(),
            kv_socket: String::new(),
            kv_tcp: None,
            kv_nixl: false,
            active_tokens: 0,
            prefill_tokens: 0,
            draining: false,
            kv_leases: 0,
            own_queue: false,
        }
    }
}

fn one() -> f32 {
    1.0
}

fn is_one(number: &f32) -> bool {
    *number == 1.0
}

/// By reference: what serde asks for.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}
