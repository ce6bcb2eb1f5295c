//! TLS on both sides: whoever connects, and whoever is connected to, shows a certificate of the same authority.

use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
};
use std::{
    fmt,
    io::{self, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The name that every worker's certificate is for. Workers come and go at any address, so the address proves nothing:
/// what counts is who signed.
pub const TLS_NAME: &str = "forebay-worker";

/// Files, in PEM, with which a worker shows who it is and knows others.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Its certificate for [`TLS_NAME`], and those between it and the authority.
    pub certificate: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// Certificates of the authorities that others' certificates must be of.
    pub authorities: PathBuf,
}

/// Why TLS can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing, or is not what it should be.
    #[error("{path}: {cause}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// The files do not fit each other.
    #[error("certificate and key: {0}")]
    Unfit(String),
}

/// What both sides of a connection need, read once.
#[derive(Clone, Debug)]
pub struct Tls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Tls {
    /// Reads the files.
    pub fn load(files: &TlsFiles) -> Result<Tls, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in certificates(&files.authorities)? {
            roots.add(authority).map_err(|error| wrong(&files.authorities, error.to_string()))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&files.certificate)?;
        let key =
            PrivateKeyDer::from_pem_file(&files.key).map_err(|error| wrong(&files.key, error.to_string()))?;
        let unfit = |error: rustls::Error| TlsError::Unfit(error.to_string());
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|error| wrong(&files.authorities, error.to_string()))?;
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(unfit)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(unfit)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unfit)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(unfit)?;
        Ok(Tls { server: Arc::new(server), client: Arc::new(client) })
    }

    /// The session of an owner with a reader that has connected.
    pub(super) fn accept(&self, stream: TcpStream) -> io::Result<Box<dyn Encrypted>> {
        let session = ServerConnection::new(self.server.clone()).map_err(io::Error::other)?;
        Ok(Box::new(StreamOwned::new(session, stream)))
    }

    /// The session of a reader with an owner that it has connected to.
    pub(super) fn connect(&self, stream: TcpStream) -> io::Result<Box<dyn Encrypted>> {
        let name = ServerName::try_from(TLS_NAME).expect("a DNS name");
        let session = ClientConnection::new(self.client.clone(), name).map_err(io::Error::other)?;
        Ok(Box::new(StreamOwned::new(session, stream)))
    }
}

/// A stream through a TLS session, of either side.
pub(super) trait Encrypted: Read + Write + Send + fmt::Debug {}

impl<T: Read + Write + Send + fmt::Debug> Encrypted for T {}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match all {
        Ok(all) if all.is_empty() => Err(wrong(path, "no certificate in it".into())),
        all => all.map_err(|error| wrong(path, error.to_string())),
    }
}

fn wrong(path: &Path, cause: String) -> TlsError {
    TlsError::File { path: path.to_owned(), cause }
}
