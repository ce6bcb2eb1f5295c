//! What happens to a request. An event is a header and a body; bodies are past tense and permanent: a name is
//! never reused, fields are only added, a new meaning is a new version with an upcaster in [`crate::wire`].

use crate::{
    ids::{RequestId, WorkerId},
    kv::{KvHandle, LayoutHash},
    sampling::{Logprobs, OutputFormat, Sampling},
};
use serde::{Deserialize, Serialize};

/// One entry of a request's log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The request that the event belongs to.
    pub request: RequestId,
    /// Which attempt at the request it belongs to: 0 before the first `Claimed`, then counting up.
    pub attempt: u32,
    /// When it happened by its author's clock, in microseconds since the Unix epoch. For reading, not for
    /// ordering: the log orders.
    pub time_us: u64,
    /// What happened.
    #[serde(flatten)]
    pub body: Body,
}

/// What happened to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data")]
pub enum Body {
    /// A gateway took responsibility: from here on the request reaches exactly one terminal event.
    RequestAccepted(RequestAccepted),
    /// A decode worker took the request over. Everything that earlier attempts try to append is refused.
    Claimed(Claimed),
    /// The decode worker asked for a remote prefill.
    PrefillQueued(PrefillQueued),
    /// A prefill worker began.
    PrefillClaimed(PrefillClaimed),
    /// KV of a range of tokens is sealed and can be read.
    KvReady(KvReady),
    /// The remote prefill is done, and the first token is known.
    PrefillCompleted(PrefillCompleted),
    /// The decode worker has all KV in its own slot, checked.
    KvTransferred(KvTransferred),
    /// The KV could not be read or failed its check; the decode worker computes it itself.
    KvLost(KvLost),
    /// Tokens were generated.
    TokensGenerated(TokensGenerated),
    /// The decode worker gave the request back: another one goes on with it.
    Released(Released),
    /// Terminal: the answer is whole.
    RequestCompleted(RequestCompleted),
    /// Terminal: there will be no (further) answer.
    RequestFailed(RequestFailed),
    /// Terminal: the client no longer wants it.
    RequestCancelled(RequestCancelled),
}

/// Everything that is needed to run the request, on any worker, any number of times.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestAccepted {
    /// Model name as the client gave it.
    pub model: String,
    /// Endpoint that took it, such as `chat.completions`.
    pub endpoint: String,
    /// Token ids of the rendered prompt.
    pub prompt: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// At most this many tokens are generated.
    pub max_tokens: u32,
    /// Generation ends before the first of these in the text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Go on past the end-of-sequence token: for benchmarks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_eos: bool,
    /// Time to the terminal event, from this event's time, in milliseconds.
    pub timeout_ms: u64,
    /// It goes on when its client leaves: nobody cancels it but who asks for that by name.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detached: bool,
    /// The client wants to be able to ask for the answer later.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stored: bool,
    /// A digest of what was asked under a client's idempotency key: the same key with another one is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// Keeps this request's blocks apart from those of other salts: prefixes are only shared under equal salts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_salt: Option<String>,
    /// What the output must be; none: any text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<OutputFormat>,
    /// What the endpoint needs to show the request again, in its own form; nothing that a worker looks at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub echo: Option<serde_json::Value>,
}

impl RequestAccepted {
    /// A plain chat: greedy, with a minute to its end. For tools and tests.
    pub fn greedy(model: &str, prompt: Vec<u32>, max_tokens: u32) -> RequestAccepted {
        RequestAccepted {
            model: model.to_owned(),
            endpoint: "chat.completions".to_owned(),
            prompt,
            sampling: Sampling::GREEDY,
            max_tokens,
            stop: Vec::new(),
            ignore_eos: false,
            timeout_ms: 60_000,
            detached: false,
            stored: false,
            fingerprint: None,
            cache_salt: None,
            format: None,
            echo: None,
        }
    }
}

/// A decode worker's claim.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Claimed {
    /// Who claims.
    pub worker: WorkerId,
    /// Where the task's delivery is acknowledged: a watcher that sees the worker die sends `-NAK` there, and
    /// the task is redelivered at once.
    pub ack_subject: String,
    /// How often the task has been delivered, this time included.
    pub delivery: u64,
    /// What the worker runs, so that a replay can tell whether it runs the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineRef>,
}

/// What a worker runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineRef {
    /// Weights, architecture and precision, as a hash: equal hashes compute the same.
    pub layout_hash: LayoutHash,
    /// The same for people.
    pub weights: String,
}

/// A request for a remote prefill.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrefillQueued {
    /// Tokens to prefill: the prompt and, after a failover, what was generated before.
    pub tokens: u32,
    /// Why it is not done here, such as `prompt of 512 > max_local_prefill_length 128`.
    pub reason: String,
    /// Of these, the first so many are in the asking worker's slot already: KV is wanted from there on.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cached_tokens: u32,
    /// What the KV must mean to be of use. A prefill worker of another layout refuses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout_hash: Option<LayoutHash>,
    /// The KV of the cached tokens, sealed for the prefill worker, which needs it to compute the rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv: Option<KvHandle>,
}

