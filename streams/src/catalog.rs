//! Which models are served: their cards, and the tokenizers that these name. Both outlive every worker.

use crate::StreamError;
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::card::{BlobRef, ModelCard};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;

/// All model cards, by the name that clients use.
pub type Models = Arc<BTreeMap<String, Arc<ModelCard>>>;

/// Models, and blobs by digest.
#[async_trait]
pub trait Catalog: Send + Sync + 'static {
    /// Publishes a model's card. It stays until it is replaced or removed.
    async fn publish_model(&self, card: &ModelCard) -> Result<(), StreamError>;

    /// All models, kept up to date for as long as the receiver lives.
    async fn models(&self) -> Result<watch::Receiver<Models>, StreamError>;

    /// Stores bytes under a digest of their content.
    async fn put_blob(&self, bytes: Bytes) -> Result<BlobRef, StreamError>;

    /// Reads bytes back; checked against the digest.
    async fn get_blob(&self, blob: &BlobRef) -> Result<Bytes, StreamError>;
}

/// The name of a blob: SHA-256 of its bytes, in hexadecimal.
pub(crate) fn blob_name(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
