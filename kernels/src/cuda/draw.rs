//! Drawing tokens on a GPU, and what is told of the logits they are drawn from.

#![allow(unsafe_code)]

use super::{
    Probable, RowAdjustment, RowDraw, RowTold,
    device::{DeviceError, Doing, Stream},
    memory::{DeviceBuffer, Plain},
    transfer::{Kernels, argument},
};
use crate::adjust::{Normalizer, TokenAdjustment};

// SAFETY: numbers without padding: f32, u32, u64, u64, f32, u32.
unsafe impl Plain for RowDraw {}
// SAFETY: two numbers of four bytes.
unsafe impl Plain for RowTold {}
// SAFETY: six numbers of four bytes.
unsafe impl Plain for RowAdjustment {}
// SAFETY: four numbers of four bytes.
unsafe impl Plain for TokenAdjustment {}
// SAFETY: u64, u32, u32.
unsafe impl Plain for Normalizer {}
// SAFETY: u32, f32.
unsafe impl Plain for Probable {}

/// Threads of a block, which has one row.
const THREADS: u32 = 1024;

impl Stream {
    /// Queues penalties, bias and masks for each of `rows` rows of `vocab` logits: see [`crate::adjust`]. Masks have
    /// `vocab / 32` words for each row, rounded up; there may be none if no row has one.
    ///
    /// # Panics
    /// If a buffer has no room for so many rows.
    ///
    /// # Safety
    /// What `how` says of each row must be true: its tokens lie in `tokens`, and there are masks if it has one.
    pub unsafe fn adjust(
        &self,
        kernels: &Kernels,
        (logits, vocab): (&DeviceBuffer<f32>, u32),
        how: &DeviceBuffer<RowAdjustment>,
        tokens: &DeviceBuffer<TokenAdjustment>,
        masks: &DeviceBuffer<u32>,
        rows: usize,
    ) -> Result<(), DeviceError> {
        let words = rows * (vocab as usize).div_ceil(32);
        assert!(logits.len() >= rows * vocab as usize && how.len() >= rows, "{rows} rows");
        assert!(masks.is_empty() || masks.len() >= words, "{} words of masks for {rows} rows", masks.len());
        let (logits, how) = (logits.address(), how.address());
        let (tokens, masks) = (tokens.address(), masks.address());
        let arguments =
            [argument(&logits), argument(&vocab), argument(&how), argument(&tokens), argument(&masks)];
        // SAFETY: these are the kernel's parameters; the buffers hold what it reads and writes, as the caller says of two, and wait
        // for it before they go.
        unsafe { self.launch(&kernels.adjust, rows as u32, THREADS, arguments) }.doing("adjusting logits")
    }

    /// Queues the drawing of a token for each of `rows` rows of `vocab` logits, which are overwritten.
    ///
    /// # Panics
    /// If a buffer has no room for so many rows.
    pub fn sample(
        &self,
        kernels: &Kernels,
        logits: &DeviceBuffer<f32>,
        vocab: u32,
        draws: &DeviceBuffer<RowDraw>,
        tokens: &DeviceBuffer<u32>,
        rows: usize,
    ) -> Result<(), DeviceError> {
        let fits = logits.len() >= rows * vocab as usize && draws.len() >= rows && tokens.len() >= rows;
        assert!(fits, "{rows} rows");
        let (logits, draws, tokens) = (logits.address(), draws.address(), tokens.address());
        let arguments = [argument(&logits), argument(&vocab), argument(&draws), argument(&tokens)];
        // SAFETY: these are the kernel's parameters; the buffers hold what it reads and writes, and wait for it before they go.
        unsafe { self.launch(&kernels.sample, rows as u32, THREADS, arguments) }.doing("drawing tokens")
    }

    /// Queues, for each row of `vocab` logits of which something is told, what makes probabilities of them; and, in `width` places of
    /// `probable` for each row, the token that was drawn and the most probable ones: see [`Normalizer`] and
    /// [`crate::most_probable`]. What is told of the others, and in places that a row does not need, is not written.
    ///
    /// # Panics
    /// If a buffer has no room for so many rows, or there are fewer tokens than `width - 1`.
    ///
    /// # Safety
    /// No row tells of more than `width - 1` of the most probable tokens.
    pub unsafe fn probabilities(
        &self,
        kernels: &Kernels,
        (logits, vocab): (&DeviceBuffer<f32>, u32),
        (told, width): (&DeviceBuffer<RowTold>, u32),
        drawn: &DeviceBuffer<u32>,
        (normalizers, probable): (&DeviceBuffer<Normalizer>, &DeviceBuffer<Probable>),
        rows: usize,
    ) -> Result<(), DeviceError> {
        assert!(logits.len() >= rows * vocab as usize && normalizers.len() >= rows, "{rows} rows");
        assert!(told.len() >= rows && drawn.len() >= rows, "{rows} rows");
        assert!(width > 0 && width - 1 <= vocab, "{width} places for {vocab} tokens");
        assert!(probable.len() >= rows * width as usize, "{width} places for each of {rows} rows");
        let (logits, told, drawn) = (logits.address(), told.address(), drawn.address());
        let (normalizers, probable) = (normalizers.address(), probable.address());
        let arguments = [
            argument(&logits),
            argument(&vocab),
            argument(&told),
            argument(&width),
            argument(&drawn),
            argument(&normalizers),
            argument(&probable),
        ];
        // SAFETY: as above, and as the caller says of the places.
        unsafe { self.launch(&kernels.probabilities, rows as u32, THREADS, arguments) }
            .doing("computing probabilities")
    }
}
