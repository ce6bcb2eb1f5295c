//! What an owner says of its region to whoever connects.

use forebay_kernels::cuda::DeviceUuid;
use forebay_schemas::{
    ids::WorkerId,
    kv::{KvHandle, KvLayout, LayoutHash},
};
use serde::{Deserialize, Serialize};

/// A greeting is a small JSON object.
pub(super) const GREETING_MAX: usize = 4096;

/// Who an owner is, and how its bytes lie. A reader compares it with its handle's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Greeting {
    pub(super) worker: WorkerId,
    pub(super) incarnation: u64,
    pub(super) layout: KvLayout,
    pub(super) layout_hash: LayoutHash,
    /// Over a socket of one host: its bytes lie in a GPU's memory, too, which can be asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) gpu: Option<GpuOffer>,
}

/// An owner's memory of a GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct GpuOffer {
    /// How it is asked for.
    pub(super) version: u32,
    /// Which GPU.
    pub(super) uuid: DeviceUuid,
    /// Bytes of a granule.
    pub(super) granule: usize,
}

impl Greeting {
    /// What the owner of a handle's bytes says.
    pub(super) fn of(handle: &KvHandle) -> Greeting {
        Greeting {
            worker: handle.agent.clone(),
            incarnation: handle.incarnation,
            layout: handle.layout,
            layout_hash: handle.layout_hash,
            gpu: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::kv::{KvDtype, KvGeometry};

    #[test]
    fn owners_and_readers_of_before_understand_each_other() {
        let geometry = KvGeometry { layers: 1, kv_heads: 2, head_dim: 8, dtype: KvDtype::F16 };
        let greeting = Greeting {
            worker: WorkerId::new("decode-1").unwrap(),
            incarnation: 3,
            layout: KvLayout { geometry, slots: 4, positions: 5 },
            layout_hash: LayoutHash(6),
            gpu: None,
        };
        // As owners said it before they offered anything.
        let before = r#"{"worker":"decode-1","incarnation":3,"layout":{"geometry":{"layers":1,"kv_heads":2,"head_dim":8,"dtype":"f16"},"slots":4,"positions":5},"layout_hash":6}"#;
        assert_eq!(serde_json::to_string(&greeting).unwrap(), before);
        assert_eq!(serde_json::from_str::<Greeting>(before).unwrap(), greeting);
        let gpu = Some(GpuOffer { version: 1, uuid: [255; 16], granule: 2 << 20 });
        let offering = Greeting { gpu, ..greeting };
        let bytes = serde_json::to_vec(&offering).unwrap();
        assert!(bytes.len() < GREETING_MAX);
        assert_eq!(serde_json::from_slice::<Greeting>(&bytes).unwrap(), offering);
    }
}
