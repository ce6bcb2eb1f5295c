//! Workers: stateless processes that take tasks from the queues and run the model.
//!
//! A request's way through here: [`decode`] pulls its task and claims it; [`prefill`], in another process, runs
//! the prompt and seals the KV ([`kv`]); [`decode`] reads the KV into a slot of its own and hands the sequence to
//! the engine's thread ([`runner`], [`scheduler`], [`engine`]); tokens come back as text ([`output`]) and are
//! appended to the log. What narrows them is in [`logits`] and [`vocabulary`].

pub mod decode;
pub mod engine;
pub mod kv;
pub mod logits;
pub mod model;
pub mod output;
pub mod prefill;
mod prefix;
pub mod replay;
pub mod runner;
pub mod scheduler;
pub mod vocabulary;
pub mod worker;
