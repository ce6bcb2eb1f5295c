//! What a tail remembers of requests: enough to filter by model and worker, and to see that events are missing.

use forebay_schemas::{
    event::Body,
    ids::{RequestId, WorkerId},
};
use forebay_streams::log::Recorded;
use std::collections::{HashMap, VecDeque};

/// Requests remembered at once; the oldest are forgotten first, and read again if more of them comes.
const REQUESTS_MAX: usize = 4096;

/// What is known of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Known {
    /// The model's name.
    pub(super) model: Option<String>,
    decoder: Option<WorkerId>,
    prefiller: Option<WorkerId>,
    /// Sequence of its last event.
    seq: u64,
}

impl Known {
    /// Whether a worker has to do with the request now.
    pub(super) fn involves(&self, worker: &WorkerId) -> bool {
        [&self.decoder, &self.prefiller].into_iter().flatten().any(|of_request| of_request == worker)
    }

    fn note(&mut self, Recorded { seq, event }: &Recorded) {
        self.seq = *seq;
        match &event.body {
            Body::RequestAccepted(accepted) => self.model = Some(accepted.model.clone()),
            Body::Claimed(claimed) => {
                self.decoder = Some(claimed.worker.clone());
                self.prefiller = None;
            }
            Body::PrefillClaimed(claimed) => self.prefiller = Some(claimed.worker.clone()),
            Body::TokensGenerated(_) => self.prefiller = None,
            _ => {}
        }
    }
}

/// Requests that are under way.
#[derive(Debug, Default)]
pub(super) struct Requests {
    known: HashMap<RequestId, Known>,
    /// In the order in which they came.
    order: VecDeque<RequestId>,
}

impl Requests {
    pub(super) fn knows(&self, request: RequestId) -> bool {
        self.known.contains_key(&request)
    }

    /// The last sequence known, if an event that follows `previous` does not follow it.
    pub(super) fn missed(&self, request: RequestId, previous: u64) -> Option<u64> {
        self.known.get(&request).map(|known| known.seq).filter(|seq| *seq < previous)
    }

    /// Takes note of events that this tail did not see live.
    pub(super) fn learn<'a>(&mut self, request: RequestId, earlier: impl Iterator<Item = &'a Recorded>) {
        earlier.for_each(|recorded| self.entry(request).note(recorded));
    }

    /// Takes note of an event, and returns what is known with it. After its last event a request is forgotten.
    pub(super) fn note(&mut self, request: RequestId, recorded: &Recorded) -> Known {
        let entry = self.entry(request);
        entry.note(recorded);
        let known = entry.clone();
        if recorded.event.body.is_terminal() {
            self.known.remove(&request);
            self.order.retain(|other| *other != request);
        }
        known
    }

    fn entry(&mut self, request: RequestId) -> &mut Known {
        if !self.known.contains_key(&request) {
            if self.order.len() >= REQUESTS_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.known.remove(&oldest);
            }
            self.order.push_back(request);
        }
        self.known.entry(request).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::event::{Claimed, Event, KvLost, RequestCancelled};

    fn recorded(request: RequestId, seq: u64, body: Body) -> Recorded {
        Recorded { seq, event: Event { request, attempt: 1, time_us: 0, body } }
    }

    fn claimed(worker: &str) -> Body {
        let worker = worker.parse().unwrap();
        Body::Claimed(Claimed { worker, ack_subject: "ack".into(), delivery: 1, engine: None })
    }

    #[test]
    fn a_hole_shows_at_the_next_event() {
        let (mut requests, request) = (Requests::default(), RequestId::new());
        assert_eq!(requests.missed(request, 7), None, "older than this tail");
        requests.note(request, &recorded(request, 9, claimed("decode-1")));
        assert_eq!(requests.missed(request, 9), None);
        assert_eq!(requests.missed(request, 12), Some(9));
    }

    #[test]
    fn a_worker_has_to_do_with_what_it_claimed() {
        let (mut requests, request) = (Requests::default(), RequestId::new());
        requests.learn(request, [recorded(request, 3, claimed("decode-1"))].iter());
        let lost = Body::KvLost(KvLost { reason: "late".into() });
        let known = requests.note(request, &recorded(request, 4, lost));
        assert!(known.involves(&"decode-1".parse().unwrap()));
        let known = requests.note(request, &recorded(request, 5, claimed("decode-2")));
        assert!(!known.involves(&"decode-1".parse().unwrap()));
        let cancelled = Body::RequestCancelled(RequestCancelled { cause: "late".into() });
        requests.note(request, &recorded(request, 6, cancelled));
        assert!(!requests.knows(request));
    }

    #[test]
    fn memory_is_bounded() {
        let mut requests = Requests::default();
        let ids: Vec<_> = (0..REQUESTS_MAX + 10).map(|_| RequestId::new()).collect();
        for id in &ids {
            requests.note(*id, &recorded(*id, 1, claimed("decode-1")));
        }
        assert_eq!((requests.known.len(), requests.order.len()), (REQUESTS_MAX, REQUESTS_MAX));
        assert!(!requests.knows(ids[0]) && requests.knows(ids[10]));
    }
}
