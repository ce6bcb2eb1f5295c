//! What was written stays readable: the bytes of every version of every event, task and registry entry are frozen
//! in `golden/`, and must decode to today's values and, for the newest version, be what is written today.
//!
//! A new event or version needs a new file: `FOREBAY_WRITE_GOLDEN=1 cargo test -p forebay-schemas --test golden`
//! writes the files that are missing and never touches one that is there.

use forebay_schemas::{
    cache::BlockHash,
    cache_event::{CacheChange, CacheEvent},
    card::{BlobRef, ModelCard, SamplingDefaults, WorkerLease},
    event::{
        Body, Claimed, EngineRef, Event, FailureCode, FinishReason, KvLost, KvReady, KvTransferred,
        PrefillClaimed, PrefillCompleted, PrefillQueued, ReleaseCause, Released, RequestAccepted,
        RequestCancelled, RequestCompleted, RequestFailed, TokensGenerated, Usage,
    },
    ids::{GatewayId, ModelKey, RequestId, WorkerId},
    kv::{KvDtype, KvGeometry, KvHandle, KvLayout, LayoutHash, TokenRange},
    sampling::{Logprobs, OutputFormat, Sampling, TokenLogprob},
    task::{DecodeTask, PrefillTask, Role, Task},
    wire::{self, DecodeError},
};
use serde::Serialize;
use std::{fmt::Write, path::PathBuf};

/// One body of every kind. The match makes a new kind fail to compile here until it has one, and then, with no
/// file, fail the tests.
macro_rules! every_body {
    ($($kind:ident $fields:tt),* $(,)?) => {
        fn every_body() -> Vec<Body> {
            let bodies = vec![$(Body::$kind($kind $fields)),*];
            for body in &bodies {
                match body { $(Body::$kind(_) => assert_eq!(body.name(), stringify!($kind)),)* }
            }
            bodies
        }
    };
}

every_body! {
    RequestAccepted {
        model: "Qwen/Qwen3-0.6B".into(),
        endpoint: "chat.completions".into(),
        prompt: vec![1, 127, 128, 65_535, 151_644],
        sampling: Sampling { temperature: 0.7, top_p: 0.95, top_k: 20, seed: 0x001f_ffff_ffff_ffff, ..Sampling::GREEDY },
        max_tokens: 256,
        stop: vec!["\n\n".into(), "Ende 🛑".into()],
        ignore_eos: true,
        timeout_ms: 600_000,
        detached: false,
        stored: false,
        fingerprint: None,
        cache_salt: None,
        format: None,
        echo: None,
    },
    Claimed {
        worker: worker("decode-0a1b2c3d"),
        ack_subject: "$JS.ACK.FB_DECODE.decode-demo.1.42.7.1764000000000000000.0".into(),
        delivery: 1,
        engine: None,
    },
    PrefillQueued { tokens: 512, reason: "prompt of 512 > max_local_prefill_length 128".into(), cached_tokens: 0, layout_hash: None, kv: None },
    PrefillClaimed {
        worker: worker("prefill-4e5f6a7b"),
        ack_subject: "$JS.ACK.FB_PREFILL.prefill-demo.2.9.3.1764000000000000000.0".into(),
        delivery: 2,
    },
    KvReady { handle: handle() },
    PrefillCompleted { worker: worker("prefill-1"), first_index: 0, token: 9707, text: "Hello".into(), compute_us: 20_512, cached_tokens: 0, logprobs: None },
    KvTransferred { bytes: 117_440_512, tokens: 512, read_us: 12_800, after_us: 0, transport: "shm".into() },
    KvLost { reason: "the lease is over".into() },
    TokensGenerated { first_index: 1, tokens: vec![11, 1879, 0], text: ", world!".into(), cached_tokens: 0, logprobs: Vec::new() },
    Released {
        worker: worker("decode-0a1b2c3d"),
        cause: ReleaseCause::Drained,
        reason: "the worker stops".into(),
        kv: Some(handle()),
        cached_tokens: 0,
    },
    RequestCompleted {
        reason: FinishReason::Stop,
        usage: Usage { prompt_tokens: 512, completion_tokens: 4, cached_tokens: 0 },
    },
    RequestFailed { code: FailureCode::TooManyAttempts, message: "the engine has stopped".into() },
    RequestCancelled { cause: "client disconnected".into() },
}

/// A request that leaves out what may be left out.
fn plain_request() -> Body {
    Body::RequestAccepted(RequestAccepted {
        model: "demo".into(),
        endpoint: "chat.completions".into(),
        prompt: vec![1],
        sampling: Sampling::GREEDY,
        max_tokens: 1,
        stop: Vec::new(),
        ignore_eos: false,
        timeout_ms: 1000,
        detached: false,
        stored: false,
        fingerprint: None,
        cache_salt: None,
        format: None,
        echo: None,
    })
}

