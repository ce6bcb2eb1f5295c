//! What every keeper of leases and settings must do, run on each of them: in memory, on NATS, and on etcd.
//! Tests on etcd are skipped, and say so, where there is none: `scripts/setup.sh test` gets one.

use forebay_schemas::{
    card::WorkerLease,
    config::LiveConfig,
    ids::{ModelKey, WorkerId},
    task::Role,
};
use forebay_streams::{
    Streams,
    etcd::Etcd,
    jetstream::{self, Limits, Options},
    memory,
    registry::{Registry, Workers},
    server::Server,
    settings::{self, SettingsStore, Values},
};
use forebay_tests::{
    Chat, Deployment,
    chaos::link::{Link, Weather},
    etcd::EtcdServer,
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{sync::watch, task::JoinHandle};

const LEASE: Duration = Duration::from_secs(2);

/// How long what must happen may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// One backend, as several processes have it.
#[derive(Clone)]
struct Store {
    registry: Arc<dyn Registry>,
    settings: Arc<dyn SettingsStore>,
}

impl From<Streams> for Store {
    fn from(streams: Streams) -> Store {
        Store { registry: streams.registry, settings: streams.settings }
    }
}

async fn on_memory<F: Future<Output = ()>>(check: impl FnOnce(Store) -> F) {
    check(memory::streams_with(memory::Limits { lease_time: LEASE, ..Default::default() }).into()).await;
}

async fn on_nats<F: Future<Output = ()>>(check: impl FnOnce(Store) -> F) {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(None, folder.path(), 0).unwrap();
    check(nats(&server.url()).await).await;
}

async fn on_etcd<F: Future<Output = ()>>(check: impl FnOnce(Store) -> F) {
    let Some(server) = EtcdServer::start() else { return };
    check(etcd(&server.url()).await).await;
}

async fn nats(url: &str) -> Store {
    let options = Options {
        url: url.to_owned(),
        name: "registry".into(),
        inbox_prefix: "_INBOX.test".into(),
        credentials: None,
        limits: Limits { lease_time: LEASE, log_bytes: 64 << 20, ..Limits::default() },
    };
    jetstream::connect(options).await.unwrap().into()
}

async fn etcd(url: &str) -> Store {
    let etcd = Arc::new(Etcd::connect(url, LEASE).await.unwrap());
    Store { registry: etcd.clone(), settings: etcd }
}

macro_rules! conformance {
    ($($check:ident),* $(,)?) => {
        mod in_memory {
            $(#[tokio::test] async fn $check() { super::on_memory(super::$check).await; })*
        }
        mod on_nats_kv {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $check() { super::on_nats(super::$check).await; })*
        }
        mod on_etcd {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $check() { super::on_etcd(super::$check).await; })*
        }
    };
}

conformance!(
    leases_lapse_unless_renewed,
    who_resigns_is_gone_at_once,
    news_of_a_worker_are_seen,
    settings_are_seen_by_all_who_watch,
    bad_values_are_ignored_and_the_last_good_one_stays,
);

fn lease(worker: &str, free_slots: u32) -> WorkerLease {
    WorkerLease {
        slots: 4,
        free_slots,
        host: "here".into(),
        ..WorkerLease::of(worker.parse().unwrap(), Role::Decode, ModelKey::of("m"))
    }
}

fn names(workers: &Workers) -> Vec<&str> {
    workers.keys().map(WorkerId::as_str).collect()
}

async fn soon<T>(receiver: &mut watch::Receiver<T>, what: impl FnMut(&T) -> bool) {
    tokio::time::timeout(PATIENCE, receiver.wait_for(what)).await.expect("in time").expect("not ended");
}

/// Renews a lease as a worker does, for as long as it is not dropped.
fn keep(registry: Arc<dyn Registry>, lease: WorkerLease) -> JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            if let Err(error) = registry.renew(&lease).await {
                eprintln!("not renewed: {error}");
            }
            tokio::time::sleep(registry.lease_time() / 4).await;
        }
    })
}

