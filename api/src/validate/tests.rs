use super::*;
use forebay_schemas::{
    card::{BlobRef, SamplingDefaults},
    ids::ModelKey,
    kv::LayoutHash,
};
use serde_json::{Value, json};

fn card() -> ModelCard {
    ModelCard {
        name: "demo".into(),
        key: ModelKey::of("demo"),
        created_s: 0,
        vocab_size: 100,
        context_tokens: 64,
        eos_token_ids: vec![2],
        tokenizer: BlobRef { name: "t".into(), bytes: 0 },
        chat_template: None,
        special_tokens: vec![],
        defaults: SamplingDefaults { temperature: 0.7, top_p: 0.9, top_k: 20, ..SamplingDefaults::default() },
        layout_hash: LayoutHash(1),
        weights: "fp32".into(),
    }
}

fn request(more: Value) -> ChatRequest {
    let mut request = json!({ "model": "demo", "messages": [{ "role": "user", "content": "hi" }] });
    let Value::Object(more) = more else { panic!("fields") };
    request.as_object_mut().unwrap().extend(more);
    serde_json::from_value(request).unwrap()
}

fn accepted(more: Value, prompt_tokens: usize) -> Result<RequestAccepted, ApiError> {
    params(&request(more), &card(), 99)?.accept(&card(), vec![1; prompt_tokens], Duration::from_secs(5))
}

fn error(more: Value) -> (ErrorCode, Option<String>) {
    let request = request(more);
    let error =
        params(&request, &card(), 0).map(drop).and_then(|()| conversation(&request).map(drop)).unwrap_err();
    (error.code(), error.envelope().error.param)
}

#[test]
fn what_is_not_said_comes_from_the_card() {
    let accepted = accepted(json!({}), 10).unwrap();
    assert_eq!(
        accepted.sampling,
        Sampling { temperature: 0.7, top_p: 0.9, top_k: 20, seed: 99, ..Sampling::GREEDY }
    );
    assert_eq!((accepted.max_tokens, accepted.timeout_ms), (54, 5000));
    assert!(accepted.stop.is_empty() && !accepted.ignore_eos);
}

#[test]
fn what_is_said_is_taken() {
    let all = json!({
        "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0.25, "seed": -1, "max_tokens": 7, "max_completion_tokens": 5,
        "stop": ["a", "b"], "ignore_eos": true, "user": "u", "store": true, "reasoning_effort": "low",
        "n": 1, "presence_penalty": 0, "tools": [], "tool_choice": "none", "logit_bias": {}, "logprobs": false,
        "response_format": { "type": "text" }, "modalities": ["text"], "parallel_tool_calls": true,
    });
    let accepted = accepted(all, 10).unwrap();
    assert_eq!(
        accepted.sampling,
        Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: u64::MAX, min_p: 0.25, ..Sampling::GREEDY }
    );
    assert_eq!((accepted.max_tokens, accepted.stop.len(), accepted.ignore_eos), (5, 2, true));
}

#[tokio::test]
async fn what_narrows_the_choice_is_taken() {
    let schema = json!({ "type": "object", "properties": { "b": {}, "a": {} } });
    let all = json!({
        "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.5, "logprobs": true,
        "logit_bias": { "99": -100, "7": 0.5, "007": 0.5 },
        "response_format": { "type": "json_schema", "json_schema": { "name": "n", "strict": true, "schema": schema } },
    });
    let accepted = accepted(all, 10).unwrap();
    let Sampling { presence_penalty, frequency_penalty, repetition_penalty, logit_bias, logprobs, .. } =
        accepted.sampling;
    assert_eq!((presence_penalty, frequency_penalty, repetition_penalty), (-2.0, 2.0, 1.5));
    assert_eq!((logit_bias, logprobs), (vec![(7, 0.5), (99, -100.0)], Some(0)));
    let Some(OutputFormat::JsonSchema { schema }) = accepted.format else { panic!("a schema") };
    // Answers have their properties in this order.
    let names: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["b", "a"]);

    let unfollowed = json!({ "type": "json_schema", "json_schema": { "schema": { "type": "cloud" } } });
    let params = params(&request(json!({ "response_format": unfollowed })), &card(), 0).unwrap();
    let unknown = params.check_format().await.unwrap_err();
    let param = unknown.envelope().error.param;
    assert_eq!((unknown.code(), param.as_deref()), (ErrorCode::InvalidValue, Some("response_format")));

    let format = |of: Value| super::format::format(&request(json!({ "response_format": of })));
    assert_eq!(format(json!({ "type": "json_object" })).unwrap(), Some(OutputFormat::JsonObject));
    assert_eq!(format(json!({ "type": "text" })).unwrap(), None);
    assert_eq!(
        error(json!({ "ignore_eos": true, "response_format": { "type": "json_object" } })),
        (ErrorCode::InvalidValue, Some("ignore_eos".into()))
    );
}

