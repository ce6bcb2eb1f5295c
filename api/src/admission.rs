//! How many requests may be under way at once. One more is refused at once: a client that is told to come
//! back costs nothing, one that waits here would cost memory and its own patience.

use crate::error::{ApiError, ErrorCode};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// The bound on requests under way.
#[derive(Clone)]
pub(crate) struct Admission {
    in_flight: Arc<AtomicUsize>,
    max: usize,
}

/// The right of one request to be under way; gives it back when dropped.
pub(crate) struct Permit(Arc<AtomicUsize>);

impl Admission {
    pub(crate) fn new(max: usize) -> Admission {
        Admission { in_flight: Arc::default(), max }
    }

    /// Lets one more in, or says why not.
    pub(crate) fn admit(&self) -> Result<Permit, ApiError> {
        let more = |now: usize| (now < self.max).then_some(now + 1);
        match self.in_flight.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(Permit(self.in_flight.clone())),
            Err(now) => Err(ApiError::new(
                ErrorCode::TooManyRequests,
                format!("{now} requests are under way, as many as this gateway takes; try again later"),
            )),
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_leaves_before_one_more_enters() {
        let admission = Admission::new(2);
        let first = admission.admit().unwrap();
        let _second = admission.admit().unwrap();
        assert_eq!(admission.admit().err().unwrap().code(), ErrorCode::TooManyRequests);
        drop(first);
        assert_eq!(admission.in_flight(), 1);
        assert!(admission.admit().is_ok());
    }
}
