//! A GPU's memory from one process to another, beside the region: asked for over the socket that brought the greeting.
//!
//! The reader asks which granules hold the first positions of a slot, and then for descriptors of those that it has not mapped yet. The
//! owner answers who shows a lease that stands. Then the reader's GPU copies from the owner's memory, and sums what has arrived; the
//! protocol above is the same. As with the region, whoever was passed a descriptor can read what lies there later, too, whatever
//! leases say, until it is unmapped: this is for workers of one user.
//!
//! Owners say in their greeting that they answer, and how (`GpuOffer::version`). Who does not ask hangs up after the greeting.

mod owner;
mod peer;
mod wire;

pub(super) use owner::GpuOwner;
pub(super) use peer::GpuPeer;

use std::time::Duration;

/// How this version asks and answers.
const VERSION: u32 = 1;

/// How long a reader waits for all that it asks of a slot; and an owner for the rest of one question and until its answer is sent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
