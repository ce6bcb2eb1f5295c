//! The draws of one step's rows, on a GPU: only tokens cross the bus, and what is told of them.

#![allow(unsafe_code)]

use super::{
    NOT_FINITE, Probable, RowAdjustment, RowDraw, RowTold,
    device::{Device, DeviceError, Stream},
    memory::{DeviceBuffer, HostBuffer, Plain},
    transfer::Kernels,
};
use crate::adjust::{Adjustments, Normalizer, Penalties, TokenAdjustment};
use forebay_schemas::sampling::Sampling;

/// How the rows of a step are drawn.
#[derive(Debug)]
pub struct RowDraws {
    vocab: usize,
    draws: Mirrored<RowDraw>,
    drawn: Mirrored<u32>,
    /// How logits are changed before: nothing of it goes to the GPU if none are.
    changes: Vec<RowAdjustment>,
    tokens: Vec<TokenAdjustment>,
    masks: Vec<u32>,
    changing: Changing,
    /// What is told after; the same.
    told: Vec<RowTold>,
    telling: Telling,
}

/// A drawn token.
#[derive(Clone, Copy, Debug)]
pub struct Drawn<'a> {
    /// Its id.
    pub token: u32,
    /// What is told of it, if that was asked for.
    pub told: Option<Told<'a>>,
}

/// Logits as they were before anything changed them.
#[derive(Clone, Copy, Debug)]
pub struct Told<'a> {
    /// What makes probabilities of them.
    pub normalizer: Normalizer,
    /// That of the drawn token.
    pub drawn: f32,
    /// Those of the most probable tokens, most probable first.
    pub top: &'a [Probable],
}

/// What `adjust` reads.
#[derive(Debug)]
struct Changing {
    rows: Mirrored<RowAdjustment>,
    tokens: Mirrored<TokenAdjustment>,
    masks: Mirrored<u32>,
    /// For steps without masks.
    no_masks: DeviceBuffer<u32>,
}

/// What `probabilities` reads and writes.
#[derive(Debug)]
struct Telling {
    logits: DeviceBuffer<f32>,
    rows: Mirrored<RowTold>,
    normalizers: Mirrored<Normalizer>,
    probable: Mirrored<Probable>,
}

impl RowDraws {
    /// Of steps of at most so many rows.
    pub fn new(device: &Device, rows_max: usize, vocab: usize) -> Result<RowDraws, DeviceError> {
        Ok(RowDraws {
            vocab,
            draws: Mirrored::new(device, rows_max)?,
            drawn: Mirrored::new(device, rows_max)?,
            changes: Vec::new(),
            tokens: Vec::new(),
            masks: Vec::new(),
            changing: Changing {
                rows: Mirrored::new(device, rows_max)?,
                tokens: Mirrored::new(device, 0)?,
                masks: Mirrored::new(device, 0)?,
                no_masks: DeviceBuffer::new(device, 0)?,
            },
            told: Vec::new(),
            telling: Telling {
                logits: DeviceBuffer::new(device, rows_max * vocab)?,
                rows: Mirrored::new(device, rows_max)?,
                normalizers: Mirrored::new(device, rows_max)?,
                probable: Mirrored::new(device, 0)?,
            },
        })
    }

    /// A step of so many rows. Those that are not set are drawn greedily, and nothing is told of them.
    pub fn begin(&mut self, rows: usize) -> Result<(), DeviceError> {
        self.draws.host.data()?[..rows].fill(RowDraw::new(&Sampling::GREEDY, 0));
        self.changes.clear();
        self.changes.resize(rows, RowAdjustment::NONE);
        self.tokens.clear();
        self.masks.clear();
        self.told.clear();
        self.told.resize(rows, RowTold { top: 0, told: 0 });
        Ok(())
    }

    /// How the token with number `index` of an output is drawn from one of the rows; `allowed` as in [`crate::adjust()`].
    pub fn set(
        &mut self,
        row: usize,
        (sampling, index): (&Sampling, u32),
        adjustments: Option<&Adjustments>,
        allowed: Option<&[u32]>,
    ) -> Result<(), DeviceError> {
        self.draws.host.data()?[row] = RowDraw::new(sampling, index);
        if let Some(top) = sampling.logprobs {
            self.told[row] = RowTold { top: top.min(self.vocab as u32), told: 1 };
        }
        let tokens = adjustments.map_or(&[][..], Adjustments::tokens);
        self.changes[row] = RowAdjustment {
            penalties: adjustments.map_or(Penalties::NONE, Adjustments::penalties),
            first: self.tokens.len() as u32,
            count: tokens.len() as u32,
            masked: allowed.is_some().into(),
        };
        self.tokens.extend_from_slice(tokens);
        if let Some(allowed) = allowed {
            let words = self.vocab.div_ceil(32);
            self.masks.resize(self.changes.len() * words, 0);
            let mask = &mut self.masks[row * words..][..words];
            mask.iter_mut().zip(allowed).for_each(|(word, allowed)| *word = *allowed);
        }
        Ok(())
    }

