//! A chat completion request as clients send it. Fields that can change nothing here (`user`,
//! `service_tier` …) are not listed and end up among the others. Fields that would change the answer and can't
//! be honoured are listed as raw JSON, so that the gateway can refuse them by name.

use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value};
use std::fmt;

/// `POST /v1/chat/completions`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatRequest {
    /// The name of a model card.
    pub model: String,
    /// The conversation so far, oldest first.
    pub messages: Vec<Message>,
    /// Whether the answer comes as server-sent events.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    /// What a stream carries besides text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_options: Option<StreamOptions>,
    /// Most tokens to generate; the older name of `max_completion_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Most tokens to generate. Goes before `max_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_completion_tokens: Option<u32>,
    /// 0 to 2; 0 is greedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Above 0, up to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// vLLM's extension: the k most probable tokens; 0 or -1 for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<i64>,
    /// vLLM's extension: tokens with at least this part of the largest probability, 0 to 1; 0 for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Makes sampling repeatable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Where the text ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
    /// vLLM's extension: go on past the end-of-sequence token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignore_eos: Option<bool>,
    /// vLLM's extension: variables for the chat template, such as Qwen's `enable_thinking`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Whether the answer can be asked for later; the request then goes on when its client leaves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<bool>,
    /// Kept with a stored answer, and shown with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Map<String, Value>>,
    /// Answers to draw; only 1 is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    /// −2 to 2: taken off the logits of tokens that the answer has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// −2 to 2: taken off the logits of tokens once for each time that the answer has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// vLLM's extension, 0.01 to 2: divides the logits of tokens that the prompt or the answer has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// vLLM's extension; only 0 is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_tokens: Option<u32>,
    /// vLLM's extension; only an empty list is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_token_ids: Option<Vec<u32>>,
    /// vLLM's extension: KV of prefixes is shared only between requests of equal salts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_salt: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub others: Map<String, Value>,
    /// Whether it is told how probable each token is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<bool>,
    /// So many of the most probable tokens are told at each place, up to 20. Needs `logprobs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<u32>,
    /// Added to the logits of tokens, by id: −100 to 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit_bias: Option<Map<String, Value>>,
    /// What the answer must be: `text`, `json_object` or `json_schema`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_format: Option<Value>,
    /// Only an empty list is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Value>>,
    /// Only `"none"` is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_choice: Option<Value>,
    /// The older name of `tools`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub functions: Option<Vec<Value>>,
    /// The older name of `tool_choice`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function_call: Option<Value>,
    /// Only `["text"]` is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modalities: Option<Vec<String>>,
    /// Not served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audio: Option<Value>,
    /// Not served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub web_search_options: Option<Value>,
}

/// What a stream carries besides text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamOptions {
    /// One more chunk at the end, with the usage and no choices.
    pub include_usage: Option<bool>,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speaker {
    /// Who sets the rules.
    System,
    /// OpenAI's newer name of `system`.
    Developer,
    /// Who asks.
    User,
    /// Who answers.
    Assistant,
    /// The result of a tool call: not served.
    Tool,
    /// The older name of `tool`: not served.
    Function,
}

/// One message of the conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Speaker,
    /// What is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    /// The speaker's name, for templates that use it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What the model thought, for templates that use it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Only an empty list is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<Value>>,
    /// The older name of `tool_calls`: not served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function_call: Option<Value>,
    /// Not served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audio: Option<Value>,
}

impl Message {
    /// A message of plain text.
    pub fn text(role: Speaker, text: impl Into<String>) -> Message {
        Message {
            role,
            content: Some(Content::Text(text.into())),
            name: None,
            reasoning_content: None,
            tool_calls: None,
            function_call: None,
            audio: None,
        }
    }
}

/// What is said: a string, or a list of parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Parts, of which only those of type `text` are served.
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// `text`, `image_url`, `input_audio`, `file` …
    #[serde(rename = "type")]
    pub kind: String,
    /// The text of a part of type `text`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// Where the text ends: a string, or a list of strings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Stop {
    /// Before this.
    One(String),
    /// Before whichever comes first.
    Any(Vec<String>),
}

impl Stop {
    /// All of them.
    pub fn as_slice(&self) -> &[String] {
        match self {
            Stop::One(text) => std::slice::from_ref(text),
            Stop::Any(texts) => texts,
        }
    }
}

/// Reads "a string, or a list of T". `serde(untagged)` would do, but its errors say neither where nor what.
pub(super) struct TextOrList<T>(pub(super) std::marker::PhantomData<T>);

pub(super) enum Either<T> {
    Text(String),
    List(Vec<T>),
}

impl<'de, T: Deserialize<'de>> de::Visitor<'de> for TextOrList<T> {
    type Value = Either<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a list")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Either<T>, E> {
        Ok(Either::Text(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Either<T>, E> {
        Ok(Either::Text(text))
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Either<T>, A::Error> {
        Vec::deserialize(de::value::SeqAccessDeserializer::new(list)).map(Either::List)
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        Ok(match deserializer.deserialize_any(TextOrList(std::marker::PhantomData))? {
            Either::Text(text) => Content::Text(text),
            Either::List(parts) => Content::Parts(parts),
        })
    }
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Stop, D::Error> {
        Ok(match deserializer.deserialize_any(TextOrList(std::marker::PhantomData))? {
            Either::Text(text) => Stop::One(text),
            Either::List(texts) => Stop::Any(texts),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_and_stop_come_as_text_or_list() {
        let request: ChatRequest = serde_json::from_str(
            r#"{"model": "m", "stop": "a", "user": "u", "metadata": {"a": "b"}, "messages": [
                {"role": "user", "content": "hi", "unknown": 1},
                {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {}}]}
            ]}"#,
        )
        .unwrap();
        assert_eq!(request.stop.unwrap().as_slice(), ["a"]);
        assert_eq!(request.messages[0], Message::text(Speaker::User, "hi"));
        let Some(Content::Parts(parts)) = &request.messages[1].content else { panic!("parts") };
        assert_eq!(parts[0].text.as_deref(), Some("one"));
        assert_eq!(parts[1].kind, "image_url");

        let stop: Stop = serde_json::from_str(r#"["a", "b"]"#).unwrap();
        assert_eq!(stop.as_slice(), ["a", "b"]);
        let error = serde_json::from_str::<Stop>("3").unwrap_err().to_string();
        assert!(error.starts_with("invalid type: integer `3`, expected a string or a list"), "{error}");
    }

    #[test]
    fn a_client_sends_only_what_it_sets() {
        let request = ChatRequest {
            model: "m".into(),
            messages: vec![Message::text(Speaker::User, "hi")],
            max_tokens: Some(4),
            ..ChatRequest::default()
        };
        let json = serde_json::to_string(&request).unwrap();
        assert_eq!(json, r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":4}"#);
    }
}
