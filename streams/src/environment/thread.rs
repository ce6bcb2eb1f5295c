//! Work that blocks. In a simulation there is one thread at a time: work that is to be interrupted has one of its own,
//! which runs while the simulation waits, and waits while the simulation runs.

use super::{SIMULATED, Simulated, is_simulated, random, spawn};
use std::{
    any::Any,
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::mpsc::{Receiver, Sender, channel},
    time::Duration,
};

/// One in that many is interrupted in a simulation; the others pass in no time.
const INTERRUPTED: u64 = 3;

/// One pause in that many is long: longer than any lease.
const LONG: u64 = 100;

/// A long pause, in milliseconds, is shorter than this.
const LONG_MS: u64 = 12_000;

/// A short one than this.
const SHORT_MS: u64 = 20;

/// Thrown where the simulation has ended before the work did.
struct Abandoned;

/// The thread's ends of the channels over which the turn, and with it the state of the simulation, goes to and fro.
struct Turns {
    mine: Receiver<Simulated>,
    paused: Box<dyn Fn()>,
}

thread_local! {
    static TURNS: RefCell<Option<Turns>> = const { RefCell::new(None) };
}

enum Report<T> {
    Paused(Option<Simulated>),
    Done(Option<Simulated>, Result<T, Box<dyn Any + Send>>),
}

/// Runs what blocks on a thread that may, and waits for it.
///
/// # Panics
/// If `work` does.
pub async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let done = if !is_simulated() {
        tokio::task::spawn_blocking(work).await
    } else if random().is_multiple_of(INTERRUPTED) {
        // A task, since such work goes on when nobody waits for it any more.
        spawn(interrupted(work)).await
    } else {
        return work();
    };
    match done {
        Ok(done) => done,
        Err(error) => resume_unwind(error.into_panic()),
    }
}

/// In a simulation, the rest of the world may go on here; otherwise nothing happens. For work that runs
/// [`off_thread`], where it would be worst to be interrupted.
pub fn pause() {
    TURNS.with_borrow(|turns| {
        let Some(turns) = turns else { return };
        (turns.paused)();
        match turns.mine.recv() {
            Ok(state) => SIMULATED.set(Some(state)),
            Err(_) => resume_unwind(Box::new(Abandoned)),
        }
    });
}

async fn interrupted<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (yours, mine) = channel();
    let (report, reports) = channel();
    let clock = tokio::runtime::Handle::current();
    let run = move || {
        let _clock = clock.enter();
        take_turns(mine, &report, work);
    };
    std::thread::Builder::new().name("off-thread".into()).spawn(run).expect("a thread can be started");
    loop {
        yours.send(SIMULATED.get().expect("within a simulation")).expect("it waits for its turn");
        match reports.recv().expect("it reports whatever happens") {
            Report::Paused(state) => SIMULATED.set(state),
            Report::Done(state, done) => {
                SIMULATED.set(state);
                return done.unwrap_or_else(|panic| resume_unwind(panic));
            }
        }
        let longest = if random().is_multiple_of(LONG) { LONG_MS } else { SHORT_MS };
        tokio::time::sleep(Duration::from_millis(random() % longest)).await;
    }
}

fn take_turns<T: Send + 'static>(
    mine: Receiver<Simulated>,
    report: &Sender<Report<T>>,
    work: impl FnOnce() -> T,
) {
    let Ok(state) = mine.recv() else { return };
    SIMULATED.set(Some(state));
    let paused = report.clone();
    let paused = Box::new(move || drop(paused.send(Report::Paused(SIMULATED.get()))));
    TURNS.set(Some(Turns { mine, paused }));
    let done = catch_unwind(AssertUnwindSafe(work));
    let _ = report.send(Report::Done(SIMULATED.get(), done));
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn the_world_goes_on_while_work_pauses() {
        let _simulation = super::super::simulate(1, 0);
        let begun = Instant::now();
        let work = || {
            let before = Instant::now();
            (0..20).for_each(|_| pause());
            (before, Instant::now(), random())
        };
        let (before, after, drawn) = interrupted(work).await;
        assert_eq!(before, begun);
        assert!(after > before && after == Instant::now(), "the clock is the simulation's");
        assert_ne!(drawn, random());
    }

    #[tokio::test(start_paused = true)]
    async fn work_outlives_nobody() {
        let _simulation = super::super::simulate(1, 0);
        let work = || (0..1000).for_each(|_| pause());
        let waited = tokio::time::timeout(Duration::from_millis(50), interrupted(work)).await;
        assert!(waited.is_err());
    }
}
