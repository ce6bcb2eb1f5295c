//! The connections to one owner, kept between reads.

use super::{
    IDLE_USE_MAX, IO_TIMEOUT,
    connection::{Connection, Failure},
    tls::Tls,
};
use crate::kv::greeting::Greeting;
use std::{
    io,
    sync::{Condvar, Mutex},
    time::Instant,
};

/// Connections to one peer at once. A read that finds none free waits for one.
const CONNECTIONS_MAX: usize = 16;

/// Connections to one owner.
#[derive(Debug)]
pub(super) struct Pool {
    address: String,
    greeting: Greeting,
    tls: Option<Tls>,
    connections: Mutex<Connections>,
    given_back: Condvar,
}

#[derive(Debug, Default)]
struct Connections {
    idle: Vec<(Connection, Instant)>,
    open: usize,
}

/// A connection in use; goes back when dropped, if it is whole.
pub(super) struct Taken<'a> {
    pool: &'a Pool,
    connection: Option<Connection>,
    reused: bool,
}

impl Pool {
    /// To the owner that greets like this; none yet.
    pub(super) fn to(address: &str, greeting: Greeting, tls: Option<Tls>) -> Pool {
        let (connections, given_back) = (Mutex::default(), Condvar::new());
        Pool { address: address.to_owned(), greeting, tls, connections, given_back }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// A connection: an idle one, or a new one if there is room, or, if that is wanted, the next that is given back.
    pub(super) fn take(&self, wait: bool) -> Result<Option<Taken<'_>>, Failure> {
        let give_up = Instant::now() + IO_TIMEOUT;
        let mut pool = self.connections.lock().expect("no panics while held");
        loop {
            while let Some((connection, since)) = pool.idle.pop() {
                if since.elapsed() < IDLE_USE_MAX {
                    return Ok(Some(Taken { pool: self, connection: Some(connection), reused: true }));
                }
                pool.open -= 1;
            }
            if pool.open < CONNECTIONS_MAX {
                pool.open += 1;
                drop(pool);
                // Dropped without a connection, it makes room again.
                let mut taken = Taken { pool: self, connection: None, reused: false };
                taken.connection = Some(Connection::open(&self.address, &self.greeting, self.tls.as_ref())?);
                return Ok(Some(taken));
            }
            let left = give_up.saturating_duration_since(Instant::now());
            if !wait {
                return Ok(None);
            }
            if left.is_zero() {
                return Err(Failure::Broken(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "all connections are in use",
                )));
            }
            pool = self.given_back.wait_timeout(pool, left).expect("no panics while held").0;
        }
    }

    /// A connection that nobody uses, if there is one.
    pub(super) fn idle(&self) -> Option<Taken<'_>> {
        let (connection, _) = self.connections.lock().expect("no panics while held").idle.pop()?;
        Some(Taken { pool: self, connection: Some(connection), reused: true })
    }

    /// Closes connections that nobody has used for long.
    pub(super) fn drop_old(&self) {
        let mut pool = self.connections.lock().expect("no panics while held");
        let before = pool.idle.len();
        pool.idle.retain(|(_, since)| since.elapsed() < IDLE_USE_MAX);
        pool.open -= before - pool.idle.len();
    }

    fn drop_idle(&self) {
        let mut pool = self.connections.lock().expect("no panics while held");
        pool.open -= pool.idle.len();
        pool.idle.clear();
    }

    /// Does something on a connection. If one that lay idle turns out to be broken, all of them probably are: it is
    /// done again on a new one. Whatever is asked may be asked twice.
    pub(super) fn with<T>(&self, ask: impl Fn(&mut Connection) -> Result<T, Failure>) -> Result<T, Failure> {
        let mut taken = self.take(true)?.expect("it was waited for");
        match taken.ask(&ask) {
            Err(Failure::Broken(_)) if taken.reused => {}
            outcome => return outcome,
        }
        drop(taken);
        self.drop_idle();
        self.take(true)?.expect("it was waited for").ask(&ask)
    }
}

impl Taken<'_> {
    pub(super) fn ask<T>(
        &mut self,
        ask: impl FnOnce(&mut Connection) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut connection = self.connection.take().expect("taken with a connection");
        let outcome = ask(&mut connection);
        if !matches!(outcome, Err(Failure::Broken(_))) {
            self.connection = Some(connection);
        }
        outcome
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut pool = self.pool.connections.lock().expect("no panics while held");
        match self.connection.take() {
            Some(connection) => pool.idle.push((connection, Instant::now())),
            None => pool.open -= 1,
        }
        self.pool.given_back.notify_one();
    }
}
