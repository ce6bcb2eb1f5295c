//! Models, leases of workers, and blobs.

use crate::site::*;
use forebay_schemas::{
    card::{ModelCard, SamplingDefaults, WorkerLease},
    kv::LayoutHash,
    task::Role,
};
use forebay_streams::Streams;

pub(crate) async fn models_outlive_and_leases_lapse(streams: Streams) {
    let card = ModelCard {
        name: "test/model".into(),
        key: model(),
        created_s: 1,
        vocab_size: 100,
        context_tokens: 64,
        eos_token_ids: vec![2],
        tokenizer: streams.catalog.put_blob("tokenizer".into()).await.unwrap(),
        chat_template: None,
        special_tokens: vec![],
        defaults: SamplingDefaults::default(),
        layout_hash: LayoutHash(7),
        weights: "fp32".into(),
    };
    let lease =
        WorkerLease { slots: 4, free_slots: 4, ..WorkerLease::of(worker("w-1"), Role::Decode, model()) };
    streams.catalog.publish_model(&card).await.unwrap();
    streams.registry.renew(&lease).await.unwrap();
    let mut models = streams.catalog.models().await.unwrap();
    let mut workers = streams.registry.workers().await.unwrap();
    assert_eq!(*models.wait_for(|all| !all.is_empty()).await.unwrap()["test/model"], card);
    assert_eq!(*workers.wait_for(|all| !all.is_empty()).await.unwrap()[&worker("w-1")], lease);
    let lapsed = tokio::time::timeout(LEASE * 3, workers.wait_for(|all| all.is_empty())).await.is_ok();
    assert!(lapsed, "a lease that is not renewed lapses");
    streams.registry.renew(&lease).await.unwrap();
    workers.wait_for(|all| !all.is_empty()).await.unwrap();
    streams.registry.resign(&worker("w-1")).await.unwrap();
    let resigned = tokio::time::timeout(LEASE / 2, workers.wait_for(|all| all.is_empty())).await.is_ok();
    assert!(resigned, "a worker that resigns is gone at once");
    assert_eq!(models.borrow().len(), 1, "the model stays");
}

pub(crate) async fn blobs_read_back(streams: Streams) {
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
    let blob = streams.catalog.put_blob(bytes.clone().into()).await.unwrap();
    assert_eq!(streams.catalog.put_blob(bytes.clone().into()).await.unwrap(), blob);
    assert_eq!(streams.catalog.get_blob(&blob).await.unwrap(), bytes);
    let mut other = blob;
    other.name = "0".repeat(64);
    assert!(streams.catalog.get_blob(&other).await.is_err());
}