/// A request with all that came later.
fn stored_request() -> Body {
    let Body::RequestAccepted(plain) = plain_request() else { unreachable!() };
    Body::RequestAccepted(RequestAccepted {
        endpoint: "responses".into(),
        detached: true,
        stored: true,
        fingerprint: Some("9f86d081884c7d65".into()),
        cache_salt: None,
        format: None,
        echo: Some(serde_json::json!({ "metadata": { "k": "v" }, "n": [1, -2, 0.5, null, true] })),
        ..plain
    })
}

/// A request that narrows what may be drawn, and asks how probable it was.
fn narrowed_request() -> Body {
    let Body::RequestAccepted(plain) = plain_request() else { unreachable!() };
    Body::RequestAccepted(RequestAccepted {
        sampling: Sampling {
            repetition_penalty: 1.25,
            frequency_penalty: -0.5,
            presence_penalty: 2.0,
            logit_bias: vec![(7, -100.0), (151_645, 0.5)],
            logprobs: Some(2),
            ..plain.sampling
        },
        format: Some(OutputFormat::JsonSchema { schema: serde_json::json!({ "type": "object" }) }),
        ..plain
    })
}

fn probable(token: u32, bytes: &[u8], logprob: f32) -> TokenLogprob {
    TokenLogprob { token, bytes: bytes.to_vec(), logprob }
}

fn logprobs() -> Logprobs {
    Logprobs {
        drawn: probable(11, b",", -0.25),
        top: vec![probable(11, b",", -0.25), probable(1879, &[0xf0, 0x9f], -2.5)],
    }
}

fn generated_with_logprobs() -> Body {
    Body::TokensGenerated(TokensGenerated {
        first_index: 1,
        tokens: vec![11],
        text: ",".into(),
        cached_tokens: 0,
        logprobs: vec![logprobs(), Logprobs { top: Vec::new(), ..logprobs() }],
    })
}

fn prefilled_with_logprobs() -> Body {
    Body::PrefillCompleted(PrefillCompleted {
        worker: worker("prefill-1"),
        first_index: 0,
        token: 11,
        text: ",".into(),
        compute_us: 20_512,
        cached_tokens: 0,
        logprobs: Some(logprobs()),
    })
}

fn claimed_with_engine() -> Body {
    Body::Claimed(Claimed {
        worker: worker("decode-0a1b2c3d"),
        ack_subject: "$JS.ACK.FB_DECODE.decode-demo.1.42.7.1764000000000000000.0".into(),
        delivery: 1,
        engine: Some(EngineRef { layout_hash: LayoutHash(7), weights: "int4/32".into() }),
    })
}

fn failed_release() -> Body {
    Body::Released(Released {
        worker: worker("decode-0a1b2c3d"),
        cause: ReleaseCause::Failed,
        reason: "ONNX Runtime failed".into(),
        kv: None,
        cached_tokens: 0,
    })
}

fn request() -> RequestId {
    "019ab3c4d5e67f80a1b2c3d4e5f60718".parse().unwrap()
}

fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

fn handle() -> KvHandle {
    KvHandle {
        agent: worker("prefill-4e5f6a7b"),
        incarnation: 1_764_000_000_123_456,
        layout: KvLayout {
            geometry: KvGeometry { layers: 28, kv_heads: 8, head_dim: 128, dtype: KvDtype::F32 },
            slots: 4,
            positions: 4097,
        },
        layout_hash: LayoutHash(0x0123_4567_89ab_cdef),
        slot: 3,
        generation: 17,
        tokens: TokenRange { start: 256, count: 256 },
        checksums: vec![u64::MAX, 0x0102_0304_0506_0708, 0, 1],
        lease_remaining_ms: 60_000,
        capability: 0,
    }
}

fn event(body: Body) -> Event {
    Event { request: request(), attempt: 2, time_us: 1_764_000_000_654_321, body }
}

/// Names of files, and what each holds.
fn events() -> Vec<(String, Event)> {
    let mut events: Vec<_> =
        every_body().into_iter().map(|body| (format!("{}.1.hex", body.name()), event(body))).collect();
    events.push(("RequestAccepted.1.plain.hex".into(), event(plain_request())));
    events.push(("RequestAccepted.1.stored.hex".into(), event(stored_request())));
    events.push(("RequestAccepted.1.narrowed.hex".into(), event(narrowed_request())));
    events.push(("PrefillCompleted.1.logprobs.hex".into(), event(prefilled_with_logprobs())));
    events.push(("TokensGenerated.1.logprobs.hex".into(), event(generated_with_logprobs())));
    events.push(("Claimed.1.engine.hex".into(), event(claimed_with_engine())));
    events.push(("Released.1.failed.hex".into(), event(failed_release())));
    events
}

