//! Formats that outputs are held to, as grammars of llguidance. Gateways compile a format over single bytes, to refuse what can't
//! be followed, and workers over their model's tokens: the same way and within the same bounds.

use crate::sampling::OutputFormat;
use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, TokEnv},
};
use serde_json::{Map, Value, json};
use std::{collections::HashMap, fmt};

/// Bytes of a schema.
const SCHEMA_BYTES_MAX: usize = 64 << 10;

/// Parts of a schema once every reference is replaced by what it refers to.
const PARTS_MAX: u64 = 20_000;

/// How deep they are nested.
const DEPTH_MAX: u32 = 200;

/// Entries of one object or list.
const ENTRIES_MAX: usize = 1000;

/// Bytes of a regular expression.
const PATTERN_BYTES_MAX: usize = 1024;

/// What is said of a problem, in bytes.
const PROBLEM_BYTES_MAX: usize = 300;

/// A format that no output can be held to, or one that an output has left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FormatError(String);

impl FormatError {
    /// The first line of what somebody says.
    pub fn new(problem: impl fmt::Display) -> FormatError {
        let mut text = problem.to_string();
        text.truncate(text.find('\n').unwrap_or(text.len()));
        text.truncate(text.floor_char_boundary(PROBLEM_BYTES_MAX));
        FormatError(text)
    }
}

/// Compiles formats for one set of tokens.
pub struct Formats(ParserFactory);

impl Formats {
    /// For these tokens.
    pub fn new(tokens: &TokEnv) -> Result<Formats, FormatError> {
        let mut factory = ParserFactory::new_simple(tokens).map_err(FormatError::new)?;
        factory.quiet();
        let limits = factory.limits_mut();
        // Some 30 MB for each output, and milliseconds for each token.
        (limits.max_lexer_states, limits.step_lexer_fuel) = (20_000, 50_000);
        limits.verbose_errors = false;
        Ok(Formats(factory))
    }

    /// For single bytes: enough to tell formats that can be followed from others.
    pub fn of_bytes() -> Result<Formats, FormatError> {
        Formats::new(&ApproximateTokEnv::single_byte_env())
    }

    /// The grammar of a format, at its beginning. Takes milliseconds; some schemas take more.
    pub fn compile(&self, format: &OutputFormat) -> Result<Matcher, FormatError> {
        let parser = self.0.create_parser(grammar(format)?).map_err(FormatError::new)?;
        let mut matcher = Matcher::new(Ok(parser));
        // Some problems show only here.
        matcher.compute_mask().map_err(FormatError::new)?;
        Ok(matcher)
    }
}

/// Between its tokens JSON may have a line's end and its indentation, but no endless white space: small models lose themselves
/// there.
fn grammar(format: &OutputFormat) -> Result<TopLevelGrammar, FormatError> {
    let mut schema = match format {
        OutputFormat::JsonObject => Map::from_iter([("type".to_owned(), "object".into())]),
        OutputFormat::JsonSchema { schema } => check(schema)?.clone(),
    };
    schema.insert("x-guidance".to_owned(), json!({ "whitespace_pattern": r"\x0A?[\x20\x09]{0,24}" }));
    Ok(TopLevelGrammar::from_json_schema(Value::Object(schema)))
}

/// A schema that does not take all memory or time of whoever compiles it: references may make much of little.
fn check(schema: &Value) -> Result<&Map<String, Value>, FormatError> {
    let Some(fields) = schema.as_object() else {
        return Err(FormatError::new("the schema is not an object"));
    };
    if fields.contains_key("x-guidance") {
        return Err(FormatError::new("the schema has x-guidance, which is not for clients"));
    }
    let bytes = schema.to_string().len();
    if bytes > SCHEMA_BYTES_MAX {
        return Err(FormatError::new(format!(
            "the schema has {bytes} bytes, and may have {SCHEMA_BYTES_MAX}"
        )));
    }
    let mut walk = Walk { root: schema, known: HashMap::new() };
    let Extent { parts, .. } = walk.extent(schema, 0)?;
    if parts > PARTS_MAX {
        let most = format!("and may have {PARTS_MAX}");
        return Err(FormatError::new(format!(
            "with its references replaced the schema has {parts} parts, {most}"
        )));
    }
    Ok(fields)
}

/// How large a part of a schema is, its references replaced.
#[derive(Clone, Copy)]
struct Extent {
    parts: u64,
    depth: u32,
}

struct Walk<'a> {
    root: &'a Value,
    /// Of what references name; none while it is being looked at, so that circles end.
    known: HashMap<&'a str, Option<Extent>>,
}

