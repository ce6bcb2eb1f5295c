//! A load with shared prefixes, drawn from a seed: documents of which some are asked about much more often than others,
//! and conversations of several turns about one of them.

use std::time::Duration;

/// Documents.
const DOCUMENTS: usize = 40;

/// Words of a document.
const WORDS: std::ops::Range<u64> = 600..1300;

/// Questions of one conversation.
const TURNS: std::ops::Range<u64> = 1..5;

/// The longest pause of a reader between an answer and the next question.
const PAUSE_MS: u64 = 3000;

/// What documents and questions are made of.
const WORD_LIST: [&str; 24] = [
    "river", "water", "lake", "power", "spring", "sea", "stone", "bridge", "valley", "gate", "turbine",
    "channel", "basin", "level", "flow", "rain", "snow", "summer", "winter", "town", "field", "road", "mill",
    "wheel",
];

/// A conversation about a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Visit {
    /// When it begins.
    pub(super) begin: Duration,
    /// What comes first in all its prompts.
    pub(super) document: String,
    pub(super) questions: Vec<String>,
    /// Between an answer and the next question.
    pub(super) pause: Duration,
}

/// All conversations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trace {
    pub(super) visits: Vec<Visit>,
}

impl Trace {
    /// As many conversations, of which `rate` begin in a second on average.
    pub(super) fn draw(seed: u64, conversations: usize, rate: f64) -> Trace {
        let mut dice = Dice(seed);
        let documents: Vec<String> = (0..DOCUMENTS)
            .map(|number| {
                let count = dice.within(WORDS);
                format!("Document {number}. {}", dice.words(count))
            })
            .collect();
        let mut begin = 0.0;
        let visits = (0..conversations).map(|_| {
            begin -= (1.0 - dice.share()).ln() / rate;
            let questions = (0..dice.within(TURNS)).map(|_| dice.words(8)).collect();
            Visit {
                begin: Duration::from_secs_f64(begin),
                document: documents[dice.zipf(DOCUMENTS)].clone(),
                questions,
                pause: Duration::from_millis(dice.within(0..PAUSE_MS)),
            }
        });
        Trace { visits: visits.collect() }
    }

    /// How many questions are asked.
    pub(super) fn requests(&self) -> usize {
        self.visits.iter().map(|visit| visit.questions.len()).sum()
    }
}

/// SplitMix64: <https://prng.di.unimi.it/splitmix64.c>.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to 1, without 1.
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn within(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// The first of several twice as often as the second, three times as often as the third …
    fn zipf(&mut self, count: usize) -> usize {
        let weights = (1..=count).map(|rank| 1.0 / rank as f64);
        let mut left = self.share() * weights.clone().sum::<f64>();
        let chosen = weights.enumerate().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        chosen.map_or(count - 1, |(rank, _)| rank)
    }

    fn words(&mut self, count: u64) -> String {
        let words: Vec<&str> = (0..count).map(|_| WORD_LIST[self.within(0..24) as usize]).collect();
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_one_trace_whose_documents_are_shared_unevenly() {
        let trace = Trace::draw(1, 400, 2.0);
        assert_eq!(trace, Trace::draw(1, 400, 2.0));
        assert_ne!(trace, Trace::draw(2, 400, 2.0));
        let about = |number: usize| {
            let title = format!("Document {number}. ");
            trace.visits.iter().filter(|visit| visit.document.starts_with(&title)).count()
        };
        assert!(about(0) > 2 * about(4), "{} {}", about(0), about(4));
        let last = trace.visits.last().unwrap().begin.as_secs_f64();
        assert!((150.0..250.0).contains(&last), "400 at two a second: {last}");
    }
}