/// Renewals that end when this is dropped.
struct Kept(JoinHandle<()>);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn leases_lapse_unless_renewed(store: Store) {
    store.registry.renew(&lease("a", 4)).await.unwrap();
    let kept = Kept(keep(store.registry.clone(), lease("b", 4)));
    let mut workers = store.registry.workers().await.unwrap();
    soon(&mut workers, |all| names(all) == ["a", "b"]).await;
    soon(&mut workers, |all| names(all) == ["b"]).await;
    tokio::time::sleep(store.registry.lease_time() * 2).await;
    assert_eq!(names(&workers.borrow()), ["b"], "who renews stays");
    let late = store.registry.workers().await.unwrap();
    assert_eq!(names(&late.borrow()), ["b"], "who asks later is told the same at once");
    drop(kept);
    soon(&mut workers, |all| all.is_empty()).await;
    store.registry.renew(&lease("a", 4)).await.unwrap();
    soon(&mut workers, |all| names(all) == ["a"]).await;
}

async fn who_resigns_is_gone_at_once(store: Store) {
    store.registry.renew(&lease("a", 4)).await.unwrap();
    let mut workers = store.registry.workers().await.unwrap();
    soon(&mut workers, |all| names(all) == ["a"]).await;
    store.registry.resign(&"a".parse().unwrap()).await.unwrap();
    let gone = tokio::time::timeout(LEASE / 2, workers.wait_for(|all| all.is_empty())).await.is_ok();
    assert!(gone, "before its lease would have lapsed");
    store.registry.resign(&"a".parse().unwrap()).await.expect("twice is no error");
    store.registry.renew(&lease("a", 4)).await.unwrap();
    soon(&mut workers, |all| names(all) == ["a"]).await;
}

async fn news_of_a_worker_are_seen(store: Store) {
    store.registry.renew(&lease("a", 4)).await.unwrap();
    let mut workers = store.registry.workers().await.unwrap();
    let free = |all: &Workers| all.get(&"a".parse::<WorkerId>().unwrap()).map(|lease| lease.free_slots);
    assert_eq!(free(&workers.borrow()), Some(4), "what there is, is known at once");
    for slots in [3, 4, 0] {
        store.registry.renew(&lease("a", slots)).await.unwrap();
        soon(&mut workers, |all| free(all) == Some(slots)).await;
    }
}

async fn settings_are_seen_by_all_who_watch(store: Store) {
    let settings = store.settings;
    assert_eq!(settings.get("step_tokens").await.unwrap(), None);
    settings.put("step_tokens", "8").await.unwrap();
    settings.put("router_active_weight", "").await.unwrap();
    assert_eq!(settings.get("step_tokens").await.unwrap().as_deref(), Some("8"));
    let (mut one, mut other) = (settings.watch().await.unwrap(), settings.watch().await.unwrap());
    let is = |expected: &[(&str, &str)]| {
        let expected: BTreeMap<String, String> =
            expected.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        move |values: &Values| **values == expected
    };
    assert!(is(&[("router_active_weight", ""), ("step_tokens", "8")])(&one.borrow()), "{:?}", one.borrow());
    settings.put("step_tokens", "9").await.unwrap();
    settings.remove("router_active_weight").await.unwrap();
    settings.remove("router_active_weight").await.expect("twice is no error");
    for watch in [&mut one, &mut other] {
        soon(watch, is(&[("step_tokens", "9")])).await;
    }
    assert_eq!(settings.get("router_active_weight").await.unwrap(), None);
}

async fn bad_values_are_ignored_and_the_last_good_one_stays(store: Store) {
    store.settings.put("max_local_prefill_length", "many").await.unwrap();
    store.settings.put("step_tokens", "8").await.unwrap();
    let mut live = settings::follow(&*store.settings).await.unwrap();
    assert_eq!(**live.borrow(), LiveConfig { step_tokens: Some(8), ..LiveConfig::default() });
    store.settings.put("step_tokens", "0").await.unwrap();
    store.settings.put("max_local_prefill_length", "7").await.unwrap();
    soon(&mut live, |live| live.max_local_prefill_length == Some(7)).await;
    assert_eq!(live.borrow().step_tokens, Some(8), "the last good one stays");
    store.settings.remove("step_tokens").await.unwrap();
    soon(&mut live, |live| live.step_tokens.is_none()).await;
}