    /// Queues the draws from logits of all rows of the step, which are overwritten.
    ///
    /// # Panics
    /// If these are not logits for as many rows as there are at most.
    pub fn queue(
        &mut self,
        stream: &Stream,
        kernels: &Kernels,
        logits: &DeviceBuffer<f32>,
    ) -> Result<(), DeviceError> {
        let (rows, vocab) = (self.changes.len(), self.vocab as u32);
        if self.width() > 0 {
            stream.copy_within(logits, &self.telling.logits)?;
        }
        if self.changes.iter().any(|row| row.count > 0 || row.masked == 1) {
            self.change(stream, kernels, logits)?;
        }
        stream.copy_in(&mut self.draws.host, rows, &self.draws.gpu, 0)?;
        stream.sample(kernels, logits, vocab, &self.draws.gpu, &self.drawn.gpu, rows)?;
        stream.copy_out(&self.drawn.gpu, rows, &mut self.drawn.host)?;
        if self.width() > 0 { self.tell(stream, kernels) } else { Ok(()) }
    }

    fn change(
        &mut self,
        stream: &Stream,
        kernels: &Kernels,
        logits: &DeviceBuffer<f32>,
    ) -> Result<(), DeviceError> {
        let Changing { rows, tokens, masks, no_masks } = &mut self.changing;
        rows.copy_in(stream, &self.changes)?;
        tokens.copy_in(stream, &self.tokens)?;
        masks.copy_in(stream, &self.masks)?;
        let (logits, count) = ((logits, self.vocab as u32), self.changes.len());
        let masks = if self.masks.is_empty() { no_masks } else { &masks.gpu };
        // SAFETY: `set` has put the tokens of each row where it says, and made masks for all rows if one has one.
        unsafe { stream.adjust(kernels, logits, &rows.gpu, &tokens.gpu, masks, count) }
    }

    fn tell(&mut self, stream: &Stream, kernels: &Kernels) -> Result<(), DeviceError> {
        let (rows, width) = (self.told.len(), self.width());
        let Telling { logits, rows: told, normalizers, probable } = &mut self.telling;
        told.copy_in(stream, &self.told)?;
        probable.make_room(stream.device(), rows * width as usize)?;
        let (logits, told) = ((&*logits, self.vocab as u32), (&told.gpu, width));
        let into = (&normalizers.gpu, &probable.gpu);
        // SAFETY: `width` is that of the row of which most is told.
        unsafe { stream.probabilities(kernels, logits, told, &self.drawn.gpu, into, rows) }?;
        stream.copy_out(&normalizers.gpu, rows, &mut normalizers.host)?;
        stream.copy_out(&probable.gpu, rows * width as usize, &mut probable.host)
    }

    /// Waits for what was drawn from one row, and what is told of it. None if its logits were not finite.
    pub fn drawn(&mut self, row: usize) -> Result<Option<Drawn<'_>>, DeviceError> {
        let token = self.drawn.host.data()?[row];
        if token == NOT_FINITE {
            return Ok(None);
        }
        let (width, RowTold { top, told }) = (self.width() as usize, self.told[row]);
        if told == 0 {
            return Ok(Some(Drawn { token, told: None }));
        }
        let telling = &mut self.telling;
        let normalizer = telling.normalizers.host.data()?[row];
        let probable = &telling.probable.host.data()?[row * width..][..top as usize + 1];
        let told = Told { normalizer, drawn: probable[0].logit, top: &probable[1..] };
        Ok(Some(Drawn { token, told: Some(told) }))
    }

    /// Places for each row: for the drawn token, and the most probable ones of the row of which most is told. 0 if nothing is told.
    fn width(&self) -> u32 {
        self.told.iter().filter(|row| row.told == 1).map(|row| row.top + 1).max().unwrap_or(0)
    }
}

/// Elements in the host's memory and in the GPU's.
#[derive(Debug)]
struct Mirrored<T: Plain> {
    host: HostBuffer<T>,
    gpu: DeviceBuffer<T>,
}

impl<T: Plain> Mirrored<T> {
    fn new(device: &Device, len: usize) -> Result<Mirrored<T>, DeviceError> {
        Ok(Mirrored { host: HostBuffer::new(device, len)?, gpu: DeviceBuffer::new(device, len)? })
    }

    /// Has room for so many; what was there before may be gone.
    fn make_room(&mut self, device: &Device, len: usize) -> Result<(), DeviceError> {
        if self.gpu.len() < len {
            *self = Mirrored::new(device, len.next_power_of_two())?;
        }
        Ok(())
    }

    /// Queues a copy of these to the GPU.
    fn copy_in(&mut self, stream: &Stream, elements: &[T]) -> Result<(), DeviceError> {
        if elements.is_empty() {
            return Ok(());
        }
        self.make_room(stream.device(), elements.len())?;
        self.host.data()?[..elements.len()].copy_from_slice(elements);
        stream.copy_in(&mut self.host, elements.len(), &self.gpu, 0)
    }
}
