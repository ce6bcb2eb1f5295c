//! The processes: each behind a [`Link`] of its own, taken out by whoever does something to it, and put back whole or
//! replaced.

use super::{dice::Dice, fault::Part, link::Link};
use crate::{
    Deployment,
    process::{POLL, Process},
};
use anyhow::{Context, bail};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

/// How long a process may take to be there, tries that fail included: NATS may be away.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// How long one try may take.
const TRY_PATIENCE: Duration = Duration::from_secs(15);

/// How often the last process of a kind that nothing happens to may be taken as well.
const LAST_PERCENT: u64 = 3;

/// Seconds that a process that is told to stop gives its requests.
pub const GRACE: Duration = Duration::from_secs(5);

/// One process and its network.
pub struct Member {
    /// What it is.
    pub part: Part,
    /// Its name in events.
    pub name: String,
    /// `http://host:port` of a gateway.
    pub url: Option<String>,
    /// The process.
    pub process: Process,
    /// Its way to NATS.
    pub link: Link,
}

/// All places for processes, and who is there.
pub struct Fleet {
    deployment: Arc<Deployment>,
    places: Mutex<Vec<Place>>,
    gateways: AtomicU32,
}

struct Place {
    part: Part,
    /// None while something happens to it.
    member: Option<Member>,
    /// Where clients find a gateway. They are not told that something happens to it.
    url: Option<String>,
}

impl Fleet {
    /// Starts so many of each.
    pub async fn start(deployment: Arc<Deployment>, strength: &[(Part, usize)]) -> anyhow::Result<Fleet> {
        let fleet = Fleet { deployment, places: Mutex::default(), gateways: AtomicU32::new(0) };
        for (part, count) in strength {
            for _ in 0..*count {
                let member = fleet.member(*part).await?;
                let url = member.url.clone();
                let place = Place { part: *part, member: Some(member), url };
                fleet.places.lock().expect("no panics while held").push(place);
            }
        }
        Ok(fleet)
    }

    /// Starts one more process, however often it takes.
    pub async fn member(&self, part: Part) -> anyhow::Result<Member> {
        let give_up = Instant::now() + START_PATIENCE;
        loop {
            match self.try_member(part).await {
                Ok(member) => return Ok(member),
                Err(error) if Instant::now() > give_up => return Err(error),
                Err(_) => tokio::time::sleep(POLL * 5).await,
            }
        }
    }

    async fn try_member(&self, part: Part) -> anyhow::Result<Member> {
        let link = Link::to(self.deployment.nats_addresses()).await.context("a link")?;
        let gateway = format!("chaos-{}", self.gateways.fetch_add(1, Ordering::Relaxed));
        let (name, arguments, sign): (_, &[&str], _) = match part {
            Part::Gateway => ("gateway", &["gateway", "--id", &gateway], "listening on http://"),
            Part::Decode => ("decode", &["worker", "--role", "decode"], " worker="),
            Part::Prefill => ("prefill", &["worker", "--role", "prefill"], " worker="),
        };
        let mut command = self.deployment.command(arguments);
        command.env("FOREBAY_NATS", link.url()).env("FOREBAY_GRACE_S", GRACE.as_secs().to_string());
        let mut process = self.deployment.launch_with(name, &mut command);
        let give_up = Instant::now() + TRY_PATIENCE;
        loop {
            let exited = process.exited();
            if let Some(line) = process.said(sign) {
                let named = line.split(sign).nth(1).and_then(|rest| rest.split_whitespace().next());
                let named = named.context("a name follows")?.to_owned();
                let (name, url) = match part {
                    Part::Gateway => (gateway, Some(format!("http://{named}"))),
                    Part::Decode | Part::Prefill => (named, None),
                };
                return Ok(Member { part, name, url, process, link });
            }
            if let Some(status) = exited {
                bail!("a {part} ended ({status}) at its start:\n{}", process.log());
            }
            if Instant::now() > give_up {
                bail!("a {part} does not start:\n{}", process.log());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Takes one of those that fit out of its place, if one is there. Seldom the last one of its kind: with nobody to work,
    /// there is little that can go wrong.
    pub fn take(&self, dice: &mut Dice, fits: impl Fn(&Member) -> bool) -> Option<(usize, Member)> {
        let mut places = self.places.lock().expect("no panics while held");
        let last_too = dice.percent(LAST_PERCENT);
        let there =
            |part| places.iter().filter_map(|place| place.member.as_ref()).filter(|m| m.part == part).count();
        let may = |place: &Place| {
            place.member.as_ref().is_some_and(|member| fits(member) && (last_too || there(member.part) > 1))
        };
        let fitting: Vec<usize> = (0..places.len()).filter(|index| may(&places[*index])).collect();
        if fitting.is_empty() {
            return None;
        }
        let index = *dice.pick(&fitting);
        places[index].member.take().map(|member| (index, member))
    }

    /// Takes whoever is in this place, once it is there.
    pub async fn take_from(&self, index: usize) -> Member {
        loop {
            let taken = self.places.lock().expect("no panics while held")[index].member.take();
            match taken {
                Some(member) => return member,
                None => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// Puts somebody into a place that was taken from.
    pub fn put(&self, index: usize, member: Member) {
        let mut places = self.places.lock().expect("no panics while held");
        places[index].url = member.url.clone();
        places[index].member = Some(member);
    }

    /// The places of a kind.
    pub fn places(&self, part: Part) -> Vec<usize> {
        let places = self.places.lock().expect("no panics while held");
        (0..places.len()).filter(|index| places[*index].part == part).collect()
    }

    /// Where the gateways are, as clients know it.
    pub fn urls(&self) -> Vec<String> {
        self.places
            .lock()
            .expect("no panics while held")
            .iter()
            .filter_map(|place| place.url.clone())
            .collect()
    }
}
