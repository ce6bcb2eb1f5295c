//! A request to look at: in the log on NATS, or in an exported file.

use crate::config::NatsArgs;
use anyhow::{Context, bail};
use forebay_schemas::{
    event::{Body, EngineRef, Event},
    export::{self, Export, FORMAT, Header, ModelFacts, VERSION},
    ids::RequestId,
    kv::LayoutHash,
    lifecycle::Lifecycle,
};
use forebay_streams::{
    Streams,
    environment::now_us,
    log::{LogRef, Recorded},
};
use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    str::FromStr,
};

/// Where a request is.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Log(RequestId),
    File(PathBuf),
}

impl FromStr for Source {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Source, Infallible> {
        Ok(text.parse().map_or_else(|_| Source::File(text.into()), Source::Log))
    }
}

impl Source {
    /// Reads the request; a file needs no NATS.
    pub(crate) async fn load(&self, nats: &NatsArgs) -> anyhow::Result<Export> {
        match self {
            Source::Log(request) => take(&nats.connect("log", "log").await?, *request).await,
            Source::File(path) => read_file(path),
        }
    }
}

/// Finds the log of a request.
pub(crate) async fn find(streams: &Streams, request: RequestId) -> anyhow::Result<LogRef> {
    match streams.log.find(request).await? {
        Some(log) => Ok(log),
        None => bail!("no request {request} in the log: never accepted here, or older than the log keeps"),
    }
}

/// All events of a log so far.
pub(crate) async fn events_of(streams: &Streams, log: &LogRef) -> anyhow::Result<Vec<(u64, Event)>> {
    let recorded = streams.log.read(log, 0).await?;
    Ok(recorded.into_iter().map(|Recorded { seq, event }| (seq, event)).collect())
}

/// Takes a request out of the log, with what is known of the model that ran it.
pub(crate) async fn take(streams: &Streams, request: RequestId) -> anyhow::Result<Export> {
    let log = find(streams, request).await?;
    let events = events_of(streams, &log).await?;
    let header = Header {
        format: FORMAT.to_owned(),
        version: VERSION,
        forebay: env!("CARGO_PKG_VERSION").to_owned(),
        request,
        gateway: log.gateway,
        model: model_facts(streams, &events).await?,
        exported_us: now_us(),
    };
    Ok(Export { header, events })
}

/// Reads an exported file.
pub(crate) fn read_file(path: &Path) -> anyhow::Result<Export> {
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            anyhow::anyhow!("{} is neither a request id nor a file that is there", path.display())
        }
        _ => anyhow::Error::new(error).context(path.display().to_string()),
    })?;
    export::read(&text).with_context(|| path.display().to_string())
}

/// Folds the first `count` events. An error names the event that does not fit.
pub(crate) fn fold(events: &[(u64, Event)], count: usize) -> anyhow::Result<Lifecycle> {
    let (first, rest) = events[..count].split_first().context("a log without events")?;
    let misfit = |number: usize, (seq, event): &(u64, Event)| {
        let name = event.body.name();
        format!("event {number} of {} ({name}, sequence {seq}) does not fit", events.len())
    };
    let mut state = Lifecycle::begin(&first.1).with_context(|| misfit(1, first))?;
    for (number, recorded) in (2..).zip(rest) {
        state.apply(&recorded.1).with_context(|| misfit(number, recorded))?;
    }
    Ok(state)
}

/// What the log says of the engines that ran the request: each once, in order; the weights where it names them.
pub(crate) fn engines(events: &[(u64, Event)]) -> Vec<(LayoutHash, Option<String>)> {
    let mut engines: Vec<(LayoutHash, Option<String>)> = Vec::new();
    for (_, event) in events {
        let (hash, weights) = match &event.body {
            Body::Claimed(claimed) => match &claimed.engine {
                Some(EngineRef { layout_hash, weights }) => (*layout_hash, Some(weights.clone())),
                None => continue,
            },
            Body::KvReady(ready) => (ready.handle.layout_hash, None),
            _ => continue,
        };
        match engines.iter_mut().find(|(known, _)| *known == hash) {
            Some((_, known)) => *known = known.take().or(weights),
            None => engines.push((hash, weights)),
        }
    }
    engines
}

/// What the log says, and else what the catalog says now.
async fn model_facts(streams: &Streams, events: &[(u64, Event)]) -> anyhow::Result<ModelFacts> {
    let mut facts = ModelFacts::default();
    if let Some((_, Event { body: Body::RequestAccepted(accepted), .. })) = events.first() {
        facts.name.clone_from(&accepted.model);
    }
    if let Some((hash, weights)) = engines(events).pop() {
        (facts.layout_hash, facts.weights) = (Some(hash), weights);
    }
    let card = streams.catalog.models().await?.borrow().get(&facts.name).cloned();
    if let Some(card) = card
        && facts.weights.is_none()
        && facts.layout_hash.is_none_or(|hash| hash == card.layout_hash)
    {
        (facts.layout_hash, facts.weights) = (Some(card.layout_hash), Some(card.weights.clone()));
    }
    Ok(facts)
}
