//! The gateway over a real socket, on the memory backend. The worker is the test: it pulls tasks and writes
//! into their logs what a worker would.

mod answers;
mod endings;
mod errors;
mod flaky;
mod keeping;
mod operating;
mod responding;
mod resuming;
mod site;
mod speed;
