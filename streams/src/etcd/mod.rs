//! Leases of workers and live configuration on etcd, for those who run one anyway: everything else stays on NATS.
//!
//! Over etcd's HTTP gateway rather than gRPC: the few calls that are needed are small, and building a gRPC client of
//! etcd takes a protocol compiler on every machine. The gateway is on unless etcd is told otherwise. There is no TLS.

mod client;
mod follow;
mod registry;
mod roster;
mod settings;
mod wire;

use crate::StreamError;
use client::{Address, Client};
use forebay_schemas::ids::WorkerId;
use registry::Held;
use serde_json::json;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

/// What addresses begin with.
const SCHEME: &str = "etcd://";

/// The port where none is given.
const PORT: u16 = 2379;

/// Shortest lease, in seconds: etcd counts whole ones, and grants none below one and a half times its election timeout,
/// which is one second by default.
const LEASE_MIN_S: u64 = 2;

/// Why there is no etcd.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It is not an address of etcd.
    #[error(
        "{0:?} is no address of etcd: it takes etcd://host:port[,host:port…], with user:password@ before the first host if need be"
    )]
    Address(String),
    /// Nothing answers there, or not as etcd does.
    #[error(
        "etcd at {servers} does not answer: {cause}; is it running there, with its HTTP gateway (which is on by default)?"
    )]
    Unreachable {
        /// Where.
        servers: String,
        /// What was said.
        cause: StreamError,
    },
}

/// A connection to etcd, which is a registry and a store of settings.
pub struct Etcd {
    client: Arc<Client>,
    lease_s: u64,
    held: Mutex<BTreeMap<WorkerId, Held>>,
}

impl Etcd {
    /// Connects to `etcd://[user:password@]host:port[,host:port…]`. A worker's lease lasts `lease_time`, rounded up to
    /// whole seconds, of which etcd needs two at least.
    pub async fn connect(url: &str, lease_time: Duration) -> Result<Etcd, ConnectError> {
        // An error must not show the password.
        let address =
            parse(url).ok_or_else(|| ConnectError::Address(url.rsplit('@').next().unwrap_or(url).into()))?;
        let servers = address.servers.join(",");
        let unreachable = |cause| ConnectError::Unreachable { servers, cause };
        let lease_s = (lease_time.as_secs_f64().ceil() as u64).max(LEASE_MIN_S);
        let connect = async {
            let client = Arc::new(Client::new(address)?);
            let body = json!({ "key": wire::encode("/forebay/") });
            client.call::<wire::Range>("reading from etcd", "kv/range", body).await?;
            Ok(Etcd { client, lease_s, held: Mutex::default() })
        };
        connect.await.map_err(unreachable)
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<WorkerId, Held>> {
        self.held.lock().expect("no panics while held")
    }
}

/// The servers and the user of an address; none if it is not one.
fn parse(url: &str) -> Option<Address> {
    let rest = url.strip_prefix(SCHEME)?.trim_end_matches('/');
    let (user, hosts) = match rest.rsplit_once('@') {
        Some((user, hosts)) => {
            let (name, password) = user.split_once(':')?;
            (Some((name.to_owned(), password.to_owned())), hosts)
        }
        None => (None, rest),
    };
    let servers = hosts.split(',').map(|host| server(host.trim())).collect::<Option<Vec<_>>>()?;
    Some(Address { servers, user })
}

fn server(host: &str) -> Option<String> {
    // What follows the last bracket of an IPv6 address.
    let has_port = host.rsplit(']').next()?.contains(':');
    let server = if has_port { format!("http://{host}") } else { format!("http://{host}:{PORT}") };
    let url = reqwest::Url::parse(&server).ok()?;
    let is_bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
    (is_bare && url.has_host() && !host.ends_with('/')).then_some(server)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_name_servers_and_a_user() {
        let servers = |url| parse(url).map(|address| address.servers);
        assert_eq!(
            servers("etcd://a:2379,b,[::1]:80/").unwrap(),
            ["http://a:2379", "http://b:2379", "http://[::1]:80"]
        );
        let address = parse("etcd://me:p@ss:w,rd@a").unwrap();
        assert_eq!(address.user, Some(("me".into(), "p@ss:w,rd".into())));
        assert_eq!(address.servers, ["http://a:2379"]);
        for bad in
            ["http://a", "etcd://", "etcd://a,", "etcd://a:b", "etcd://me@a", "etcd://a/b", "etcd://a?b"]
        {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn errors_say_what_to_do_and_no_password() {
        let error = |url: &'static str| async move {
            Etcd::connect(url, Duration::from_secs(1)).await.err().unwrap().to_string()
        };
        let bad = error("etcd://me:secret@a?b").await;
        assert!(bad.contains("etcd://host:port") && !bad.contains("secret"), "{bad}");
        let nobody = error("etcd://me:secret@127.0.0.1:1").await;
        assert!(nobody.contains("http://127.0.0.1:1") && !nobody.contains("secret"), "{nobody}");
    }
}
