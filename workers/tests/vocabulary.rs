//! Texts of tokens, and outputs that are held to a format.

use forebay_kernels::Adjustments;
use forebay_schemas::sampling::{OutputFormat, Sampling};
use forebay_workers::{
    engine::{
        Draw, Engine, Row,
        onnx::{OnnxEngine, OnnxOptions},
    },
    model::ModelText,
    vocabulary::Vocabulary,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo")
}

fn engine() -> OnnxEngine {
    OnnxEngine::open(&demo(), &OnnxOptions { slots: 1, positions: 400, threads: 2, ..OnnxOptions::default() })
        .unwrap()
}

fn vocabulary(engine: &OnnxEngine) -> (Vocabulary, ModelText) {
    let text = ModelText::open(&demo()).unwrap();
    let (eos, size) = (engine.card().eos.clone().into(), engine.card().vocab);
    (Vocabulary::new(text.tokenizer.clone(), eos, size), text)
}

#[test]
fn the_texts_of_tokens_are_the_text() {
    let engine = engine();
    let (vocabulary, text) = vocabulary(&engine);
    let said = "A forebay\n\tholds wäter, 漢字 and 😀; 1 + 1 = 2.";
    let tokens = text.tokenizer.encode(said, false).unwrap().get_ids().to_vec();
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| vocabulary.text(*token).to_vec()).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), said);
    assert_eq!(vocabulary.text(u32::MAX), b"");
}

/// What the model says under a grammar, up to its end or to 300 tokens.
fn held_to(engine: &mut OnnxEngine, format: &OutputFormat, prompt: &str, sampling: &Sampling) -> String {
    let (vocabulary, text) = vocabulary(engine);
    let prompt = text.tokenizer.encode(prompt, false).unwrap().get_ids().to_vec();
    let mut grammar = vocabulary.grammar(format, &[]).unwrap();
    let allowed = |words: &[u32]| words.to_vec();
    let mut tokens: Vec<u32> = Vec::new();
    let mut out = Vec::new();
    while tokens.len() < 300 {
        let mask = allowed(grammar.allowed());
        let draw = Draw { allowed: Some(&mask), ..Draw::new(sampling, tokens.len() as u32) };
        let token = match tokens.last() {
            None => engine.prefill(0, 0, &prompt, Some(draw)).unwrap().unwrap().token,
            Some(last) => {
                let position = (prompt.len() + tokens.len()) as u32 - 1;
                engine.decode(&[Row { slot: 0, position, token: *last, draw }], &[], &mut out).unwrap();
                out[0].token
            }
        };
        if engine.card().eos.contains(&token) {
            break;
        }
        grammar.push(token).unwrap();
        tokens.push(token);
        // Whoever goes on from the log is at the same place.
        if tokens.len() == 5 {
            assert_eq!(vocabulary.grammar(format, &tokens).unwrap().allowed(), grammar.allowed());
        }
    }
    String::from_utf8(tokens.iter().flat_map(|token| vocabulary.text(*token).to_vec()).collect()).unwrap()
}

#[test]
fn an_output_is_of_its_schema_however_it_is_drawn() {
    let mut engine = engine();
    let schema = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 12 },
            "kind": { "enum": ["river", "lake"] },
            "depth": { "type": "integer", "minimum": 0, "maximum": 99 },
        },
        "required": ["name", "kind", "depth"],
        "additionalProperties": false,
    });
    let format = OutputFormat::JsonSchema { schema };
    for seed in 0..4 {
        let temperature = [0.0, 1.0, 2.0, 2.0][seed as usize];
        let sampling = Sampling { temperature, seed, ..Sampling::GREEDY };
        let said = held_to(&mut engine, &format, "Describe a forebay.", &sampling);
        let value: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said:?}"));
        let fields: Vec<&String> = value.as_object().unwrap().keys().collect();
        assert_eq!(fields, ["name", "kind", "depth"], "in the schema's order: {said}");
        assert!(["river", "lake"].contains(&value["kind"].as_str().unwrap()), "{said}");
        assert!((0..100).contains(&value["depth"].as_i64().unwrap()), "{said}");
    }
}

#[test]
fn a_schema_that_nobody_knows_is_refused() {
    let engine = engine();
    let (vocabulary, _) = vocabulary(&engine);
    for schema in [json!({ "type": "cloud" }), json!({ "$ref": "https://example.com/schema" }), json!(3)] {
        let format = OutputFormat::JsonSchema { schema };
        let error = vocabulary.grammar(&format, &[]).unwrap_err().to_string();
        assert!(!error.is_empty() && !error.contains('\n'), "{error}");
    }
    let format = OutputFormat::JsonObject;
    assert!(vocabulary.grammar(&format, &[1, 2, 3]).is_err(), "what was said is not of the format");
}

/// Bias, penalties and what is told of tokens, against the logits themselves.
#[test]
fn draws_follow_from_the_logits() {
    let mut engine = engine();
    let (_, text) = vocabulary(&engine);
    let prompt = text.tokenizer.encode("A forebay is", false).unwrap().get_ids().to_vec();
    let first = engine.prefill(0, 0, &prompt, Some(Draw::greedy(0))).unwrap().unwrap().token;
    let logits = engine.row_logits(0).unwrap().to_vec();
    let sum = logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();

    let mut draw = |sampling: &Sampling, output: &[u32]| {
        let adjustments = Adjustments::new(sampling, &prompt, output);
        let draw = Draw { adjustments: adjustments.as_ref(), ..Draw::new(sampling, 0) };
        engine.prefill(0, 0, &prompt, Some(draw)).unwrap().unwrap()
    };
    let banned = Sampling { logit_bias: vec![(first, -100.0)], logprobs: Some(2), ..Sampling::GREEDY };
    let drawn = draw(&banned, &[]);
    assert_ne!(drawn.token, first);
    let told = drawn.logprobs.unwrap();
    // By the logits as they were: the banned token is still the most probable one.
    assert_eq!((told.top[0].0, told.top[1].0), (first, drawn.token));
    let expected = |token: u32| f64::from(logits[token as usize]) - sum;
    assert!((f64::from(told.drawn) - expected(drawn.token)).abs() < 1e-4);
    assert!((f64::from(told.top[0].1) - expected(first)).abs() < 1e-4);

    let frequency = Sampling { frequency_penalty: 2.0, ..Sampling::GREEDY };
    assert_eq!(draw(&frequency, &[]).token, first, "nothing was generated yet");
    assert_ne!(draw(&frequency, &[first; 20]).token, first);
    let wanted = Sampling { logit_bias: vec![(17, 100.0)], temperature: 1.0, ..Sampling::GREEDY };
    assert_eq!(draw(&wanted, &[]).token, 17);
}
