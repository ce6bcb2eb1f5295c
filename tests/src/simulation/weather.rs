//! How bad a seed is: how often what goes wrong.

use super::chance::{below, between, sometimes};

/// What happens to single messages, how often in a thousand, and how hard.
#[derive(Clone, Debug, Default)]
pub(super) struct Weather {
    /// Messages that take longer than others.
    pub(super) slow: u64,
    /// By at most so much, in milliseconds.
    pub(super) slow_ms: u64,
    /// Requests that never arrive.
    pub(super) request_lost: u64,
    /// Requests that arrive, and whose answers never do.
    pub(super) answer_lost: u64,
    /// Live events that never arrive, arrive twice, or arrive after later ones.
    pub(super) live_lost: u64,
    pub(super) live_twice: u64,
    pub(super) live_late: u64,
    /// Reads that a replica answers which lags behind.
    pub(super) stale_read: u64,
    /// By at most so much, in milliseconds.
    pub(super) stale_ms: u64,
    /// Weights of the troubles that befall processes.
    pub(super) troubles: Vec<(Trouble, u64)>,
    /// The longest time between two troubles, in milliseconds.
    pub(super) pause_ms: u64,
}

/// What befalls a process, or all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It dies. Another one starts.
    Crash,
    /// It stands still for a while.
    Freeze,
    /// The backend and it do not hear each other for a while.
    Cut,
    /// A worker is told to stop. Another one starts.
    Drain,
    /// The backend is away for a while.
    Away,
}

impl Weather {
    pub(super) fn draw() -> Weather {
        Weather {
            slow: sometimes(300),
            slow_ms: between(2..=400),
            request_lost: sometimes(30),
            answer_lost: sometimes(60),
            live_lost: sometimes(200),
            live_twice: sometimes(100),
            live_late: sometimes(200),
            stale_read: sometimes(200),
            stale_ms: between(1..=300),
            troubles: vec![
                (Trouble::Crash, sometimes(10)),
                (Trouble::Freeze, sometimes(10)),
                (Trouble::Cut, sometimes(10)),
                (Trouble::Drain, sometimes(5)),
                (Trouble::Away, sometimes(3)),
            ],
            pause_ms: between(200..=4000),
        }
    }

    pub(super) fn trouble(&self) -> Option<Trouble> {
        let total: u64 = self.troubles.iter().map(|(_, weight)| weight).sum();
        let mut left = below(total);
        self.troubles.iter().find_map(|(trouble, weight)| {
            let hit = left < *weight;
            left = left.saturating_sub(*weight);
            hit.then_some(*trouble)
        })
    }
}
