//! Running a script of `tests/python`, which uses the official client. Every script prints one JSON object a line
//! for each answer that it got, and fails with a traceback.

use crate::{Answer, files};
use forebay_schemas::{event::FinishReason, ids::RequestId, openai::TokenUsage};
use serde::Deserialize;
use serde_json::Value;
use std::{
    path::PathBuf,
    process::{Command, Stdio},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Child,
};

/// A line that a script printed.
#[derive(Debug, Deserialize)]
struct Line {
    /// `chatcmpl-…`.
    request: String,
    text: String,
    finish: Option<FinishReason>,
    usage: Option<TokenUsage>,
    #[serde(flatten)]
    more: Value,
}

/// An answer that a script got, and what it says of it besides.
#[derive(Debug)]
pub struct Reported {
    /// The answer.
    pub answer: Answer,
    /// Further fields.
    pub more: Value,
}

/// The Python that has the client.
fn python() -> PathBuf {
    let python = files::checkout().join(".forebay/bin/python");
    let has_client =
        Command::new(&python).args(["-c", "import openai"]).output().is_ok_and(|done| done.status.success());
    assert!(
        has_client,
        "the official OpenAI client is not installed: run `make test` or `scripts/setup.sh test`"
    );
    python
}

/// The command that runs a script against a gateway.
///
/// # Panics
/// If the client is not installed.
pub fn command(script: &str, url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(python());
    command.arg(files::checkout().join("tests/python").join(script)).arg(format!("{url}/v1")).args(arguments);
    command.env("NO_PROXY", "127.0.0.1").env("PYTHONDONTWRITEBYTECODE", "1").env("PYTHONUNBUFFERED", "1");
    command
}

/// Runs a script to its end, and returns the answers that it got.
///
/// # Panics
/// If it fails.
pub async fn run(script: &str, url: &str, arguments: &[&str]) -> Vec<Reported> {
    let mut command = tokio::process::Command::from(command(script, url, arguments));
    let output =
        crate::soon("the end of a script", command.kill_on_drop(true).output()).await.expect("Python runs");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script} {arguments:?} failed:\n{out}\n{err}");
    out.lines().map(reported).collect()
}

/// Starts a script, and returns it with the first answer that it reports.
///
/// # Panics
/// If it reports none.
pub async fn started(script: &str, url: &str, arguments: &[&str]) -> (Child, Reported) {
    let mut command = tokio::process::Command::from(command(script, url, arguments));
    let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("Python runs");
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
    let line = crate::soon("a first answer", lines.next_line()).await.expect("UTF-8").expect("a line");
    (child, reported(&line))
}

fn reported(line: &str) -> Reported {
    let Line { request, text, finish, usage, more } =
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let request: RequestId = request.parse().expect("the id of a request");
    Reported { answer: Answer { request, status: 200, text, finish, usage, error: None }, more }
}
