//! A model with its tokenizer and chat template: from a conversation to a prompt.

use crate::{
    error::{ApiError, ErrorCode},
    meters::ModelMeters,
    template::ChatTemplate,
    validate::conversation,
};
use forebay_schemas::{
    card::ModelCard,
    openai::{ChatRequest, Content, Message},
};
use forebay_streams::{catalog::Catalog, environment::off_thread};
use std::sync::Arc;
use tokenizers::Tokenizer;
use tokio::sync::Semaphore;

/// Bytes of conversation that become a prompt where they are: about half a millisecond. Longer ones move to a
/// thread that may block, so that they do not hold up other requests' tokens.
const INLINE_MAX: usize = 2048;

/// Longer ones at once; more wait.
static LARGE: Semaphore = Semaphore::const_new(4);

/// A model, ready to make prompts.
pub(crate) struct Model {
    pub(crate) card: Arc<ModelCard>,
    /// What `system_fingerprint` says: the meaning of the model's KV, hence of its numbers.
    pub(crate) fingerprint: String,
    pub(crate) meters: ModelMeters,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

/// Reads what a card refers to. `ModelUnreadable` is for good; other errors may pass.
pub(super) async fn load(catalog: &dyn Catalog, card: Arc<ModelCard>) -> Result<Model, ApiError> {
    let bytes = catalog.get_blob(&card.tokenizer).await.map_err(|error| {
        tracing::warn!(model = card.name, %error, "the tokenizer could not be read");
        ApiError::of(
            ErrorCode::BackendUnavailable,
            "model",
            format!(
                "the tokenizer of model {:?} can't be read now; try again, or publish the model again",
                card.name
            ),
        )
    })?;
    let load = move || {
        let unreadable = |what: &str, error: String| {
            let message =
                format!("the {what} of model {:?} is not valid: {error}; publish the model again", card.name);
            ApiError::of(ErrorCode::ModelUnreadable, "model", message)
        };
        let tokenizer =
            Tokenizer::from_bytes(&bytes).map_err(|error| unreadable("tokenizer", error.to_string()))?;
        let template =
            card.chat_template.as_deref().map(|source| ChatTemplate::new(source, &card.special_tokens));
        let template =
            template.transpose().map_err(|error| unreadable("chat template", error.to_string()))?;
        Ok(Model {
            fingerprint: format!("fb_{}", card.layout_hash),
            meters: ModelMeters::new(&card.name),
            tokenizer,
            template,
            card,
        })
    };
    // Tokenizers of large vocabularies take most of a second.
    off_thread(load).await
}

impl Model {
    /// The token ids of a request's prompt.
    pub(crate) async fn prompt(self: &Arc<Self>, request: &Arc<ChatRequest>) -> Result<Vec<u32>, ApiError> {
        if conversation_bytes(request) <= INLINE_MAX {
            return self.prompt_now(request);
        }
        let _turn = LARGE.acquire().await.expect("never closed");
        let (model, request) = (self.clone(), request.clone());
        off_thread(move || model.prompt_now(&request)).await
    }

    fn prompt_now(&self, request: &ChatRequest) -> Result<Vec<u32>, ApiError> {
        let turns = conversation(request)?;
        let Some(template) = &self.template else {
            return Err(ApiError::of(
                ErrorCode::NoChatTemplate,
                "model",
                format!(
                    "model {:?} has no chat template; ask for a model that was made for chat",
                    self.card.name
                ),
            ));
        };
        let text = template.render(&turns, request.chat_template_kwargs.as_ref())?;
        self.tokens(text)
    }

    /// The token ids of a text, as it is: a template has written the special tokens already, as `apply_chat_template`
    /// assumes too.
    pub(crate) fn tokens(&self, text: String) -> Result<Vec<u32>, ApiError> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|error| {
            ApiError::of(ErrorCode::InvalidValue, "messages", format!("no tokens for this text: {error}"))
        })?;
        Ok(encoding.get_ids().to_vec())
    }
}

fn conversation_bytes(request: &ChatRequest) -> usize {
    let content = |message: &Message| match &message.content {
        None => 0,
        Some(Content::Text(text)) => text.len(),
        Some(Content::Parts(parts)) => {
            parts.iter().filter_map(|part| part.text.as_ref()).map(String::len).sum()
        }
    };
    request.messages.iter().map(content).sum()
}
