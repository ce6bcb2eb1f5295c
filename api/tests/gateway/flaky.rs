//! A backend whose log can be switched off.

use async_trait::async_trait;
use forebay_schemas::{
    event::Event,
    ids::{GatewayId, RequestId},
};
use forebay_streams::{
    StreamError, Streams,
    log::{AppendError, EventLog, Live, LogRef, Recorded},
    memory,
};
use futures::stream::BoxStream;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Breaks the log down, and repairs it.
#[derive(Clone, Default)]
pub(crate) struct Switch(Arc<AtomicBool>);

impl Switch {
    pub(crate) fn break_down(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn repair(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    fn check(&self) -> Result<(), StreamError> {
        if self.0.load(Ordering::Relaxed) { Err(StreamError::new("test", "switched off")) } else { Ok(()) }
    }
}

pub(crate) fn streams() -> (Streams, Switch) {
    let streams = memory::streams();
    let switch = Switch::default();
    let log = Arc::new(FlakyLog { log: streams.log.clone(), switch: switch.clone() });
    (Streams { log, ..streams }, switch)
}

struct FlakyLog {
    log: Arc<dyn EventLog>,
    switch: Switch,
}

#[async_trait]
impl EventLog for FlakyLog {
    async fn append(&self, log: &LogRef, after: u64, event: &Event) -> Result<u64, AppendError> {
        self.switch.check()?;
        self.log.append(log, after, event).await
    }

    async fn begin(&self, log: &LogRef, event: &Event) -> Result<u64, AppendError> {
        self.switch.check()?;
        self.log.begin(log, event).await
    }

    async fn remove(&self, log: &LogRef) -> Result<(), StreamError> {
        self.switch.check()?;
        self.log.remove(log).await
    }

    async fn read(&self, log: &LogRef, after: u64) -> Result<Vec<Recorded>, StreamError> {
        self.switch.check()?;
        self.log.read(log, after).await
    }

    async fn last_seq(&self, log: &LogRef) -> Result<u64, StreamError> {
        self.switch.check()?;
        self.log.last_seq(log).await
    }

    async fn find(&self, request: RequestId) -> Result<Option<LogRef>, StreamError> {
        self.switch.check()?;
        self.log.find(request).await
    }

    async fn tail(&self, gateway: &GatewayId) -> Result<BoxStream<'static, Live>, StreamError> {
        self.switch.check()?;
        self.log.tail(gateway).await
    }

    async fn watch(&self, log: &LogRef) -> Result<BoxStream<'static, Live>, StreamError> {
        self.switch.check()?;
        self.log.watch(log).await
    }

    async fn tail_all(&self) -> Result<BoxStream<'static, Live>, StreamError> {
        self.switch.check()?;
        self.log.tail_all().await
    }
}
