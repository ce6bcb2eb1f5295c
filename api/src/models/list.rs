//! `GET /v1/models` and `GET /v1/models/{id}`.

use crate::{Shared, error::ApiError};
use axum::{
    Json,
    extract::{Path, State},
};
use forebay_schemas::openai::{ModelEntry, ModelList};
use std::sync::Arc;

pub(crate) async fn list_models(State(gateway): State<Arc<Shared>>) -> Json<ModelList> {
    let data = gateway.models.cards().values().map(|card| ModelEntry::from(card.as_ref())).collect();
    Json(ModelList { object: "list".into(), data })
}

pub(crate) async fn get_model(
    State(gateway): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Result<Json<ModelEntry>, ApiError> {
    Ok(Json(ModelEntry::from(gateway.models.card(&name)?.as_ref())))
}
