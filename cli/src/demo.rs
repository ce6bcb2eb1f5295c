//! The built-in model: a small trained checkpoint, carried in the binary.

use anyhow::Context;
use std::path::{Path, PathBuf};

const FILES: [(&str, &[u8]); 6] = [
    ("config.json", include_bytes!("../../models/demo/config.json")),
    ("generation_config.json", include_bytes!("../../models/demo/generation_config.json")),
    ("tokenizer.json", include_bytes!("../../models/demo/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../models/demo/tokenizer_config.json")),
    ("kv_ranges.safetensors", include_bytes!("../../models/demo/kv_ranges.safetensors")),
    ("model.safetensors", include_bytes!("../../models/demo/model.safetensors")),
];

/// Writes the model below a folder, unless it lies there already, and returns where.
pub(crate) fn unpack(models: &Path) -> anyhow::Result<PathBuf> {
    let folder = models.join("demo");
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    for (name, bytes) in FILES {
        let path = folder.join(name);
        if std::fs::read(&path).is_ok_and(|there| there == bytes) {
            continue;
        }
        // Written aside and moved, so that several workers can start at once.
        let aside = folder.join(format!(".{name}.{}", std::process::id()));
        std::fs::write(&aside, bytes).with_context(|| format!("writing {}", aside.display()))?;
        std::fs::rename(&aside, &path).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(folder)
}