#[test]
fn the_list_of_names_is_complete() {
    let mut names: Vec<_> = every_body().iter().map(Body::name).collect();
    let mut listed = Body::NAMES.to_vec();
    names.sort_unstable();
    listed.sort_unstable();
    assert_eq!(names, listed);
}

#[test]
fn frozen_events_decode_and_encode() {
    for (file, event) in events() {
        let bytes = golden(&file, || hex(&wire::encode(&event)));
        let bytes = unhex(&bytes);
        assert_eq!(wire::decode(&bytes).unwrap(), event, "{file}");
        assert_eq!(hex(&wire::encode(&event)), hex(&bytes), "{file}: another encoding needs a new version");
    }
}

#[test]
fn frozen_tasks_decode_and_encode() {
    let (gateway, model) = (GatewayId::new("gw-1").unwrap(), ModelKey::of("Qwen/Qwen3-0.6B"));
    let decode = DecodeTask { request: request(), gateway: gateway.clone(), model: model.clone() };
    let prefill = PrefillTask { request: request(), gateway, model, attempt: 3 };
    let bytes = unhex(&golden("DecodeTask.hex", || hex(&decode.encode())));
    assert_eq!(DecodeTask::decode(&bytes).unwrap(), decode);
    assert_eq!(hex(&decode.encode()), hex(&bytes));
    let bytes = unhex(&golden("PrefillTask.hex", || hex(&prefill.encode())));
    assert_eq!(PrefillTask::decode(&bytes).unwrap(), prefill);
    assert_eq!(hex(&prefill.encode()), hex(&bytes));
    assert_eq!(decode.dedup_id(), "019ab3c4d5e67f80a1b2c3d4e5f60718:d");
    assert_eq!(prefill.dedup_id(), "019ab3c4d5e67f80a1b2c3d4e5f60718:p:3");
}

#[test]
fn frozen_registry_entries_decode_and_encode() {
    let card = ModelCard {
        name: "Qwen/Qwen3-0.6B".into(),
        key: ModelKey::of("Qwen/Qwen3-0.6B"),
        created_s: 1_764_000_000,
        vocab_size: 151_936,
        context_tokens: 4096,
        eos_token_ids: vec![151_645, 151_643],
        tokenizer: BlobRef { name: "5c".repeat(32), bytes: 11_422_654 },
        chat_template: Some("{% for message in messages %}{{ message.content }}{% endfor %}".into()),
        special_tokens: vec![("eos_token".into(), "<|im_end|>".into())],
        defaults: SamplingDefaults {
            temperature: 0.6,
            top_p: 0.95,
            top_k: 20,
            ..SamplingDefaults::default()
        },
        layout_hash: LayoutHash(0x0123_4567_89ab_cdef),
        weights: "int4/32".into(),
    };
    let lease = WorkerLease {
        worker: worker("decode-0a1b2c3d"),
        incarnation: 1_764_000_000_123_456,
        role: Role::Decode,
        model: ModelKey::of("Qwen/Qwen3-0.6B"),
        layout_hash: LayoutHash(0x0123_4567_89ab_cdef),
        slots: 8,
        free_slots: 3,
        host: "node-1/6a1f0b52-3c44-4c51-9f86-0c3c0e1f2a3b".into(),
        kv_socket: "/run/forebay/decode-0a1b2c3d.sock".into(),
        kv_tcp: None,
        kv_nixl: false,
        active_tokens: 0,
        prefill_tokens: 0,
        draining: false,
        kv_leases: 0,
        own_queue: false,
    };
    let text = golden("ModelCard.json", || json(&card));
    assert_eq!(serde_json::from_str::<ModelCard>(&text).unwrap(), card);
    assert_eq!(json(&card), text);
    let text = golden("WorkerLease.json", || json(&lease));
    assert_eq!(serde_json::from_str::<WorkerLease>(&text).unwrap(), lease);
    assert_eq!(json(&lease), text);
}

#[test]
fn frozen_cache_events() {
    let blocks = || vec![BlockHash::from_bytes([7; 16]), BlockHash::from_bytes(*b"sixteen bytes, 2")];
    let changes = [
        ("Stored", CacheChange::Stored { blocks: blocks() }),
        ("Removed", CacheChange::Removed { blocks: blocks() }),
        ("Snapshot", CacheChange::Snapshot { blocks: blocks(), part: 1, parts: 3 }),
    ];
    for (name, change) in changes {
        let event = CacheEvent {
            worker: worker("decode-0a1b2c3d"),
            incarnation: 1_764_000_000_123_456,
            number: 41,
            change,
        };
        let text = golden(&format!("CacheEvent.{name}.hex"), || hex(&event.encode()));
        assert_eq!(CacheEvent::decode(&unhex(&text)).unwrap(), event);
        assert_eq!(hex(&event.encode()), text);
    }
}

