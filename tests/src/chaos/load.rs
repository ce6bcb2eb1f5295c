//! The clients: each asks one question after the other, at whichever gateway, and reads what comes.

use super::{
    dice::Dice,
    fleet::Fleet,
    reading::{self, End, Reading, Rest, Stream},
};
use crate::{Chat, Deployment, Gateway};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

/// How often the rest of a broken stream is asked for.
const RESUMES_MAX: u32 = 100;

/// Pause after no gateway answered.
const PAUSE: Duration = Duration::from_millis(50);

/// Words of prompts, which are from one to [`PROMPT_WORDS`] of these.
const WORDS: [&str; 8] = ["water", "waits", "above", "the", "mill", "until", "a", "turbine"];

/// The longest prompt, in words.
const PROMPT_WORDS: u64 = 160;

/// What may be asked, and the answer of a worker that nothing happened to.
#[derive(Clone, Debug)]
pub struct Question {
    text: String,
    seed: u64,
    /// All tokens that may be asked for.
    pub tokens: Vec<u32>,
    /// The prompt's tokens: they tell which question a log is of, with the seed.
    pub prompt: Vec<u32>,
}

/// Draws questions, and has them answered in calm.
pub async fn questions(
    dice: &mut Dice,
    count: usize,
    tokens: u32,
    deployment: &Deployment,
    gateway: &Gateway,
) -> Vec<Question> {
    let mut questions = Vec::new();
    for number in 0..count {
        let words = (0..dice.within(1..PROMPT_WORDS)).map(|_| *dice.pick(&WORDS)).collect::<Vec<_>>();
        let text = format!("{number} {}", words.join(" "));
        let seed = dice.within(0..1 << 31);
        let answer = gateway.client.ask(&Chat::new(&text).tokens(tokens).seed(seed)).await;
        let state = deployment.check(&answer).await;
        questions.push(Question { text, seed, tokens: state.tokens, prompt: state.accepted.prompt.clone() });
    }
    questions
}

/// One thing to ask.
struct Ask {
    body: Value,
    stream: bool,
    /// May be read on elsewhere, and goes on without a reader.
    stored: bool,
}

fn ask(dice: &mut Dice, questions: &[Question]) -> Ask {
    let question = dice.pick(questions);
    let most = question.tokens.len() as u64;
    // Short answers are as frequent as long ones.
    let tokens = if dice.percent(50) { dice.within(1..20) } else { dice.within(20..most + 1) };
    let (stream, stored) = (dice.percent(70), dice.percent(60));
    let mut body = json!({
        "model": crate::deployment::MODEL,
        "messages": [{ "role": "user", "content": question.text }],
        "temperature": 0, "seed": question.seed, "max_tokens": tokens, "ignore_eos": true, "stream": stream,
    });
    if stored {
        body["store"] = json!(true);
    }
    if stream {
        body["stream_options"] = json!({ "include_usage": true });
    }
    Ask { body, stream, stored }
}

/// A client.
pub struct Asker {
    /// Whom to ask.
    pub fleet: Arc<Fleet>,
    /// What to ask.
    pub questions: Arc<[Question]>,
    /// Somebody is to leave.
    pub leave: Arc<Notify>,
    /// Where readings go.
    pub readings: mpsc::UnboundedSender<Reading>,
}

impl Asker {
    /// Asks and reads until it is told to stop, and then to the end of what it reads.
    pub async fn run(self, mut dice: Dice, stop: CancellationToken) {
        // Each connection anew: pooled ones to a gateway that is gone would only fail.
        let http = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0);
        let http = http.connect_timeout(Duration::from_secs(5)).build().expect("a client");
        while !stop.is_cancelled() {
            let ask = ask(&mut dice, &self.questions);
            let gateway = dice.pick(&self.fleet.urls()).clone();
            let reading = self.read(&http, &mut dice, &gateway, &ask).await;
            if matches!(reading.end, End::Unanswered | End::Error) {
                tokio::time::sleep(PAUSE).await;
            }
            // Nobody listens once a run was given up.
            let _ = self.readings.send(reading);
        }
    }

    async fn read(&self, http: &reqwest::Client, dice: &mut Dice, gateway: &str, ask: &Ask) -> Reading {
        let response =
            match tokio::time::timeout(crate::PATIENCE, reading::post(http, gateway, &ask.body)).await {
                Ok(Ok(response)) => response,
                Ok(Err(_)) => return Reading::nothing(gateway, End::Unanswered),
                Err(_) => return Reading::nothing(gateway, End::Silent),
            };
        if !ask.stream || response.status() != 200 {
            return Reading::whole(gateway, response).await;
        }
        let mut stream = Stream::new(gateway, response, ask.stored);
        loop {
            let end = tokio::select! {
                end = stream.read() => end,
                () = self.leave.notified(), if !ask.stored => End::Left,
            };
            stream.reading.end = end;
            if end != End::Broken || !ask.stored || !self.resume(http, dice, &mut stream).await {
                return stream.reading;
            }
        }
    }

    /// Finds a gateway that has the rest of a broken stream. False if there is none.
    async fn resume(&self, http: &reqwest::Client, dice: &mut Dice, stream: &mut Stream) -> bool {
        let request = stream.reading.answer.as_ref().expect("a stream has an answer").request;
        let last_id = stream.last_id.clone().unwrap_or_else(|| format!("{request}/0"));
        for _ in 0..RESUMES_MAX {
            let gateway = dice.pick(&self.fleet.urls()).clone();
            match reading::rest(http, &gateway, request, &last_id).await {
                Rest::Comes(response) => {
                    stream.resume(response);
                    return true;
                }
                Rest::NotNow => tokio::time::sleep(PAUSE).await,
            }
        }
        false
    }
}
