//! What goes over a connection: greeting, requests, answers and frames.

use crate::kv::lease::{Denied, Shown};
use forebay_schemas::kv::{KvHandle, KvLayout, TokenRange};
use std::ops::Range;

/// What a reader says first: protocol and version.
pub(super) const MAGIC: &[u8; 8] = b"fbkv-v1\n";

/// Bytes between two looks at the lease.
pub(super) const FRAME_BYTES: usize = 1 << 20;

/// Runs shorter than this are gathered: a system call for each would cost more than a copy.
pub(super) const GATHER_BELOW: usize = 16 << 10;

/// Size of a request.
pub(super) const REQUEST_BYTES: usize = 40;

/// The longest introduction.
pub(super) const INTRODUCTION_MAX: usize = 64 << 10;

/// Size of an answer.
pub(super) const ANSWER_BYTES: usize = 16;

/// What a reader wants of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Claim,
    Generation,
    Release,
    /// These planes of these tokens.
    Read(TokenRange, Range<u32>),
    /// How to read by other means: the answer's number is the length of what follows. Owners of before hang up.
    Introduction,
    /// Whether a read would be served now, for one that goes by other means.
    Check,
}

/// An operation, and the right to it.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) operation: Operation,
    pub(super) shown: Shown,
}

impl Request {
    pub(super) fn new(operation: Operation, handle: &KvHandle) -> Request {
        let KvHandle { slot, generation, capability, .. } = *handle;
        Request { operation, shown: Shown { slot, generation, capability } }
    }

    pub(super) fn encode(&self) -> [u8; REQUEST_BYTES] {
        let (code, tokens, planes) = match &self.operation {
            Operation::Claim => (1, None, 0..0),
            Operation::Generation => (2, None, 0..0),
            Operation::Release => (3, None, 0..0),
            Operation::Read(tokens, planes) => (4, Some(*tokens), planes.clone()),
            Operation::Introduction => (5, None, 0..0),
            Operation::Check => (6, None, 0..0),
        };
        let tokens = tokens.unwrap_or(TokenRange { start: 0, count: 0 });
        let words = [code, self.shown.slot, tokens.start, tokens.count, planes.start, planes.end];
        let mut bytes = [0; REQUEST_BYTES];
        for (at, word) in words.iter().enumerate() {
            bytes[at * 4..][..4].copy_from_slice(&word.to_le_bytes());
        }
        bytes[24..32].copy_from_slice(&self.shown.generation.to_le_bytes());
        bytes[32..].copy_from_slice(&self.shown.capability.to_le_bytes());
        bytes
    }

    /// None if there is no such operation.
    pub(super) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Request> {
        let word = |at: usize| u32::from_le_bytes(bytes[at * 4..][..4].try_into().expect("4 bytes"));
        let long = |at: usize| u64::from_le_bytes(bytes[at..][..8].try_into().expect("8 bytes"));
        let operation = match word(0) {
            1 => Operation::Claim,
            2 => Operation::Generation,
            3 => Operation::Release,
            4 => Operation::Read(TokenRange { start: word(2), count: word(3) }, word(4)..word(5)),
            5 => Operation::Introduction,
            6 => Operation::Check,
            _ => return None,
        };
        Some(Request {
            operation,
            shown: Shown { slot: word(1), generation: long(24), capability: long(32) },
        })
    }

    /// Whether what it names is in the region, and no more than a reader asks for at once.
    pub(super) fn is_within(&self, layout: &KvLayout) -> bool {
        let read = match &self.operation {
            Operation::Read(tokens, planes) => {
                tokens.count > 0
                    && tokens.start.checked_add(tokens.count).is_some_and(|end| end <= layout.positions)
                    && planes.start < planes.end
                    && planes.end <= layout.geometry.layers * 2
                    && planes.end - planes.start <= KvHandle::PLANES_PER_CHECKSUM
            }
            _ => true,
        };
        read && self.shown.slot < layout.slots
    }
}

/// What an owner answers. Before each frame of a read too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done; the number is the generation where that was asked for.
    Done(u64),
    /// No.
    Denied(Denied),
    /// That is not in the region.
    OutOfRange,
    /// To a greeting: that is somebody else.
    Stranger,
    /// To a greeting: it serves as many connections as it may.
    Busy,
}

