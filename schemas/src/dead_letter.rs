//! A task that nobody could do, as it is kept for a person to look at.

use crate::{
    event::FailureCode,
    ids::{GatewayId, ModelKey, RequestId},
    task::Role,
};
use serde::{Deserialize, Serialize};

/// What is kept of a task that failed as often as it may. Its request has ended; the log tells the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// Which request.
    pub request: RequestId,
    /// Whose log subject it has.
    pub gateway: GatewayId,
    /// Which model.
    pub model: ModelKey,
    /// Which work.
    pub role: Role,
    /// How its request ended; none if its log could not be read.
    pub code: Option<FailureCode>,
    /// Why, in words.
    pub reason: String,
    /// How often it was tried.
    pub attempts: u64,
    /// When it was given up, in microseconds since the Unix epoch.
    pub time_us: u64,
}
