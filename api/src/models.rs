//! The models that can be asked for: cards as the catalog has them now, and beside each card what it takes to
//! turn a conversation into a prompt.

mod list;
mod loaded;

use crate::error::{ApiError, ErrorCode};
use forebay_schemas::card::ModelCard;
use forebay_streams::{
    StreamError,
    catalog::{Catalog, Models as Cards},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};
use tokio::sync::{OnceCell, watch};

pub(crate) use list::{get_model, list_models};
pub(crate) use loaded::Model;

/// Names that the error about an unknown model lists.
const LISTED_MAX: usize = 20;

/// All models.
pub(crate) struct Models {
    catalog: Arc<dyn Catalog>,
    cards: watch::Receiver<Cards>,
    loaded: Mutex<BTreeMap<String, Entry>>,
}

/// A model that was asked for, or is about to be. A card that was replaced has another entry.
#[derive(Clone)]
struct Entry {
    card: Arc<ModelCard>,
    /// Broken ones are kept too, so that they are read once and not with every request.
    model: Arc<OnceCell<Result<Arc<Model>, ApiError>>>,
}

impl Models {
    /// All models of a catalog, kept up to date.
    pub(crate) async fn follow(catalog: Arc<dyn Catalog>) -> Result<Models, StreamError> {
        let cards = catalog.models().await?;
        Ok(Models { catalog, cards, loaded: Mutex::default() })
    }

    /// A model by the name that clients use, loaded.
    pub(crate) async fn get(&self, name: &str) -> Result<Arc<Model>, ApiError> {
        let card = self.card(name)?;
        let entry = self.entry(&card);
        let load = async || match loaded::load(self.catalog.as_ref(), entry.card.clone()).await {
            Ok(model) => Ok(Ok(Arc::new(model))),
            Err(error) if error.code() == ErrorCode::ModelUnreadable => Ok(Err(error)),
            Err(passing) => Err(passing),
        };
        entry.model.get_or_try_init(load).await?.clone()
    }

    /// A model's card.
    pub(crate) fn card(&self, name: &str) -> Result<Arc<ModelCard>, ApiError> {
        let cards = self.cards();
        cards.get(name).cloned().ok_or_else(|| unknown(name, &cards))
    }

    /// All cards, as they are now.
    pub(crate) fn cards(&self) -> Cards {
        self.cards.borrow().clone()
    }

    /// Whether the catalog still brings news.
    pub(crate) fn alive(&self) -> bool {
        self.cards.has_changed().is_ok()
    }

    fn entry(&self, card: &Arc<ModelCard>) -> Entry {
        let mut loaded = self.loaded.lock().expect("no panics while held");
        match loaded.get(&card.name) {
            Some(entry) if entry.card == *card => entry.clone(),
            _ => {
                let entry = Entry { card: card.clone(), model: Arc::default() };
                loaded.insert(card.name.clone(), entry.clone());
                entry
            }
        }
    }

    fn forget_all_but(&self, cards: &Cards) {
        self.loaded.lock().expect("no panics while held").retain(|name, _| cards.contains_key(name));
    }
}

/// Loads models as they come, so that no client waits for that. Ends when the catalog's news do.
pub(crate) async fn preload(models: Arc<Models>) {
    let mut cards = models.cards.clone();
    cards.mark_changed();
    while cards.changed().await.is_ok() {
        let now = cards.borrow_and_update().clone();
        models.forget_all_but(&now);
        for name in now.keys() {
            if let Err(error) = models.get(name).await {
                tracing::error!(model = name, error = %error.envelope().error.message, "this model can't be served");
            }
        }
    }
}

fn unknown(name: &str, cards: &Cards) -> ApiError {
    let mut known: Vec<&str> = cards.keys().take(LISTED_MAX).map(String::as_str).collect();
    if cards.len() > LISTED_MAX {
        known.push("…");
    }
    let known = if known.is_empty() { "no model yet: start a worker".to_owned() } else { known.join(", ") };
    ApiError::of(
        ErrorCode::ModelNotFound,
        "model",
        format!("model {name:?} does not exist; there is {known}"),
    )
}
