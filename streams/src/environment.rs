//! Where time and randomness come from: the machine, or, within a simulation, a seed and tokio's paused clock. All
//! that decides anything asks here, so that a simulated run repeats itself exactly.

mod process;
mod thread;

pub use process::{Condition, Process, in_process, spawn};
pub use thread::{off_thread, pause};

use forebay_schemas::ids::RequestId;
use std::{
    cell::Cell,
    time::{SystemTime, UNIX_EPOCH},
};
use tokio::time::Instant;

#[derive(Clone, Copy)]
struct Simulated {
    began: Instant,
    began_us: u64,
    /// State of the generator.
    state: u64,
}

thread_local! {
    static SIMULATED: Cell<Option<Simulated>> = const { Cell::new(None) };
}

/// Ends the simulation on this thread when dropped.
#[derive(Debug)]
pub struct Simulation(());

impl Drop for Simulation {
    fn drop(&mut self) {
        SIMULATED.set(None);
    }
}

/// Begins a simulation on this thread: from here on, time is tokio's (which should be paused) counted from
/// `began_us`, and randomness follows from the seed. Call it within the runtime.
pub fn simulate(seed: u64, began_us: u64) -> Simulation {
    SIMULATED.set(Some(Simulated { began: Instant::now(), began_us, state: seed }));
    Simulation(())
}

/// Whether this thread simulates.
pub fn is_simulated() -> bool {
    SIMULATED.get().is_some()
}

/// Now, in microseconds since the Unix epoch.
pub fn now_us() -> u64 {
    match SIMULATED.get() {
        Some(simulated) => {
            let true_us = simulated.began_us + simulated.began.elapsed().as_micros() as u64;
            true_us.saturating_add_signed(process::skew_us())
        }
        None => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64),
    }
}

/// 64 random bits: from the system, hence not to be guessed, unless simulated.
pub fn random() -> u64 {
    match SIMULATED.get() {
        Some(mut simulated) => {
            // SplitMix64: <https://prng.di.unimi.it/splitmix64.c>.
            simulated.state = simulated.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            SIMULATED.set(Some(simulated));
            let mut z = simulated.state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }
        None => uuid::Uuid::new_v4().as_u64_pair().0 ^ uuid::Uuid::new_v4().as_u64_pair().1,
    }
}

/// A fresh id for a request accepted now.
pub fn request_id() -> RequestId {
    let mut bits = [0; 10];
    bits[..8].copy_from_slice(&random().to_be_bytes());
    bits[8..].copy_from_slice(&random().to_be_bytes()[..2]);
    RequestId::from_parts(now_us() / 1000, &bits)
}

/// A fresh name: the prefix and eight random hexadecimal digits.
pub fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(prefix: &str) -> T {
    format!("{prefix}-{:08x}", random() as u32).parse().expect("prefix fits a subject token")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn a_simulation_repeats_itself() {
        let run = async || {
            let _simulation = simulate(7, 1_000_000);
            let before = (random(), request_id(), now_us());
            tokio::time::sleep(Duration::from_millis(3)).await;
            (before, random(), now_us())
        };
        let first = run().await;
        assert_eq!(run().await, first);
        assert_eq!((first.0.2, first.2), (1_000_000, 1_003_000));
        assert!(!is_simulated());
    }
}
