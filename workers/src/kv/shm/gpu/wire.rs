//! What goes over the socket: questions, answers and granules.

use super::ANSWER_TIMEOUT;
use crate::kv::lease::Shown;
use forebay_kernels::cuda::SharedGranule;
use std::{
    io::{self, ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// Descriptors passed at once. The kernel takes up to 253 in a message; and those on their way count against the process's limit.
pub(super) const BATCH: usize = 64;

/// Size of a question.
pub(super) const QUESTION_BYTES: usize = 32;

/// Size of an answer.
pub(super) const ANSWER_BYTES: usize = 8;

const GRANULE_BYTES: usize = 12;

/// A connection on which all that is done must be done in [`ANSWER_TIMEOUT`], whoever dawdles.
pub(super) struct Timed<'a> {
    stream: &'a UnixStream,
    end: Instant,
}

impl<'a> Timed<'a> {
    pub(super) fn new(stream: &'a UnixStream) -> Timed<'a> {
        Timed { stream, end: Instant::now() + ANSWER_TIMEOUT }
    }

    /// For one call that reads, and waits for no longer than is left.
    pub(super) fn to_read(&self) -> io::Result<&'a UnixStream> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        Ok(self.stream)
    }

    /// For one call that writes.
    pub(super) fn to_write(&self) -> io::Result<&'a UnixStream> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        Ok(self.stream)
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.to_read()?.read(into)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to_write()?.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a reader asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// Which granules hold the first positions. As many as the answer says follow it.
    Where,
    /// Descriptors of so many of these granules, which follow. The answer has them with it.
    Pass(usize),
}

/// A question about the first positions of a slot, and the right to ask it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) question: Question,
    pub(super) positions: u32,
    pub(super) shown: Shown,
}

/// What an owner answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Answer {
    /// As was asked; the number is that of the granules or descriptors.
    Done(u32),
    /// The lease is over, or is not that which was shown.
    Denied,
    /// There is no such slot or position, or no memory for it any more.
    Absent,
    /// A granule lies over other memory by now.
    Moved,
    /// The driver failed.
    Failed,
}

impl Asked {
    pub(super) fn encode(&self) -> [u8; QUESTION_BYTES] {
        let (code, count) = match self.question {
            Question::Where => (1, 0),
            Question::Pass(count) => (2, count as u32),
        };
        let mut bytes = [0; QUESTION_BYTES];
        for (at, word) in [code, self.shown.slot, self.positions, count].into_iter().enumerate() {
            bytes[at * 4..][..4].copy_from_slice(&u32::to_le_bytes(word));
        }
        bytes[16..24].copy_from_slice(&self.shown.generation.to_le_bytes());
        bytes[24..].copy_from_slice(&self.shown.capability.to_le_bytes());
        bytes
    }

    /// None if there is no such question.
    pub(super) fn decode(bytes: &[u8; QUESTION_BYTES]) -> Option<Asked> {
        let question = match (word(bytes, 0), word(bytes, 12) as usize) {
            (1, 0) => Question::Where,
            (2, count) if (1..=BATCH).contains(&count) => Question::Pass(count),
            _ => return None,
        };
        let shown = Shown { slot: word(bytes, 4), generation: long(bytes, 16), capability: long(bytes, 24) };
        Some(Asked { question, positions: word(bytes, 8), shown })
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..][..4].try_into().expect("4 bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..][..8].try_into().expect("8 bytes"))
}

impl Answer {
    pub(super) fn encode(self) -> [u8; ANSWER_BYTES] {
        let (code, count) = match self {
            Answer::Done(count) => (0u32, count),
            Answer::Denied => (1, 0),
            Answer::Absent => (2, 0),
            Answer::Moved => (3, 0),
            Answer::Failed => (4, 0),
        };
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..4].copy_from_slice(&code.to_le_bytes());
        bytes[4..].copy_from_slice(&count.to_le_bytes());
        bytes
    }

    /// None if there is no such answer.
    pub(super) fn decode(bytes: &[u8; ANSWER_BYTES]) -> Option<Answer> {
        Some(match word(bytes, 0) {
            0 => Answer::Done(word(bytes, 4)),
            1 => Answer::Denied,
            2 => Answer::Absent,
            3 => Answer::Moved,
            4 => Answer::Failed,
            _ => return None,
        })
    }
}

pub(super) fn encode_granules(granules: &[SharedGranule]) -> Vec<u8> {
    let bytes = |granule: &SharedGranule| {
        let mut bytes = [0; GRANULE_BYTES];
        bytes[..4].copy_from_slice(&granule.at.to_le_bytes());
        bytes[4..].copy_from_slice(&granule.memory.to_le_bytes());
        bytes
    };
    granules.iter().flat_map(bytes).collect()
}

pub(super) fn read_granules(from: &mut impl Read, count: usize) -> io::Result<Vec<SharedGranule>> {
    let mut bytes = vec![0; count * GRANULE_BYTES];
    from.read_exact(&mut bytes)?;
    let granule = |bytes: &[u8]| SharedGranule { at: word(bytes, 0), memory: long(bytes, 4) };
    Ok(bytes.chunks_exact(GRANULE_BYTES).map(granule).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sends_a_little_at_a_time_is_not_waited_for_longer() {
        let (one, mut other) = UnixStream::pair().unwrap();
        let dawdles = std::thread::spawn(move || {
            while other.write_all(&[0]).is_ok() {
                std::thread::sleep(ANSWER_TIMEOUT / 20);
            }
        });
        let begun = Instant::now();
        let error = Timed::new(&one).read_exact(&mut [0; 1000]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
        assert!(begun.elapsed() >= ANSWER_TIMEOUT);
        drop(one);
        dawdles.join().unwrap();
    }

    #[test]
    fn questions_and_answers_are_read_as_they_were_written() {
        let shown = Shown { slot: 7, generation: u64::MAX - 1, capability: 1 << 40 };
        let asked = |question| Asked { question, positions: u32::MAX - 2, shown };
        for question in [Question::Where, Question::Pass(1), Question::Pass(BATCH)] {
            let found = Asked::decode(&asked(question).encode()).unwrap();
            assert_eq!((found.question, found.positions), (question, u32::MAX - 2));
            let Shown { slot, generation, capability } = found.shown;
            assert_eq!((slot, generation, capability), (7, u64::MAX - 1, 1 << 40));
        }
        for refused in [Question::Pass(0), Question::Pass(BATCH + 1)] {
            assert!(Asked::decode(&asked(refused).encode()).is_none());
        }
        for answer in [Answer::Done(9), Answer::Denied, Answer::Absent, Answer::Moved, Answer::Failed] {
            assert_eq!(Answer::decode(&answer.encode()), Some(answer));
        }
        assert!(Answer::decode(&[9; ANSWER_BYTES]).is_none());
    }
}
