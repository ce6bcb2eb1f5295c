//! Where requests are, as their logs tell it live: to hit the process that has one, at the moment that matters. What
//! is lost of it (while NATS is away) is no harm: checks read the logs themselves.

use super::fault::Part;
use forebay_schemas::{event::Body, ids::RequestId};
use forebay_streams::{Streams, log::Live};
use futures::StreamExt;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};
use tokio::{sync::broadcast, task::JoinHandle};

/// Sightings kept for one that aims; older ones are of no use.
const KEPT: usize = 16;

/// An event, just stored, and who has its request.
#[derive(Clone, Debug)]
pub struct Sighting {
    /// The event's name.
    pub event: &'static str,
    has: Holders,
}

/// The processes that have a request.
#[derive(Clone, Debug, Default)]
struct Holders {
    gateway: String,
    decode: Option<String>,
    prefill: Option<String>,
}

impl Sighting {
    /// The process of that kind that has the request.
    pub fn holder(&self, part: Part) -> Option<&str> {
        match part {
            Part::Gateway => Some(&self.has.gateway),
            Part::Decode => self.has.decode.as_deref(),
            Part::Prefill => self.has.prefill.as_deref(),
        }
    }
}

/// All requests seen.
pub struct Trail {
    requests: Arc<Mutex<HashMap<RequestId, Holders>>>,
    sightings: broadcast::Sender<Sighting>,
    following: JoinHandle<()>,
}

impl Trail {
    /// Follows all logs.
    pub async fn follow(streams: &Streams) -> anyhow::Result<Trail> {
        let mut live = streams.log.tail_all().await?;
        let requests = Arc::<Mutex<HashMap<RequestId, Holders>>>::default();
        let (sightings, _) = broadcast::channel(KEPT);
        let (seen, sender) = (requests.clone(), sightings.clone());
        let following = tokio::spawn(async move {
            while let Some(event) = live.next().await {
                // Nobody may be aiming.
                let _ = sender.send(see(&seen, &event));
            }
        });
        Ok(Trail { requests, sightings, following })
    }

    /// What is seen from now on.
    pub fn sightings(&self) -> broadcast::Receiver<Sighting> {
        self.sightings.subscribe()
    }

    /// All requests that were seen.
    pub fn requests(&self) -> Vec<RequestId> {
        self.requests.lock().expect("no panics while held").keys().copied().collect()
    }
}

impl Drop for Trail {
    fn drop(&mut self) {
        self.following.abort();
    }
}

fn see(requests: &Mutex<HashMap<RequestId, Holders>>, live: &Live) -> Sighting {
    let mut requests = requests.lock().expect("no panics while held");
    let has = requests.entry(live.log.request).or_default();
    has.gateway = live.log.gateway.to_string();
    match &live.recorded.event.body {
        Body::Claimed(claimed) => {
            has.decode = Some(claimed.worker.to_string());
            has.prefill = None;
        }
        Body::PrefillClaimed(claimed) => has.prefill = Some(claimed.worker.to_string()),
        _ => {}
    }
    Sighting { event: live.recorded.event.body.name(), has: has.clone() }
}
