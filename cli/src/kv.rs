//! How KV moves between workers, as flags.

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use forebay_workers::kv::{
    Choice, KvOptions,
    nixl::{Library, NixlError},
    tcp::{TcpListen, TcpOptions, Tls, TlsFiles, has_port},
};
use std::{
    net::{SocketAddr, ToSocketAddrs, UdpSocket},
    path::PathBuf,
};

/// Transports by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Transport {
    /// Between workers on one host from GPU to GPU where both ends can, or shared memory; otherwise `nixl` where both have it, and `tcp` where not.
    Auto,
    /// Shared memory of the host only.
    Shm,
    /// NIXL only, even on one host. Needs a build with the feature `nixl`.
    Nixl,
    /// TCP only, even on one host.
    Tcp,
}

/// Where NIXL is.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct NixlArgs {
    /// Folder of libnixl_capi.so, in builds with the feature `nixl`. Default: .forebay/nixl/lib in the working directory or
    /// above, or where the system's loader looks.
    #[arg(long, env = "FOREBAY_NIXL", value_name = "DIR")]
    nixl: Option<PathBuf>,
}

impl NixlArgs {
    /// Whether it is said where it is.
    pub(crate) fn is_named(&self) -> bool {
        self.nixl.is_some()
    }

    /// Loads it.
    pub(crate) fn load(&self) -> Result<Library, NixlError> {
        Library::load(self.nixl.clone().or_else(fetched).as_deref())
    }
}

#[derive(Args, Clone, Debug)]
pub(crate) struct KvArgs {
    /// How this worker reads KV from others.
    #[arg(long, env = "FOREBAY_KV_TRANSPORT", value_enum, default_value = "auto", value_name = "TRANSPORT")]
    kv_transport: Transport,
    #[command(flatten)]
    nixl: NixlArgs,
    /// Where workers on other hosts read this one's KV. Default: the address by which it reaches NATS, any port.
    #[arg(long, env = "FOREBAY_KV_LISTEN", value_name = "ADDR:PORT")]
    kv_listen: Option<SocketAddr>,
    /// What they are told instead, where addresses are translated on the way.
    #[arg(long, env = "FOREBAY_KV_ADVERTISE", value_name = "HOST[:PORT]")]
    kv_advertise: Option<String>,
    /// Connections that the read of a long prompt uses at once, 1 to 4.
    #[arg(long, env = "FOREBAY_KV_STREAMS", default_value_t = TcpOptions::default().streams as u32, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=4))]
    kv_streams: u32,
    /// This worker's certificate for the name `forebay-worker`, in PEM: KV over TCP is then encrypted, and both sides
    /// must show one of the same authority.
    #[arg(long, env = "FOREBAY_KV_TLS_CERT", value_name = "FILE", requires = "kv_tls_key")]
    kv_tls_cert: Option<PathBuf>,
    /// The certificate's private key, in PEM.
    #[arg(long, env = "FOREBAY_KV_TLS_KEY", value_name = "FILE", requires = "kv_tls_ca")]
    kv_tls_key: Option<PathBuf>,
    /// The authority's certificate, in PEM.
    #[arg(long, env = "FOREBAY_KV_TLS_CA", value_name = "FILE", requires = "kv_tls_cert")]
    kv_tls_ca: Option<PathBuf>,
}

impl KvArgs {
    /// `nats` is where the server is: the way there is the way to the other workers, unless told otherwise.
    pub(crate) fn options(&self, nats: &str) -> anyhow::Result<KvOptions> {
        let choice = match self.kv_transport {
            Transport::Auto => Choice::Auto,
            Transport::Shm => Choice::Shm,
            Transport::Nixl => Choice::Nixl,
            Transport::Tcp => Choice::Tcp,
        };
        let listen = match (choice, self.kv_listen) {
            (Choice::Shm, None) if self.kv_advertise.is_some() || self.kv_tls_cert.is_some() => {
                bail!("--kv-advertise and --kv-tls-… are for reads over tcp, and --kv-transport is shm");
            }
            (Choice::Shm, None) => None,
            (_, Some(address)) => Some(address),
            (_, None) => Some(address_towards(nats).context("finding an address for --kv-listen")?),
        };
        let tls =
            self.tls_files().map(|files| Tls::load(&files)).transpose().context("TLS between workers")?;
        let nixl = self.library(choice, tls.is_some())?;
        let advertise = self.kv_advertise.clone();
        let listen = listen.map(|address| TcpListen { address, advertise, tls: tls.clone() });
        Ok(KvOptions { choice, listen, tcp: TcpOptions { streams: self.kv_streams as usize, tls }, nixl })
    }

    /// NIXL, if it may be used and is there.
    fn library(&self, choice: Choice, is_encrypted: bool) -> anyhow::Result<Option<Library>> {
        match choice {
            Choice::Shm | Choice::Tcp => return Ok(None),
            Choice::Nixl if is_encrypted => {
                bail!(
                    "--kv-tls-… encrypts reads over tcp, and with --kv-transport nixl the bytes would go in the clear"
                );
            }
            Choice::Auto if is_encrypted => {
                tracing::info!("no nixl: it would not encrypt KV as --kv-tls-… asks");
                return Ok(None);
            }
            Choice::Auto | Choice::Nixl => {}
        }
        match self.nixl.load() {
            Ok(library) => Ok(Some(library)),
            Err(error) if choice == Choice::Nixl => {
                tracing::warn!(%error, "no nixl");
                Err(error).context("--kv-transport nixl")
            }
            // A build without it has nothing to say of it.
            Err(NixlError::NotBuilt) => Ok(None),
            Err(error) => {
                tracing::info!(%error, "no nixl; KV is read without it");
                Ok(None)
            }
        }
    }

    fn tls_files(&self) -> Option<TlsFiles> {
        let (certificate, key) = (self.kv_tls_cert.clone()?, self.kv_tls_key.clone()?);
        Some(TlsFiles { certificate, key, authorities: self.kv_tls_ca.clone()? })
    }
}

/// What `scripts/setup.sh nixl` fetches, in the working directory or above.
fn fetched() -> Option<PathBuf> {
    let here = std::env::current_dir().ok()?;
    here.ancestors().map(|folder| folder.join(".forebay/nixl/lib")).find(|folder| folder.is_dir())
}

/// This machine's address on the way to a server, with port 0.
fn address_towards(url: &str) -> anyhow::Result<SocketAddr> {
    let first = url.split(',').next().unwrap_or_default();
    let (_, server) = first.split_once("://").unwrap_or(("", first));
    let server = server.rsplit_once('@').map_or(server, |(_, server)| server).trim_end_matches('/');
    let server = if has_port(server) { server.to_owned() } else { format!("{server}:4222") };
    let target = server.to_socket_addrs()?.next().with_context(|| format!("{server} has no address"))?;
    // Connecting a datagram socket sends nothing, but chooses a way.
    let any: SocketAddr = if target.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    let mut address = socket.local_addr()?;
    address.set_port(0);
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_on_this_machine_is_reached_by_loopback() {
        for url in ["nats://127.0.0.1:4222", "127.0.0.1", "nats://user:word@127.0.0.1:1,nats://10.0.0.1:4222"]
        {
            assert_eq!(address_towards(url).unwrap().to_string(), "127.0.0.1:0", "{url}");
        }
    }
}
