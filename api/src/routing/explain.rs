//! Where a prompt would go now and why, for people.

use super::{
    candidates,
    cost::{Choice, Weights, Why, decide},
    hits,
    index::Index,
    prompt_blocks, weights,
};
use crate::models::Models;
use forebay_schemas::{card::ModelCard, ids::WorkerId, openai::ChatRequest};
use forebay_streams::{StreamError, Streams, settings};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Why a prompt could not be explained.
#[derive(Debug)]
pub enum ExplainError {
    /// The backend does not answer.
    Streams(StreamError),
    /// There is no such model, or it makes no prompt of this.
    Model(String),
}

impl std::fmt::Display for ExplainError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExplainError::Streams(error) => error.fmt(f),
            ExplainError::Model(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for ExplainError {}

impl From<StreamError> for ExplainError {
    fn from(error: StreamError) -> ExplainError {
        ExplainError::Streams(error)
    }
}

/// What to explain.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The model's name; none: the only one there is.
    pub model: Option<&'a str>,
    /// The prompt.
    pub text: &'a str,
    /// It is the whole prompt. Otherwise it is what a user says, and goes through the chat template.
    pub raw: bool,
    /// The request's cache salt.
    pub salt: Option<&'a str>,
}

/// Where a prompt would go.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// The model's name.
    pub model: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Blocks that they take, the last one perhaps not whole.
    pub prompt_blocks: u32,
    /// The weights that count now.
    pub weights: Weights,
    /// The worker that the request would be queued for; none: whoever has room.
    pub worker: Option<WorkerId>,
    /// Why.
    pub why: Why,
    /// What each worker would cost, the best first.
    pub choices: Vec<Row>,
    /// Workers whose caches are not known: they have not told yet, or something that they told was missed.
    pub unknown: Vec<WorkerId>,
}

/// What a worker would cost: see [`Choice`].
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "as in Choice")]
pub struct Row {
    pub worker: WorkerId,
    pub hit_blocks: u32,
    pub prefill_blocks: u32,
    pub queued_blocks: u32,
    pub kv_blocks: u32,
    pub active: u32,
    pub free_slots: u32,
    pub cost: f64,
}

impl From<&Choice<'_>> for Row {
    fn from(choice: &Choice<'_>) -> Row {
        let Choice { worker, hit_blocks, prefill_blocks, queued_blocks, kv_blocks, active, free_slots, cost } =
            *choice;
        let worker = worker.clone();
        Row { worker, hit_blocks, prefill_blocks, queued_blocks, kv_blocks, active, free_slots, cost }
    }
}

/// Decides as a gateway would that has just started, and says why. A gateway also counts requests that it has just routed.
///
/// # Errors
/// If the backend does not answer, or the model can't be had.
pub async fn explain(streams: &Streams, question: Question<'_>) -> Result<Explanation, ExplainError> {
    let models = Models::follow(streams.catalog.clone()).await?;
    let (card, prompt) = prompt(&models, question).await?;
    let index = read_index(streams).await?;
    let workers = streams.registry.workers().await?.borrow().clone();
    let weights = weights(&settings::follow(&*streams.settings).await?.borrow());
    let hits = hits(&index, &card, question.salt, &prompt);
    let candidates = candidates(&card, &workers, &hits, &BTreeMap::new());
    let decision = decide(prompt_blocks(&prompt), &candidates, weights);
    let known: BTreeSet<&WorkerId> =
        index.workers().filter_map(|(worker, held)| held.map(|_| worker)).collect();
    let unknown =
        decision.choices.iter().map(|choice| choice.worker).filter(|worker| !known.contains(worker));
    Ok(Explanation {
        model: card.name.clone(),
        prompt_tokens: prompt.len(),
        prompt_blocks: prompt_blocks(&prompt),
        weights,
        worker: decision.worker.cloned(),
        why: decision.why,
        choices: decision.choices.iter().map(Row::from).collect(),
        unknown: unknown.cloned().collect(),
    })
}

async fn prompt(models: &Models, question: Question<'_>) -> Result<(Arc<ModelCard>, Vec<u32>), ExplainError> {
    let refused = |error: crate::error::ApiError| ExplainError::Model(error.envelope().error.message);
    let cards = models.cards();
    let name = match question.model {
        Some(name) => name,
        None if cards.len() == 1 => cards.keys().next().expect("there is one"),
        None => {
            let names: Vec<&str> = cards.keys().map(String::as_str).collect();
            return Err(ExplainError::Model(format!("name one of these models: {}", names.join(", "))));
        }
    };
    let model = models.get(name).await.map_err(refused)?;
    if question.raw {
        let tokens = model.tokens(question.text.to_owned()).map_err(refused)?;
        return Ok((model.card.clone(), tokens));
    }
    let message = serde_json::json!({ "role": "user", "content": question.text });
    let request = serde_json::json!({ "model": name, "messages": [message] });
    let request: ChatRequest = serde_json::from_value(request).expect("a well-formed request");
    let tokens = model.prompt(&Arc::new(request)).await.map_err(refused)?;
    Ok((model.card.clone(), tokens))
}

/// What is known of all caches now.
async fn read_index(streams: &Streams) -> Result<Index, StreamError> {
    let (mut index, mut seen) = (Index::default(), 0);
    loop {
        let told = streams.cache_events.told(None, seen).await?;
        let Some(last) = told.last() else { return Ok(index) };
        seen = last.seq;
        for told in &told {
            match &told.event {
                Some(event) => drop(index.apply(event)),
                None => index.lose(&told.of.worker),
            }
        }
    }
}