#[test]
fn what_does_not_fit_the_context_is_refused_with_both_numbers() {
    assert_eq!(accepted(json!({ "max_tokens": 54 }), 10).unwrap().max_tokens, 54);
    for (most, prompt) in [(json!({ "max_tokens": 55 }), 10), (json!({}), 64), (json!({}), 100)] {
        let error = accepted(most, prompt).unwrap_err();
        assert_eq!(error.code(), ErrorCode::ContextLengthExceeded);
        let message = error.envelope().error.message;
        assert!(message.contains("64 tokens") && message.contains(&prompt.to_string()), "{message}");
    }
}

#[test]
fn what_is_told_of_an_answer_is_bounded() {
    let card = ModelCard { context_tokens: 40_000, ..card() };
    let accepted = |top: u32, most: u32| {
        let asked = request(json!({ "logprobs": true, "top_logprobs": top, "max_tokens": most }));
        params(&asked, &card, 0)?.accept(&card, vec![1; 10], Duration::from_secs(5))
    };
    assert!(accepted(20, 9000).is_ok() && accepted(0, 39_000).is_ok());
    let error = accepted(20, 10_000).unwrap_err().envelope().error;
    assert_eq!(error.param.as_deref(), Some("top_logprobs"));
    assert!(error.message.contains("210000"), "{}", error.message);
}

#[test]
fn values_out_of_range_are_named() {
    for (param, value) in [
        ("temperature", json!(2.1)),
        ("temperature", json!(-1)),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("min_p", json!(1.1)),
        ("max_tokens", json!(0)),
        ("max_completion_tokens", json!(0)),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!("")),
        ("messages", json!([])),
        ("presence_penalty", json!(2.5)),
        ("frequency_penalty", json!(-2.5)),
        ("repetition_penalty", json!(0)),
        ("logit_bias", json!({ "100": 5 })),
        ("logit_bias", json!({ "one": 5 })),
        ("logit_bias", json!({ "1": 101 })),
        ("logit_bias", json!({ "1": "much" })),
        ("top_logprobs", json!(3)),
        ("top_logprobs", json!(21)),
    ] {
        assert_eq!(error(json!({ param: value })), (ErrorCode::InvalidValue, Some(param.into())), "{param}");
    }
}

#[test]
fn what_can_not_be_honoured_is_named() {
    for (param, value) in [
        ("n", json!(2)),
        ("tools", json!([{ "type": "function" }])),
        ("tool_choice", json!("auto")),
        ("functions", json!([{}])),
        ("function_call", json!("auto")),
        ("response_format", json!({ "type": "grammar" })),
        ("min_tokens", json!(1)),
        ("stop_token_ids", json!([1])),
        ("modalities", json!(["text", "audio"])),
        ("audio", json!({})),
        ("web_search_options", json!({})),
    ] {
        assert_eq!(
            error(json!({ param: value })),
            (ErrorCode::UnsupportedParameter, Some(param.into())),
            "{param}"
        );
    }
}

#[test]
fn messages_that_can_not_be_honoured_are_named() {
    for (param, code, message) in [
        (
            "messages[0].content[1].type",
            ErrorCode::UnsupportedParameter,
            json!({ "role": "user", "content": [
            { "type": "text", "text": "see" }, { "type": "image_url", "image_url": { "url": "x" } }] }),
        ),
        (
            "messages[0].content[0].text",
            ErrorCode::MissingParameter,
            json!({ "role": "user", "content": [{ "type": "text" }] }),
        ),
        ("messages[0].content", ErrorCode::MissingParameter, json!({ "role": "user" })),
        ("messages[0].role", ErrorCode::UnsupportedParameter, json!({ "role": "tool", "content": "4" })),
        (
            "messages[0].tool_calls",
            ErrorCode::UnsupportedParameter,
            json!({ "role": "assistant", "tool_calls": [{}] }),
        ),
    ] {
        assert_eq!(error(json!({ "messages": [message] })), (code, Some(param.into())), "{param}");
    }
}

#[test]
fn turns_are_plain_text() {
    let request = request(json!({ "messages": [
        { "role": "developer", "content": "rules" },
        { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }], "name": "ann" },
    ] }));
    let turns = conversation(&request).unwrap();
    assert_eq!((turns[0].role, turns[0].content.as_ref()), ("system", "rules"));
    assert_eq!((turns[1].role, turns[1].content.as_ref(), turns[1].name), ("user", "a\nb", Some("ann")));
}
