//! A model's chat template, in the dialect of Hugging Face's `apply_chat_template`: Jinja with `trim_blocks` and
//! `lstrip_blocks`, Python's methods on strings, lists and dictionaries, `raise_exception`, `strftime_now`,
//! and a `tojson` that writes as Python does.
//!
//! <https://huggingface.co/docs/transformers/chat_templating_writing>

use crate::{
    error::{ApiError, ErrorCode},
    validate::Turn,
};
use minijinja::{
    Environment, Error, ErrorKind, UndefinedBehavior, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::Serialize;
use serde_json::{
    Map,
    ser::{Formatter, PrettyFormatter},
};
use std::{io, time::SystemTime};
use time::{OffsetDateTime, format_description::parse_strftime_borrowed};

/// Steps that one rendering may take, each an instruction or 64 bytes of data: several passes over the largest
/// body, and a fraction of a second at most.
const FUEL: u64 = 4_000_000;

/// The one template of an environment.
const NAME: &str = "chat";

/// A chat template, compiled.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles a template. The special tokens are variables in it, such as `bos_token`.
    pub(crate) fn new(source: &str, special_tokens: &[(String, String)]) -> Result<ChatTemplate, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| strftime(SystemTime::now().into(), format));
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, without_generation_tags(source))?;
        Ok(ChatTemplate { environment, special_tokens: special_tokens.to_vec() })
    }

    /// The prompt for a conversation, ending where the assistant is to speak. `kwargs` are variables that the
    /// client sets.
    pub(crate) fn render(
        &self,
        turns: &[Turn<'_>],
        kwargs: Option<&Map<String, serde_json::Value>>,
    ) -> Result<String, ApiError> {
        let given = [
            ("messages", Value::from(Serde(turns))),
            ("add_generation_prompt", Value::from(true)),
            // Templates tell "not none" from "not defined".
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let mut variables: Vec<(&str, Value)> = Vec::new();
        variables.extend(
            self.special_tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str()))),
        );
        variables.extend(
            kwargs.into_iter().flatten().map(|(name, value)| (name.as_str(), Value::from(Serde(value)))),
        );
        // Last, so that a client's variables do not replace the conversation.
        variables.extend(given);
        let template = self.environment.get_template(NAME).expect("added when it was compiled");
        template.render(Value::from_pairs(variables)).map_err(|error| {
            let message = format!("the chat template refuses these messages: {}", reason(&error));
            ApiError::of(ErrorCode::TemplateFailed, "messages", message)
        })
    }
}

/// What a template says with `raise_exception`, or what is wrong and where.
fn reason(error: &Error) -> String {
    match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(raised)) => raised.to_owned(),
        _ => error.to_string(),
    }
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// Python's `strftime`; the time is UTC.
fn strftime(now: OffsetDateTime, format: &str) -> Result<String, Error> {
    let bad =
        |error: String| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}"));
    let description = parse_strftime_borrowed(format).map_err(|error| bad(error.to_string()))?;
    now.format(&description).map_err(|error| bad(error.to_string()))
}

/// Python's `json.dumps` with `ensure_ascii=False`. Unlike minijinja's own filter, nothing is escaped for HTML.
// Keyword arguments come by value.
#[expect(clippy::needless_pass_by_value)]
fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Hugging Face's filter has these too; their defaults are what templates use.
    let _: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, OneLine)),
        Some(indent) => {
            let indent = vec![b' '; indent.min(16)];
            let formatter = PrettyFormatter::with_indent(&indent);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter))
        }
    };
    written.map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}")))?;
    Ok(Value::from_safe_string(String::from_utf8(json).expect("serde_json writes UTF-8")))
}

/// JSON as Python writes it: a blank after `,` and `:`.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// `{% generation %}` marks the assistant's tokens for training, and only Hugging Face knows the tag. A
/// condition that always holds does the same for inference, blanks trimmed alike.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(end) = tag.find("%}") else { break };
        let (tag, after) = tag.split_at(end + 2);
        out.push_str(before);
        match tag.trim_matches(|c| "{%-+}".contains(c)).trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
