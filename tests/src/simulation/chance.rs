//! What a seed decides: draws from the simulation's one generator.

use forebay_streams::environment::random;
use std::time::Duration;

/// A number below `n`.
pub(super) fn below(n: u64) -> u64 {
    random() % n.max(1)
}

/// A number from `range`.
pub(super) fn between(range: std::ops::RangeInclusive<u64>) -> u64 {
    range.start() + below(range.end() - range.start() + 1)
}

/// A time, in milliseconds.
pub(super) fn between_ms(range: std::ops::RangeInclusive<u64>) -> Duration {
    Duration::from_millis(between(range))
}

/// True that often in a thousand times.
pub(super) fn chance(per_mille: u64) -> bool {
    below(1000) < per_mille
}

/// Zero in most seeds, up to `most` in the others: some seeds are to show one kind of fault alone.
pub(super) fn sometimes(most: u64) -> u64 {
    if chance(500) { 0 } else { below(most + 1) }
}
