//! A whole request as one portable text, for a bug report: JSON lines, first a header, then every event of its log.
//! Nothing is lost: what is read back is what was in the log. It holds the prompt's tokens and the answer's text.

use crate::{
    event::Event,
    ids::{GatewayId, RequestId},
    kv::LayoutHash,
    wire,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What the header calls the format.
pub const FORMAT: &str = "forebay-request";

/// The version of the format that is written here. Events have versions of their own.
pub const VERSION: u32 = 1;

/// A request taken out of the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Export {
    /// Where it is from.
    pub header: Header,
    /// Its events in order, each with its sequence in the stream that it was read from.
    pub events: Vec<(u64, Event)>,
}

/// The first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Version of the Forebay that wrote it.
    pub forebay: String,
    /// Which request.
    pub request: RequestId,
    /// The gateway that accepted it.
    pub gateway: GatewayId,
    /// The model that it was for.
    pub model: ModelFacts,
    /// When it was taken out, in microseconds since the Unix epoch.
    pub exported_us: u64,
}

/// What is known of the model that ran a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// The name that the client used; empty if the beginning of the log is lost.
    pub name: String,
    /// What it computes; none if neither the log nor the registry says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout_hash: Option<LayoutHash>,
    /// The weights as they were run, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
}

/// A text that is no export, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct BadExport {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: String,
}

/// An event's line: the event as `forebay log --json` shows it.
#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    version: u16,
    #[serde(flatten)]
    event: &'a Event,
}

/// What a line must say before the rest of it is looked at.
#[derive(Deserialize)]
struct LineHeader {
    seq: u64,
    #[serde(rename = "type")]
    name: String,
    version: u16,
}

/// Writes an export, a line for the header and for each event.
pub fn write(export: &Export) -> String {
    let header = serde_json::to_string(&export.header).expect("plain data always encodes");
    let lines = export.events.iter().map(|(seq, event)| line(*seq, event));
    std::iter::once(header).chain(lines).fold(String::new(), |text, line| text + &line + "\n")
}

/// One event as a line, without the line's end.
pub fn line(seq: u64, event: &Event) -> String {
    let line = Line { seq, version: wire::version(&event.body), event };
    serde_json::to_string(&line).expect("plain data always encodes")
}

/// Reads an export back. Whether its events fit together is for [`crate::lifecycle`] to say.
pub fn read(text: &str) -> Result<Export, BadExport> {
    let mut lines = text.lines().enumerate().map(|(index, line)| (index + 1, line));
    let first = lines.next().map_or("", |(_, first)| first);
    let header = read_header(first).map_err(|problem| BadExport { line: 1, problem })?;
    let mut events = Vec::new();
    let mut before = 0;
    for (number, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let bad = |problem| BadExport { line: number, problem };
        let (seq, event) = read_event(line).map_err(bad)?;
        if event.request != header.request {
            return Err(bad(format!(
                "an event of request {} among those of {}",
                event.request, header.request
            )));
        }
        if seq <= before {
            return Err(bad(format!("sequence {seq} after {before}: lines are missing or out of order")));
        }
        before = seq;
        events.push((seq, event));
    }
    match events.is_empty() {
        true => Err(BadExport { line: 2, problem: "an export without events".into() }),
        false => Ok(Export { header, events }),
    }
}

fn read_header(line: &str) -> Result<Header, String> {
    let value: Value = serde_json::from_str(line).map_err(|_| not_an_export())?;
    if value["format"] != FORMAT {
        return Err(not_an_export());
    }
    if value["version"] != VERSION {
        let found = &value["version"];
        return Err(format!(
            "version {found} of the format is not known here: this build reads version {VERSION}"
        ));
    }
    serde_json::from_value(value).map_err(|error| format!("not a header: {error}"))
}

fn not_an_export() -> String {
    format!("not an exported request: it should begin with {{\"format\":\"{FORMAT}\"")
}

fn read_event(line: &str) -> Result<(u64, Event), String> {
    let LineHeader { seq, name, version } =
        serde_json::from_str(line).map_err(|error| format!("not an event: {error}"))?;
    let event: Event = serde_json::from_str(line).map_err(|error| match error.to_string() {
        unknown if unknown.contains("unknown variant") => unknown_here(&name, version),
        other => format!("not a {name}: {other}"),
    })?;
    match version == wire::version(&event.body) {
        true => Ok((seq, event)),
        false => Err(unknown_here(&name, version)),
    }
}

fn unknown_here(name: &str, version: u16) -> String {
    format!("event type {name} version {version} is not known here: this build is older than the writer's")
}