impl Answer {
    pub(super) fn encode(self) -> [u8; ANSWER_BYTES] {
        let (code, value) = match self {
            Answer::Done(value) => (0_u64, value),
            Answer::Denied(Denied::Over(found)) => (1, found),
            Answer::Denied(Denied::Lapsed) => (2, 0),
            Answer::Denied(Denied::Capability) => (3, 0),
            Answer::OutOfRange => (4, 0),
            Answer::Stranger => (5, 0),
            Answer::Busy => (6, 0),
        };
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..8].copy_from_slice(&code.to_le_bytes());
        bytes[8..].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    /// None if there is no such answer.
    pub(super) fn decode(bytes: &[u8; ANSWER_BYTES]) -> Option<Answer> {
        let long = |at: usize| u64::from_le_bytes(bytes[at..][..8].try_into().expect("8 bytes"));
        Some(match long(0) {
            0 => Answer::Done(long(8)),
            1 => Answer::Denied(Denied::Over(long(8))),
            2 => Answer::Denied(Denied::Lapsed),
            3 => Answer::Denied(Denied::Capability),
            4 => Answer::OutOfRange,
            5 => Answer::Stranger,
            6 => Answer::Busy,
            _ => return None,
        })
    }
}

/// Cuts contiguous pieces, `(offset, bytes)`, into frames of whole or cut pieces. Where each frame ends depends on the
/// lengths alone, so that both sides come to the same.
pub(super) fn frames(
    mut pieces: impl Iterator<Item = (usize, usize)>,
) -> impl Iterator<Item = Vec<(usize, usize)>> {
    let mut rest = None;
    std::iter::from_fn(move || {
        let (mut frame, mut room) = (Vec::new(), FRAME_BYTES);
        while room > 0 {
            let Some((offset, bytes)) = rest.take().or_else(|| pieces.next()) else { break };
            let now = bytes.min(room);
            frame.push((offset, now));
            room -= now;
            rest = (now < bytes).then_some((offset + now, bytes - now));
        }
        (!frame.is_empty()).then_some(frame)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::kv::{KvDtype, KvGeometry};

    const LAYOUT: KvLayout = KvLayout {
        geometry: KvGeometry { layers: 20, kv_heads: 2, head_dim: 8, dtype: KvDtype::F32 },
        slots: 2,
        positions: 16,
    };

    fn read(slot: u32, start: u32, count: u32, planes: Range<u32>) -> Request {
        let operation = Operation::Read(TokenRange { start, count }, planes);
        Request { operation, shown: Shown { slot, generation: u64::MAX >> 2, capability: u64::MAX } }
    }

    #[test]
    fn requests_and_answers_read_back() {
        let request = read(1, 2, 3, 4..5);
        let again = Request::decode(&request.encode()).unwrap();
        assert_eq!(format!("{again:?}"), format!("{request:?}"));
        assert!(Request::decode(&[0xff; REQUEST_BYTES]).is_none());
        for answer in [
            Answer::Done(7),
            Answer::Denied(Denied::Over(9)),
            Answer::Denied(Denied::Lapsed),
            Answer::Denied(Denied::Capability),
            Answer::OutOfRange,
            Answer::Stranger,
            Answer::Busy,
        ] {
            assert_eq!(Answer::decode(&answer.encode()), Some(answer));
        }
    }

    #[test]
    fn nothing_beyond_the_region_is_within_it() {
        assert!(read(1, 0, 16, 24..40).is_within(&LAYOUT));
        for beyond in [
            read(2, 0, 1, 0..1),
            read(0, 16, 1, 0..1),
            read(0, u32::MAX, 2, 0..1),
            read(0, 0, 0, 0..1),
            read(0, 0, 1, 40..41),
            read(0, 0, 1, 0..17),
            read(0, 0, 1, 3..3),
        ] {
            assert!(!beyond.is_within(&LAYOUT), "{beyond:?}");
        }
    }

    #[test]
    fn frames_hold_all_of_the_pieces_in_order() {
        let pieces = [(0, 5), (100, FRAME_BYTES - 5), (7, FRAME_BYTES * 2 + 1), (3, 1)];
        let cut: Vec<_> = frames(pieces.into_iter()).collect();
        assert_eq!(
            cut,
            [
                vec![(0, 5), (100, FRAME_BYTES - 5)],
                vec![(7, FRAME_BYTES)],
                vec![(7 + FRAME_BYTES, FRAME_BYTES)],
                vec![(7 + 2 * FRAME_BYTES, 1), (3, 1)],
            ]
        );
    }
}
