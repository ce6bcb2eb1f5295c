//! Workers on different machines, as far as the network tells: their KV moves over TCP by itself.

use forebay_schemas::{event::Body, lifecycle::Phase, task::Role};
use forebay_streams::log::Recorded;
use forebay_tests::{
    Chat, Deployment,
    chaos::link::Link,
    deployment::shown,
    namespaces::{Namespace, Network},
    skipped,
};

/// Three machines: this one with NATS and the gateway, one to prefill and one to decode.
struct Site {
    // In this order: processes, namespaces, the bridge.
    deployment: Deployment,
    nats: Link,
    prefill: Namespace,
    decode: Namespace,
    network: Network,
}

impl Site {
    /// None, and a loud word, where this machine allows no namespaces.
    async fn build() -> Option<Site> {
        let network = match Network::create() {
            Ok(network) => network,
            Err(cause) => {
                skipped(&format!("workers on different machines: {cause}"));
                return None;
            }
        };
        let (prefill, decode) =
            (network.namespace().expect("as before"), network.namespace().expect("as before"));
        let mut deployment = Deployment::start().await;
        // Every prompt is to be computed, and its KV to be moved.
        deployment.set("FOREBAY_CACHE_GIB", "0");
        let nats = Link::at(network.address(), deployment.nats_addresses()).await.expect("a link");
        Some(Site { deployment, nats, prefill, decode, network })
    }
}

fn names(events: &[Recorded]) -> Vec<&'static str> {
    events.iter().map(|recorded| recorded.event.body.name()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_moves_between_machines_or_is_computed_again() {
    let Some(site) = Site::build().await else { return };
    let (deployment, url) = (&site.deployment, site.nats.url());
    let gateway = deployment.gateway(&[]).await;
    let question = "What is a forebay? ".repeat(60);
    let chat = Chat::new(&question).tokens(20);

    // What is right: one worker alone.
    let alone = deployment.worker(Role::Decode, &["--max-local-prefill-length", "100000"]).await;
    let expected = deployment.check(&gateway.client.ask(&chat).await).await;
    alone.terminate();
    deployment.gone(&alone.id).await;

    let flags = ["--nats", &url, "--max-local-prefill-length", "0"];
    let (mut decode, prefill) = tokio::join!(
        deployment.worker_in(&site.decode, Role::Decode, &flags),
        deployment.worker_in(&site.prefill, Role::Prefill, &flags),
    );
    let registered = deployment.registered();
    let (here, there) = (registered.borrow()[&decode.id].clone(), registered.borrow()[&prefill.id].clone());
    assert_ne!(here.host, there.host);
    let advertised = there.kv_tcp.as_deref().expect("it serves reads");
    assert!(advertised.starts_with(&format!("{}:", site.prefill.address())), "{advertised}");
    for _ in 0..3 {
        let state = deployment.check(&gateway.client.ask(&chat).await).await;
        assert_eq!((&state.phase, &state.tokens), (&Phase::Completed, &expected.tokens));
        let events = deployment.events(state.request).await;
        let moved = events.iter().find_map(|recorded| match &recorded.event.body {
            Body::KvTransferred(moved) => Some(moved.clone()),
            _ => None,
        });
        let moved = moved.unwrap_or_else(|| panic!("no KV moved:\n{}", shown(&events)));
        assert_eq!((moved.transport.as_str(), moved.tokens as usize), ("tcp", state.accepted.prompt.len()));
    }
    deployment.all_slots_free().await;

    // An address that nobody answers at costs the time of a connection, and a prefill.
    prefill.terminate();
    deployment.gone(&prefill.id).await;
    let lost = site.network.nowhere().to_string();
    let flags = ["--nats", &url, "--kv-advertise", &lost];
    let _astray = deployment.worker_in(&site.prefill, Role::Prefill, &flags).await;
    let state = deployment.check(&gateway.client.ask(&chat).await).await;
    assert_eq!((&state.phase, &state.tokens), (&Phase::Completed, &expected.tokens));
    let events = deployment.events(state.request).await;
    assert!(names(&events).contains(&"KvLost"), "{}", shown(&events));
    decode.terminate();
    assert!(decode.process.ended().await.success());
}
