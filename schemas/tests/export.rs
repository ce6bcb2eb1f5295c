//! An exported request reads back as it was, and a damaged one says where.

use forebay_schemas::{
    event::{Body, Event, RequestAccepted, TokensGenerated},
    export::{self, BadExport, Export, FORMAT, Header, ModelFacts, VERSION},
    ids::{GatewayId, RequestId},
    kv::LayoutHash,
    sampling::Sampling,
    wire,
};
use proptest::prelude::*;
use std::path::PathBuf;

fn request() -> RequestId {
    "019ab3c4d5e67f80a1b2c3d4e5f60718".parse().unwrap()
}

fn export_of(events: Vec<Event>) -> Export {
    let header = Header {
        format: FORMAT.into(),
        version: VERSION,
        forebay: "0.1.0".into(),
        request: request(),
        gateway: GatewayId::new("gw-1").unwrap(),
        model: ModelFacts {
            name: "Qwen/Qwen3-0.6B".into(),
            layout_hash: Some(LayoutHash(u64::MAX)),
            weights: Some("int4/32".into()),
        },
        exported_us: 1_764_000_000_654_321,
    };
    Export { header, events: (5..).step_by(3).zip(events).collect() }
}

/// Every event that is frozen in `golden/`.
fn golden_events() -> Vec<Event> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    let bytes = |path: &PathBuf| {
        let digits: String = std::fs::read_to_string(path).unwrap().split_whitespace().collect();
        let pairs = (0..digits.len()).step_by(2);
        pairs.map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect::<Vec<u8>>()
    };
    let is_event = |path: &&PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.ends_with(".hex") && !name.contains("Task") && !name.starts_with("Cache")
    };
    files.iter().filter(is_event).map(|path| wire::decode(&bytes(path)).unwrap()).collect()
}

fn refused(text: &str) -> BadExport {
    export::read(text).unwrap_err()
}

#[test]
fn every_frozen_event_reads_back() {
    let events = golden_events();
    assert!(events.len() >= 17, "{}", events.len());
    let export = export_of(events);
    assert_eq!(export::read(&export::write(&export)).unwrap(), export);
}

#[test]
fn the_format_is_frozen() {
    let generated = TokensGenerated {
        first_index: 1,
        tokens: vec![11, 1879],
        text: "\n\"ä".into(),
        cached_tokens: 0,
        logprobs: Vec::new(),
    };
    let event = Event { request: request(), attempt: 2, time_us: 7, body: Body::TokensGenerated(generated) };
    insta::assert_snapshot!(export::write(&export_of(vec![event])), @r#"
    {"format":"forebay-request","version":1,"forebay":"0.1.0","request":"019ab3c4-d5e6-7f80-a1b2-c3d4e5f60718","gateway":"gw-1","model":{"name":"Qwen/Qwen3-0.6B","layout_hash":18446744073709551615,"weights":"int4/32"},"exported_us":1764000000654321}
    {"seq":5,"version":1,"request":"019ab3c4-d5e6-7f80-a1b2-c3d4e5f60718","attempt":2,"time_us":7,"type":"TokensGenerated","data":{"first_index":1,"tokens":[11,1879],"text":"\n\"ä"}}
    "#);
}

#[test]
fn a_damaged_export_says_where() {
    let text = export::write(&export_of(golden_events()));
    let lines: Vec<&str> = text.lines().collect();
    let without = |left_out: usize| {
        let kept = lines.iter().enumerate().filter(|(index, _)| *index != left_out).map(|(_, line)| *line);
        kept.collect::<Vec<_>>().join("\n")
    };
    let with = |index: usize, line: &str| {
        let mut lines = lines.clone();
        lines[index] = line;
        lines.join("\n")
    };
    assert_eq!(refused("").line, 1);
    assert_eq!(refused(&without(0)).line, 1);
    assert_eq!(refused(lines[0]).problem, "an export without events");
    let newer = lines[0].replace(r#""version":1"#, r#""version":2"#);
    assert!(refused(&with(0, &newer)).problem.contains("this build reads version 1"));
    let cut = &lines[3][..lines[3].len() / 2];
    assert_eq!(refused(&with(3, cut)).line, 4);
    let unknown = lines[2].replace(r#""version":1"#, r#""version":9"#);
    let refusal = refused(&with(2, &unknown));
    assert_eq!(refusal.line, 3);
    assert!(refusal.problem.contains("version 9 is not known here"), "{refusal}");
    let paused = r#"{"seq":8,"version":1,"request":"019ab3c4d5e67f80a1b2c3d4e5f60718","attempt":0,"time_us":1,"type":"RequestPaused","data":{}}"#;
    assert!(refused(&with(2, paused)).problem.contains("RequestPaused version 1 is not known here"));
    let other = lines[2].replace("e5f60718", "e5f60719");
    assert!(refused(&with(2, &other)).problem.contains("among those of"));
    assert!(refused(&with(2, lines[1])).problem.contains("out of order"));
    // What is left out in the middle shows in the fold, if it shows at all; here it is only the text.
    assert!(export::read(&without(4)).is_ok());
}

proptest! {
    #[test]
    fn any_request_reads_back(
        prompt: Vec<u32>,
        (temperature, top_p) in (0f32..2.0, 0f32..=1.0),
        seed: u64,
        timeout_ms: u64,
        stop: Vec<String>,
        cache_salt: Option<String>,
        echo: f64,
        text: String,
        tokens: Vec<u32>,
    ) {
        let accepted = RequestAccepted {
            endpoint: "responses".into(),
            sampling: Sampling { temperature, top_p, top_k: 3, seed, min_p: 0.125, ..Sampling::GREEDY },
            stop,
            ignore_eos: true,
            timeout_ms,
            detached: true,
            stored: true,
            fingerprint: Some(text.clone()),
            cache_salt,
            format: None,
            echo: serde_json::Number::from_f64(echo).map(serde_json::Value::Number),
            ..RequestAccepted::greedy(&text, prompt, 4)
        };
        let generated = TokensGenerated { first_index: u32::MAX, tokens, text, cached_tokens: 0, logprobs: Vec::new() };
        let bodies = [Body::RequestAccepted(accepted), Body::TokensGenerated(generated)];
        let events = bodies.map(|body| Event { request: request(), attempt: 0, time_us: timeout_ms, body });
        let export = export_of(events.to_vec());
        prop_assert_eq!(export::read(&export::write(&export)).unwrap(), export);
    }

    /// Whatever is in a file: an export or an error that names a line of it, never a panic.
    #[test]
    fn noise_never_panics(at: prop::sample::Index, byte: u8) {
        let mut bytes = export::write(&export_of(golden_events())).into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(text) = String::from_utf8(bytes)
            && let Err(bad) = export::read(&text)
        {
            prop_assert!(bad.line <= text.lines().count());
        }
    }
}
