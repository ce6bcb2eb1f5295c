//! The vocabulary of Forebay: ids, events and their versions, tasks, KV descriptors, model cards, and the
//! life of a request as a pure state machine. No I/O, no clock, no async: every other crate speaks these
//! types, and replay, tests and the live system run the same code over them.
//!
//! Read in the order of a request's life: [`ids`], [`event`], [`lifecycle`], [`task`], [`kv`].

pub mod cache;
pub mod cache_event;
pub mod card;
pub mod config;
pub mod dead_letter;
pub mod event;
pub mod export;
pub mod format;
pub mod ids;
pub mod kv;
pub mod lifecycle;
pub mod openai;
pub mod sampling;
pub mod task;
pub mod wire;