/// Watches for a while that nobody is missing.
async fn all_stay(workers: &mut watch::Receiver<Workers>, expected: &[&str], time: Duration) {
    let missing = workers.wait_for(|all| names(all) != expected);
    if let Ok(all) = tokio::time::timeout(time, missing).await {
        panic!("{:?} instead of {expected:?}", names(&all.expect("not ended")));
    }
}

/// A server that is away for ten seconds costs nobody their lease, and who does not come back is missed in time.
async fn an_absence_harms_nobody(store: Store, interrupt: impl FnOnce() + Send + 'static) {
    let _kept = Kept(keep(store.registry.clone(), lease("a", 4)));
    let dies = Kept(keep(store.registry.clone(), lease("b", 4)));
    let mut workers = store.registry.workers().await.unwrap();
    soon(&mut workers, |all| names(all) == ["a", "b"]).await;
    let mut live = settings::follow(&*store.settings).await.unwrap();
    let interrupt = tokio::task::spawn_blocking(interrupt);
    all_stay(&mut workers, &["a", "b"], AWAY - Duration::from_secs(1)).await;
    drop(dies);
    interrupt.await.unwrap();
    all_stay(&mut workers, &["a", "b"], Duration::from_secs(1)).await;
    soon(&mut workers, |all| names(all) == ["a"]).await;
    all_stay(&mut workers, &["a"], store.registry.lease_time() * 3).await;
    store.settings.put("step_tokens", "8").await.unwrap();
    soon(&mut live, |live| live.step_tokens == Some(8)).await;
}

/// Away for so long.
const AWAY: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_may_be_away() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(None, folder.path(), 0).unwrap();
    let store = nats(&server.url()).await;
    let server = Arc::new(Mutex::new(server));
    let interrupted = server.clone();
    an_absence_harms_nobody(store, move || {
        interrupted.lock().unwrap().kill();
        std::thread::sleep(AWAY);
        interrupted.lock().unwrap().restart().unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_may_be_away() {
    let Some(server) = EtcdServer::start() else { return };
    let store = etcd(&server.url()).await;
    let server = Arc::new(Mutex::new(server));
    let interrupted = server.clone();
    an_absence_harms_nobody(store, move || {
        interrupted.lock().unwrap().kill();
        std::thread::sleep(AWAY);
        interrupted.lock().unwrap().restart();
    })
    .await;
}

/// Workers have new leases before anybody misses them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_may_lose_everything() {
    let Some(mut server) = EtcdServer::start() else { return };
    let store = etcd(&server.url()).await;
    let _kept = Kept(keep(store.registry.clone(), lease("a", 4)));
    let mut workers = store.registry.workers().await.unwrap();
    soon(&mut workers, |all| names(all) == ["a"]).await;
    store.settings.put("step_tokens", "8").await.unwrap();
    let mut live = settings::follow(&*store.settings).await.unwrap();
    assert_eq!(live.borrow().step_tokens, Some(8));
    tokio::task::block_in_place(|| server.restart_empty());
    all_stay(&mut workers, &["a"], Duration::from_secs(8)).await;
    soon(&mut live, |live| live.step_tokens.is_none()).await;
}

/// Workers, and what they generate, outlive an etcd that is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_go_on_while_etcd_is_away() {
    let Some(mut server) = EtcdServer::start() else { return };
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::from_millis(100));
    deployment.keep_registry_at(&server.url()).await;
    let (_decode, _prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let gateway = deployment.gateway(&[]).await;
    let client = gateway.client.clone();
    let long = tokio::spawn(async move { client.ask(&Chat::new("How long is it away?").tokens(150)).await });
    let registered = deployment.registered();
    let mut workers = registered.clone();
    soon(&mut workers, |all| all.values().any(|lease| lease.free_slots < lease.slots)).await;
    server.kill();
    tokio::time::sleep(AWAY).await;
    let meanwhile = gateway.client.ask(&Chat::new("Who answers now?").tokens(5)).await;
    deployment.check(&meanwhile).await;
    // Not with `block_in_place`: the thread that has started the processes might end, and they with it.
    let _server = tokio::task::spawn_blocking(move || {
        server.restart();
        server
    })
    .await
    .unwrap();
    let answer = tokio::time::timeout(PATIENCE, long).await.expect("in time").expect("no panic");
    let state = deployment.check(&answer).await;
    assert_eq!((state.tokens.len(), state.attempt), (150, 1), "nobody was taken for dead");
    tokio::time::sleep(LEASE * 3).await;
    assert_eq!(registered.borrow().len(), 2, "{:?}", registered.borrow());
    deployment.check(&gateway.client.ask(&Chat::new("And now?").tokens(5)).await).await;
    deployment.all_slots_free().await;
}

