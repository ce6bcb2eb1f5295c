//! What can go wrong, and how it is drawn.

use super::dice::Dice;
use std::{collections::BTreeSet, fmt, time::Duration};

/// A kind of process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Answers clients.
    Gateway,
    /// Generates.
    Decode,
    /// Runs prompts.
    Prefill,
}

/// What happens to one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// SIGKILL, and a replacement after a while.
    Kill(Duration),
    /// SIGSTOP for a while: a zombie.
    Freeze(Duration),
    /// SIGTERM, and a replacement at once.
    Drain,
    /// Its connections to NATS break, and there are no new ones for a while.
    Cut(Duration),
    /// Nothing comes through to NATS for a while.
    Still(Duration),
    /// All is late by the first, for the second.
    Slow(Duration, Duration),
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Something happens to a process.
    Process {
        /// What.
        blow: Blow,
        /// To which kind.
        part: Part,
        /// Not at any time, but at the moment that a request's log gets an event of this name, and to the process
        /// that has the request.
        moment: Option<&'static str>,
    },
    /// nats-server (or one of a cluster) is killed, and back after a while.
    Nats(Duration),
    /// All workers of a kind are replaced, one after the other, each told to stop.
    Rolling(Part),
    /// A client closes its connection in the midst of an answer.
    Leave,
}

/// Moments to aim at a decode worker or a gateway.
const MOMENTS: [&str; 7] = [
    "Claimed",
    "PrefillQueued",
    "PrefillClaimed",
    "KvReady",
    "PrefillCompleted",
    "KvTransferred",
    "TokensGenerated",
];

/// Moments to aim at a prefill worker.
const PREFILL_MOMENTS: [&str; 4] = ["PrefillClaimed", "KvReady", "PrefillCompleted", "KvTransferred"];

impl Fault {
    /// The names of all kinds.
    pub fn kinds() -> Vec<String> {
        let mut dice = Dice::new(7);
        let kinds: BTreeSet<String> = (0..2000).map(|_| Fault::draw(&mut dice).to_string()).collect();
        kinds.into_iter().collect()
    }

    /// Draws one. Half of those that happen to a process are aimed.
    pub fn draw(dice: &mut Dice) -> Fault {
        match dice.within(0..100) {
            0..3 => return Fault::Nats(dice.millis(0..5000)),
            3..4 => return Fault::Rolling(*dice.pick(&[Part::Decode, Part::Prefill])),
            4..18 => return Fault::Leave,
            _ => {}
        }
        let part = match dice.within(0..100) {
            0..45 => Part::Decode,
            45..75 => Part::Prefill,
            _ => Part::Gateway,
        };
        let blow = match dice.within(0..100) {
            0..45 => Blow::Kill(if dice.percent(70) { Duration::ZERO } else { dice.millis(0..1000) }),
            45..58 => Blow::Freeze(freeze(dice)),
            58..70 => Blow::Drain,
            70..82 => Blow::Cut(dice.millis(0..3000)),
            82..92 => Blow::Still(dice.millis(200..5000)),
            _ => Blow::Slow(dice.millis(1..60), dice.millis(500..3000)),
        };
        let moments: &[&'static str] = if part == Part::Prefill { &PREFILL_MOMENTS } else { &MOMENTS };
        let moment = dice.percent(50).then(|| *dice.pick(moments));
        Fault::Process { blow, part, moment }
    }
}

/// Half a second to eight, more often short than long.
fn freeze(dice: &mut Dice) -> Duration {
    dice.millis(500..8000).min(dice.millis(500..8000))
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Gateway => "gateway",
            Part::Decode => "decode worker",
            Part::Prefill => "prefill worker",
        })
    }
}

/// The kind of fault, as reports count them.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Process { blow, part, .. } => match blow {
                Blow::Kill(_) => write!(f, "{part} killed"),
                Blow::Freeze(_) => write!(f, "{part} frozen"),
                Blow::Drain => write!(f, "{part} told to stop"),
                Blow::Cut(_) => write!(f, "{part} cut off"),
                Blow::Still(_) => write!(f, "{part} unheard"),
                Blow::Slow(..) => write!(f, "{part} slowed"),
            },
            Fault::Nats(_) => f.write_str("nats-server killed"),
            Fault::Rolling(part) => write!(f, "rolling restart, {part}s"),
            Fault::Leave => f.write_str("client left"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_the_same_faults_and_all_kinds() {
        let draw = |seed| {
            let mut dice = Dice::new(seed);
            (0..1000).map(|_| Fault::draw(&mut dice)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        assert_eq!(Fault::kinds().len(), 3 * 6 + 1 + 2 + 1, "{:?}", Fault::kinds());
    }
}
