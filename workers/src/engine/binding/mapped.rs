//! Weight files in memory.

use std::{fs::File, ops::Range, path::Path};

/// A file mapped read-only.
pub(in super::super) struct MappedFile(Option<memmap2::Mmap>);

impl MappedFile {
    /// Maps a file; an empty one is an empty slice.
    pub(in super::super) fn open(path: &Path) -> std::io::Result<MappedFile> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(MappedFile(None));
        }
        // SAFETY: the mapping is read-only and private to this type. A weight file that another process truncates
        // or rewrites while it is served is outside what any reader of mapped files can defend against; weights are
        // installed by renaming, not by writing in place.
        Ok(MappedFile(Some(unsafe { memmap2::Mmap::map(&file)? })))
    }

    /// The file's bytes.
    pub(in super::super) fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }

    /// Lets the system take back the memory of a range that was read for the last time, or will be for a while.
    pub(in super::super) fn release(&self, range: Range<usize>) {
        let Some(map) = &self.0 else { return };
        // SAFETY: dropping pages of a mapping that is never written loses nothing: they are read from the file again.
        let advised = unsafe {
            map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
        };
        // Advice may be refused, and then the pages stay.
        let _ = advised;
    }
}