/// What changed while a watcher could not hear it, and was compacted since, is known once it can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_etcd_has_compacted_is_not_missed() {
    let Some(server) = EtcdServer::start() else { return };
    let link = Link::to(vec![server.address()]).await.unwrap();
    let near = etcd(&server.url()).await;
    near.settings.put("step_tokens", "8").await.unwrap();
    near.settings.put("max_prefill_queue_size", "8").await.unwrap();
    let far = etcd(&link.url().replace("nats://", "etcd://")).await;
    let mut live = settings::follow(&*far.settings).await.unwrap();
    let mut workers = far.registry.workers().await.unwrap();
    assert_eq!(live.borrow().step_tokens, Some(8));
    link.set(Weather::Cut);
    near.settings.put("step_tokens", "9").await.unwrap();
    near.settings.remove("max_prefill_queue_size").await.unwrap();
    near.registry.renew(&lease("a", 4)).await.unwrap();
    let _kept = Kept(keep(near.registry.clone(), lease("a", 3)));
    let header = server.call("kv/range", json!({ "key": "AA==" })).await;
    let revision = &header["header"]["revision"];
    server.call("kv/compaction", json!({ "revision": revision, "physical": true })).await;
    assert_eq!(live.borrow().step_tokens, Some(8), "nothing comes through");
    link.set(Weather::Fair);
    soon(&mut live, |live| live.step_tokens == Some(9) && live.max_prefill_queue_size.is_none()).await;
    soon(&mut workers, |all| names(all) == ["a"]).await;
}

/// A user and a password; and a server that has forgotten its tokens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_may_want_a_password() {
    let Some(mut server) = EtcdServer::start() else { return };
    server.call("auth/user/add", json!({ "name": "root", "password": "p@ss" })).await;
    server.call("auth/role/add", json!({ "name": "root" })).await;
    server.call("auth/user/grant", json!({ "user": "root", "role": "root" })).await;
    server.call("auth/enable", json!({})).await;
    let with = |user: &str| format!("etcd://{user}@{}", server.address());
    for bad in [server.url(), with("root:wrong")] {
        let error = Etcd::connect(&bad, LEASE).await.err().expect("refused").to_string();
        assert!(error.contains("does not answer") && !error.contains("wrong"), "{error}");
    }
    let store = etcd(&with("root:p@ss")).await;
    let _kept = Kept(keep(store.registry.clone(), lease("a", 4)));
    let mut workers = store.registry.workers().await.unwrap();
    soon(&mut workers, |all| names(all) == ["a"]).await;
    tokio::task::block_in_place(|| server.restart());
    all_stay(&mut workers, &["a"], Duration::from_secs(8)).await;
    store.settings.put("step_tokens", "8").await.unwrap();
    assert_eq!(store.settings.get("step_tokens").await.unwrap().as_deref(), Some("8"));
}
