//! A process within a simulation: tasks that stand still, die, or have a clock that is off, together.
//!
//! Outside of a simulation there is one process, and nothing here does anything.

use std::{
    cell::RefCell,
    future::poll_fn,
    sync::{Arc, Mutex},
    task::{Poll, Waker},
};
use tokio::{sync::Notify, task::JoinHandle};

/// How a simulated process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It runs.
    Runs,
    /// It stands still, as after SIGSTOP, and may go on.
    Stands,
    /// It stands still for ever.
    Dead,
}

/// A simulated process.
#[derive(Clone, Debug)]
pub struct Process(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    skew_us: i64,
    condition: Mutex<Condition>,
    /// Tasks that were woken while it stood still.
    waiting: Mutex<Vec<Waker>>,
    died: Notify,
}

thread_local! {
    static CURRENT: RefCell<Option<Process>> = const { RefCell::new(None) };
}

impl Process {
    /// A process that runs, with a clock that is off by that much.
    pub fn new(skew_us: i64) -> Process {
        Process(Arc::new(Shared {
            skew_us,
            condition: Mutex::new(Condition::Runs),
            waiting: Mutex::default(),
            died: Notify::new(),
        }))
    }

    /// The process whose task is being polled.
    pub fn current() -> Option<Process> {
        CURRENT.with_borrow(Clone::clone)
    }

    /// How it is.
    pub fn condition(&self) -> Condition {
        *self.0.condition.lock().expect("no panics while held")
    }

    /// Stops it, lets it go on, or kills it. The dead stay dead.
    pub fn set(&self, condition: Condition) {
        let mut now = self.0.condition.lock().expect("no panics while held");
        if *now == Condition::Dead {
            return;
        }
        *now = condition;
        drop(now);
        match condition {
            Condition::Runs => {
                let waiting = std::mem::take(&mut *self.0.waiting.lock().expect("no panics while held"));
                waiting.into_iter().for_each(Waker::wake);
            }
            Condition::Stands => {}
            Condition::Dead => self.0.died.notify_waiters(),
        }
    }

    /// Resolves once it is dead.
    pub async fn died(&self) {
        let died = self.0.died.notified();
        if self.condition() != Condition::Dead {
            died.await;
        }
    }

    /// Runs a future as a part of the process: it is polled only while that runs.
    pub async fn run<F: Future>(&self, future: F) -> F::Output {
        let mut future = Box::pin(future);
        poll_fn(|context| match self.condition() {
            Condition::Runs => {
                let outer = CURRENT.replace(Some(self.clone()));
                let polled = future.as_mut().poll(context);
                CURRENT.set(outer);
                polled
            }
            Condition::Stands => {
                self.0.waiting.lock().expect("no panics while held").push(context.waker().clone());
                Poll::Pending
            }
            Condition::Dead => Poll::Pending,
        })
        .await
    }
}

/// How far the clock of the current process is off.
pub(super) fn skew_us() -> i64 {
    CURRENT.with_borrow(|current| current.as_ref().map_or(0, |process| process.0.skew_us))
}

/// A future that stays a part of the current process wherever it is spawned.
pub fn in_process<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let process = Process::current();
    async move {
        match process {
            None => future.await,
            Some(process) => process.run(future).await,
        }
    }
}

/// [`tokio::spawn`], within the current process.
pub fn spawn<F: Future<Output: Send> + Send + 'static>(future: F) -> JoinHandle<F::Output> {
    tokio::spawn(in_process(future))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::atomic::{AtomicU32, Ordering},
        time::Duration,
    };
    use tokio::time::sleep;

    #[tokio::test(start_paused = true)]
    async fn a_process_stands_still_as_a_whole() {
        let (process, ticks) = (Process::new(0), Arc::new(AtomicU32::new(0)));
        let count = ticks.clone();
        let tick = async move {
            loop {
                sleep(Duration::from_millis(10)).await;
                count.fetch_add(1, Ordering::Relaxed);
            }
        };
        let _parent = tokio::spawn({
            let process = process.clone();
            async move { process.run(async { spawn(tick).await }).await }
        });
        let seen = || ticks.swap(0, Ordering::Relaxed);
        sleep(Duration::from_millis(35)).await;
        assert_eq!(seen(), 3);
        process.set(Condition::Stands);
        sleep(Duration::from_millis(100)).await;
        assert_eq!(seen(), 0);
        process.set(Condition::Runs);
        sleep(Duration::from_millis(15)).await;
        assert_eq!(seen(), 2, "what was due is done at once");
        process.set(Condition::Dead);
        process.set(Condition::Runs);
        sleep(Duration::from_millis(100)).await;
        assert_eq!(seen(), 0);
        process.died().await;
    }
}