/// Names of values inside of events are as permanent as names of events.
#[test]
fn frozen_names_of_values() {
    let frozen = [
        (json(&[FinishReason::Stop, FinishReason::Length]), r#"["stop","length"]"#),
        (json(&[KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8]), r#"["f32","f16","bf16","int8"]"#),
        (json(&[Role::Prefill, Role::Decode]), r#"["prefill","decode"]"#),
        (
            json(&[
                FailureCode::DeadlineExceeded,
                FailureCode::QueueUnavailable,
                FailureCode::TooManyAttempts,
                FailureCode::Unservable,
                FailureCode::EngineFailed,
            ]),
            r#"["deadline_exceeded","queue_unavailable","too_many_attempts","unservable","engine_failed"]"#,
        ),
    ];
    for (written, name) in frozen {
        assert_eq!(written.replace([' ', '\n'], ""), name);
    }
}

/// As `forebay log --json` shows them.
#[test]
fn events_survive_json() {
    for (file, event) in events() {
        let text = serde_json::to_string(&event).unwrap();
        assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event, "{file}");
    }
}

#[derive(Serialize)]
struct Header {
    hint: [u8; 3],
    #[serde(rename = "type")]
    name: &'static str,
    version: u16,
    request: RequestId,
    attempt: u32,
    time_us: u64,
    cause: Option<&'static str>,
}

#[derive(Serialize)]
struct CancelledByNewer {
    who: (&'static str, u8),
    cause: &'static str,
    details: std::collections::BTreeMap<&'static str, Vec<u64>>,
}

fn from_newer(name: &'static str, version: u16) -> Vec<u8> {
    let header =
        Header { hint: [1, 2, 3], name, version, request: request(), attempt: 4, time_us: 5, cause: None };
    let body = CancelledByNewer {
        who: ("operator", 7),
        cause: "maintenance",
        details: [("nodes", vec![1, 2, u64::MAX])].into(),
    };
    [rmp_serde::to_vec_named(&header).unwrap(), rmp_serde::to_vec_named(&body).unwrap()].concat()
}

#[test]
fn unknown_fields_are_skipped() {
    let cancelled = Body::RequestCancelled(RequestCancelled { cause: "maintenance".into() });
    let expected = Event { request: request(), attempt: 4, time_us: 5, body: cancelled };
    assert_eq!(wire::decode(&from_newer("RequestCancelled", 1)).unwrap(), expected);
}

#[test]
fn unknown_types_and_versions_are_errors() {
    for (wanted, of_version) in [("RequestPaused", 1), ("RequestCancelled", 2), ("RequestCancelled", 0)] {
        match wire::decode(&from_newer(wanted, of_version)) {
            Err(DecodeError::Unknown { name, version }) => {
                assert_eq!((name.as_str(), version), (wanted, of_version));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_body_that_does_not_fit_its_type_is_an_error() {
    match wire::decode(&from_newer("TokensGenerated", 1)) {
        Err(DecodeError::Body { name, version: 1, .. }) => assert_eq!(name, "TokensGenerated"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn cut_off_events_are_errors() {
    for (file, event) in events() {
        let bytes = wire::encode(&event);
        for len in 0..bytes.len() {
            assert!(wire::decode(&bytes[..len]).is_err(), "{file}, its first {len} bytes");
        }
    }
}

proptest::proptest! {
    /// Whatever is in the log: an event or an error, never a panic.
    #[test]
    fn damaged_events_never_panic(which in 0usize..13, at: proptest::sample::Index, byte: u8) {
        let mut bytes = wire::encode(&events()[which].1);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = wire::decode(&bytes);
    }

    #[test]
    fn noise_never_panics(bytes: Vec<u8>) {
        let _ = wire::decode(&bytes);
        let _ = DecodeTask::decode(&bytes);
    }
}

/// The content of a frozen file; `now` is what it would be if it were made today.
fn golden(file: &str, now: impl FnOnce() -> String) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    if std::env::var_os("FOREBAY_WRITE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, now()).unwrap();
    }
    std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}: see the top of tests/golden.rs", path.display()))
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string_pretty(value).unwrap() + "\n"
}

/// 32 bytes a line.
fn hex(bytes: &[u8]) -> String {
    bytes.chunks(32).fold(String::new(), |mut text, line| {
        line.iter().for_each(|byte| write!(text, "{byte:02x}").unwrap());
        text + "\n"
    })
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    assert!(digits.len().is_multiple_of(2), "half a byte");
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}