/// A prefill worker's claim.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrefillClaimed {
    /// Who prefills.
    pub worker: WorkerId,
    /// As in [`Claimed`].
    pub ack_subject: String,
    /// As in [`Claimed`].
    pub delivery: u64,
}

/// Sealed KV.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvReady {
    /// Where it is.
    pub handle: KvHandle,
}

/// The end of a remote prefill.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrefillCompleted {
    /// Who did it.
    pub worker: WorkerId,
    /// Index of the token within the output: 0 unless an earlier attempt generated some.
    pub first_index: u32,
    /// The token drawn from the last position.
    pub token: u32,
    /// Text that the client may see now.
    pub text: String,
    /// Time that the computation took, in microseconds.
    pub compute_us: u64,
    /// Tokens whose KV was found in a prefix cache, the asking worker's or this one's.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cached_tokens: u32,
    /// How probable the token is, as in [`TokensGenerated`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Logprobs>,
}

/// A finished read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvTransferred {
    /// Bytes read.
    pub bytes: u64,
    /// Tokens whose KV was read.
    pub tokens: u32,
    /// Time that the read took, checks included, in microseconds.
    pub read_us: u64,
    /// How much later than the prefill it was over, in microseconds: the rest was read while the prefill went on.
    #[serde(default, skip_serializing_if = "is_none")]
    pub after_us: u64,
    /// Transport, such as `shm`.
    pub transport: String,
}

/// A failed read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvLost {
    /// What failed.
    pub reason: String,
}

/// New tokens, and the text that became certain with them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokensGenerated {
    /// Index of the first of them within the output.
    pub first_index: u32,
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Text that the client may see now. It can lag behind the tokens: half of a character, or the beginning
    /// of what may become a stop string, is held back.
    pub text: String,
    /// Tokens whose KV was found in the worker's prefix cache. Said once, with the first tokens of the answer.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cached_tokens: u32,
    /// If the request asks for it, how probable the tokens are, one for each: but for the token that ends the answer, which is no
    /// part of its text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<Logprobs>,
}

/// Why a request was given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseCause {
    /// The worker was told to stop.
    Drained,
    /// The attempt failed here; it may succeed elsewhere.
    Failed,
}

/// The end of an attempt, not of the request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Released {
    /// Who gives it back.
    pub worker: WorkerId,
    /// What kind of reason.
    pub cause: ReleaseCause,
    /// In words.
    pub reason: String,
    /// KV of the sequence from its first token on, sealed for whoever takes over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv: Option<KvHandle>,
    /// Tokens whose KV was found in a prefix cache, if no token was drawn yet that would say so.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cached_tokens: u32,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its turn, or a stop string appeared.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

/// Tokens counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated, an end-of-sequence token included.
    pub completion_tokens: u32,
    /// Tokens of the prompt whose KV was found in a prefix cache.
    #[serde(default)]
    pub cached_tokens: u32,
}

/// The successful end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestCompleted {
    /// Why it ended.
    pub reason: FinishReason,
    /// Tokens counted.
    pub usage: Usage,
}

/// What kind of failure ended a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// No terminal event within the request's `timeout_ms`.
    DeadlineExceeded,
    /// The queue took no task after the request was accepted.
    QueueUnavailable,
    /// The task failed as often as it may.
    TooManyAttempts,
    /// No worker of this model can run the request, such as one with a longer prompt than its slots.
    Unservable,
    /// The engine failed.
    EngineFailed,
}

/// The unsuccessful end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestFailed {
    /// What kind.
    pub code: FailureCode,
    /// In words, for the client.
    pub message: String,
}

/// The unwanted end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestCancelled {
    /// What cancelled it, such as `client disconnected`.
    pub cause: String,
}

/// By reference: what serde asks for.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// As above.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_none(time_us: &u64) -> bool {
    *time_us == 0
}

impl Body {
    /// The names of all events, in the order of a request's life.
    pub const NAMES: [&'static str; 13] = [
        "RequestAccepted",
        "Claimed",
        "PrefillQueued",
        "PrefillClaimed",
        "KvReady",
        "PrefillCompleted",
        "KvTransferred",
        "KvLost",
        "TokensGenerated",
        "Released",
        "RequestCompleted",
        "RequestFailed",
        "RequestCancelled",
    ];

    /// The name of the event, as in its header.
    pub fn name(&self) -> &'static str {
        match self {
            Body::RequestAccepted(_) => "RequestAccepted",
            Body::Claimed(_) => "Claimed",
            Body::PrefillQueued(_) => "PrefillQueued",
            Body::PrefillClaimed(_) => "PrefillClaimed",
            Body::KvReady(_) => "KvReady",
            Body::PrefillCompleted(_) => "PrefillCompleted",
            Body::KvTransferred(_) => "KvTransferred",
            Body::KvLost(_) => "KvLost",
            Body::TokensGenerated(_) => "TokensGenerated",
            Body::Released(_) => "Released",
            Body::RequestCompleted(_) => "RequestCompleted",
            Body::RequestFailed(_) => "RequestFailed",
            Body::RequestCancelled(_) => "RequestCancelled",
        }
    }

    /// Whether nothing may follow.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Body::RequestCompleted(_) | Body::RequestFailed(_) | Body::RequestCancelled(_))
    }
}