impl<'a> Walk<'a> {
    fn extent(&mut self, part: &'a Value, at: u32) -> Result<Extent, FormatError> {
        let too_deep = || FormatError::new(format!("the schema is nested more than {DEPTH_MAX} deep"));
        if at > DEPTH_MAX {
            return Err(too_deep());
        }
        let mut all = Extent { parts: 1, depth: 1 };
        let mut add = |of: Extent| {
            all = Extent { parts: all.parts.saturating_add(of.parts), depth: all.depth.max(of.depth + 1) };
        };
        let count = match part {
            Value::Object(fields) => {
                for (name, value) in fields {
                    if let ("$ref", Some(target)) = (&name[..], value.as_str()) {
                        add(self.target(target, at)?);
                    }
                    bound_patterns(name, value)?;
                    add(self.extent(value, at + 1)?);
                }
                fields.len()
            }
            Value::Array(items) => {
                for item in items {
                    add(self.extent(item, at + 1)?);
                }
                items.len()
            }
            _ => 0,
        };
        if count > ENTRIES_MAX {
            return Err(FormatError::new(format!(
                "an object or list of the schema has {count} entries, and may have {ENTRIES_MAX}"
            )));
        }
        if at + all.depth > DEPTH_MAX { Err(too_deep()) } else { Ok(all) }
    }

    fn target(&mut self, reference: &'a str, at: u32) -> Result<Extent, FormatError> {
        const NOTHING: Extent = Extent { parts: 1, depth: 0 };
        if let Some(known) = self.known.get(reference) {
            return Ok(known.unwrap_or(NOTHING));
        }
        let pointer = reference.strip_prefix('#').ok_or_else(|| {
            FormatError::new(format!(
                "the schema refers to {reference:?}; it can refer to parts of itself, as #/$defs/…"
            ))
        })?;
        // What is not there is said when it is compiled.
        let Some(target) = self.root.pointer(pointer) else { return Ok(NOTHING) };
        self.known.insert(reference, None);
        let extent = self.extent(target, at + 1)?;
        self.known.insert(reference, Some(extent));
        Ok(extent)
    }
}

fn bound_patterns(name: &str, value: &Value) -> Result<(), FormatError> {
    let bytes = match (name, value) {
        ("pattern", Value::String(pattern)) => pattern.len(),
        ("patternProperties", Value::Object(patterns)) => patterns.keys().map(String::len).max().unwrap_or(0),
        _ => 0,
    };
    if bytes <= PATTERN_BYTES_MAX {
        return Ok(());
    }
    let most = format!("and may have {PATTERN_BYTES_MAX}");
    Err(FormatError::new(format!("a regular expression of the schema has {bytes} bytes, {most}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compile(schema: Value) -> Result<(), String> {
        let formats = Formats::of_bytes().unwrap();
        formats.compile(&OutputFormat::JsonSchema { schema }).map(drop).map_err(|error| error.to_string())
    }

    #[test]
    fn schemas_of_everyday_are_followed() {
        let tree = json!({
            "type": "object",
            "properties": {
                "name": { "type": "string", "pattern": "^[a-z]+$" },
                "children": { "type": "array", "items": { "$ref": "#" } },
                "kind": { "$ref": "#/$defs/kind" },
            },
            "$defs": { "kind": { "enum": ["a", "b"], "description": "said with it" } },
            "required": ["name", "kind"],
            "additionalProperties": false,
        });
        compile(tree).unwrap();
        compile(json!({})).unwrap();
        let formats = Formats::of_bytes().unwrap();
        formats.compile(&OutputFormat::JsonObject).unwrap();
    }

    /// Each of these takes all memory, the stack, or seconds where nobody looks first.
    #[test]
    fn little_that_makes_much_is_refused() {
        let level = |next: u32| {
            let to = json!({ "type": "object", "$ref": format!("#/$defs/a{next}") });
            json!({ "type": "object", "properties": { "x": to, "y": to } })
        };
        let mut defs: Map<String, Value> = (0..30).map(|at| (format!("a{at}"), level(at + 1))).collect();
        defs.insert("a30".into(), json!({ "type": "object" }));
        let doubled = json!({ "$ref": "#/$defs/a0", "$defs": defs });
        assert!(compile(doubled).unwrap_err().contains("parts"));

        let link = |at: u32| (format!("a{at}"), json!({ "$ref": format!("#/$defs/a{}", at + 1) }));
        let mut defs: Map<String, Value> = (0..800).map(link).collect();
        defs.insert("a800".into(), json!({ "type": "object" }));
        assert!(compile(json!({ "$ref": "#/$defs/a0", "$defs": defs })).unwrap_err().contains("nested"));

        let names: Vec<String> = (0..6000).map(|at| format!("n{at}")).collect();
        assert!(compile(json!({ "type": "object", "required": names })).unwrap_err().contains("entries"));
        let pattern = r"\pL".repeat(1000);
        assert!(compile(json!({ "type": "string", "pattern": pattern })).unwrap_err().contains("regular"));
        let large = json!({ "enum": ["x".repeat(70_000)] });
        assert!(compile(large).unwrap_err().contains("bytes"));
    }

    #[test]
    fn what_is_wrong_is_said_in_a_line() {
        for schema in [
            json!(3),
            json!({ "type": "cloud" }),
            json!({ "$ref": "https://example.com/schema" }),
            json!({ "$ref": "#/$defs/nothing" }),
            json!({ "type": "integer", "minimum": "é".repeat(60) }),
            json!({ "x-guidance": { "lenient": true }, "not": {} }),
            json!({ "$ref": "#" }),
        ] {
            let problem = compile(schema.clone()).unwrap_err();
            assert!(!problem.contains('\n') && problem.len() <= PROBLEM_BYTES_MAX, "{schema}: {problem}");
        }
    }
}
