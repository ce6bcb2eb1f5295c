//! Workers on GPUs: KV goes from one GPU's memory to another's, straight or through a region, and no token changes. Without a GPU, processes
//! have the stand-in of `kernels/tests/cuda/driver.c` for a driver, and the graph runs on the processor.

#[allow(dead_code)]
#[path = "../../kernels/tests/cuda/stand_in.rs"]
mod stand_in;

use forebay_schemas::{
    event::{Body, ReleaseCause},
    ids::RequestId,
    lifecycle::Lifecycle,
    task::Role,
};
use forebay_tests::{Chat, Deployment, Gateway, Worker};
use tempfile::TempDir;

/// Small enough that a stand-in, which maps memory page by page, is quick to start.
const FLAGS: [&str; 6] = ["--device", "cuda:0", "--context", "1023", "--slots", "2"];

/// A deployment whose workers find a driver, for as long as the folder is there. None where NVRTC can't be had.
async fn deployment() -> Option<(Deployment, TempDir)> {
    let mut deployment = Deployment::start().await;
    let folder = tempfile::tempdir().unwrap();
    if std::env::var_os("FOREBAY_TEST_GPU").is_none() {
        if !cfg!(target_arch = "x86_64") {
            eprintln!("SKIPPED: workers on a stand-in for a GPU: no NVRTC to fetch for this machine");
            return None;
        }
        stand_in::build(&folder.path().join(stand_in::DRIVER));
        deployment.set("LD_LIBRARY_PATH", folder.path().to_str().unwrap());
        deployment.set("FOREBAY_BENCH_STAND_IN", "true");
    }
    Some((deployment, folder))
}

async fn on_gpu(deployment: &Deployment, role: Role) -> Worker {
    deployment.worker(role, &FLAGS).await
}

/// Over which transports KV was read for a request.
async fn transports(deployment: &Deployment, request: RequestId) -> Vec<String> {
    let transport = |body: Body| match body {
        Body::KvTransferred(transferred) => Some(transferred.transport),
        _ => None,
    };
    let events = deployment.events(request).await;
    events.into_iter().filter_map(|recorded| transport(recorded.event.body)).collect()
}

fn chat() -> Chat {
    let facts = "The code of amber is 4, that of basalt is 7, that of cedar is 2, that of dune is 9.";
    Chat::new(&format!("{facts} What is a forebay, and what is the code of basalt?")).tokens(40)
}

async fn asked(deployment: &Deployment, gateway: &Gateway, chat: &Chat) -> Lifecycle {
    deployment.check(&gateway.client.ask(chat).await).await
}

fn is_exact() -> bool {
    std::env::var_os("FOREBAY_TEST_GPU").is_none()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_goes_from_gpu_to_gpu_and_into_the_prefix_cache() {
    let Some((mut deployment, _folder)) = deployment().await else { return };
    deployment.set("FOREBAY_CHUNK", "32");
    deployment.set("FOREBAY_MAX_LOCAL_PREFILL_LENGTH", "8");
    let gateway = deployment.gateway(&[]).await;
    // What a CPU's worker says.
    let mut cpu = deployment.worker(Role::Decode, &["--device", "cpu"]).await;
    let expected = asked(&deployment, &gateway, &chat()).await;
    cpu.terminate();
    assert!(cpu.process.ended().await.success());
    deployment.gone(&cpu.id).await;

    let (decode, _prefill) =
        tokio::join!(on_gpu(&deployment, Role::Decode), on_gpu(&deployment, Role::Prefill));
    let remote = asked(&deployment, &gateway, &chat()).await;
    assert_eq!(remote.worker.as_ref(), Some(&decode.id));
    let events = deployment.events(remote.request).await;
    let pieces = events.iter().filter(|recorded| matches!(recorded.event.body, Body::KvReady(_))).count();
    assert!(pieces > 1, "the prompt is read in pieces");
    assert_eq!(transports(&deployment, remote.request).await, ["cuda"]);
    // The decode worker has the prompt now, and its own prefix cache.
    let again = asked(&deployment, &gateway, &chat()).await;
    assert!(again.cached_tokens >= 32, "{} tokens were cached", again.cached_tokens);
    if is_exact() {
        assert_eq!((&remote.tokens, &again.tokens), (&expected.tokens, &expected.tokens));
    }
    deployment.all_slots_free().await;
}

/// Over the host's pinned memory, to who may not read GPUs; and from one GPU's memory to another GPU.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kv_comes_to_any_gpu_by_the_way_that_is_open() {
    let Some((mut deployment, _folder)) = deployment().await else { return };
    deployment.set("FOREBAY_CHUNK", "32");
    deployment.set("FOREBAY_MAX_LOCAL_PREFILL_LENGTH", "8");
    deployment.set("FOREBAY_CACHE_GIB", "0");
    let gateway = deployment.gateway(&[]).await;
    let _prefill = on_gpu(&deployment, Role::Prefill).await;
    let mut found = Vec::new();
    let another = if is_exact() { "cuda:1" } else { "cuda:0" };
    for (device, more, expected) in
        [("cuda:0", &["--kv-transport", "shm"][..], "shm"), (another, &[], "cuda")]
    {
        let flags = [&["--device", device], &FLAGS[2..], more].concat();
        let mut decode = deployment.worker(Role::Decode, &flags).await;
        let state = asked(&deployment, &gateway, &chat()).await;
        assert_eq!(transports(&deployment, state.request).await, [expected]);
        found.push(state.tokens);
        decode.terminate();
        assert!(decode.process.ended().await.success());
        deployment.gone(&decode.id).await;
    }
    assert!(!is_exact() || found[0] == found[1], "{found:?}");
    deployment.all_slots_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_leaves_a_gpu_with_its_kv() {
    let Some((mut deployment, _folder)) = deployment().await else { return };
    // An answer that takes its time, whatever the model would say.
    let chat = chat().tokens(600).with("ignore_eos", true.into());
    deployment.set("FOREBAY_CACHE_GIB", "0");
    let gateway = deployment.gateway(&[]).await;
    let (one, two) = tokio::join!(on_gpu(&deployment, Role::Decode), on_gpu(&deployment, Role::Decode));
    let undisturbed = asked(&deployment, &gateway, &chat).await;
    let mut stream = gateway.client.stream(&chat).await;
    stream.read_text(20).await;
    let request = stream.answer().request;
    deployment.logged(request, |event| matches!(event.body, Body::TokensGenerated(_))).await;
    let is_of =
        |body: &Body, worker: &Worker| matches!(body, Body::Claimed(claimed) if claimed.worker == worker.id);
    let events = deployment.events(request).await;
    let first = events.iter().any(|recorded| is_of(&recorded.event.body, &one));
    let (mut owner, other) = if first { (one, two) } else { (two, one) };
    owner.terminate();
    assert!(owner.process.ended().await.success());
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((state.attempt, state.worker.as_ref()), (2, Some(&other.id)));
    let events = deployment.events(request).await;
    let handed_over = |body: &Body| match body {
        Body::Released(released) => released.cause == ReleaseCause::Drained && released.kv.is_some(),
        _ => false,
    };
    assert!(events.iter().any(|recorded| handed_over(&recorded.event.body)));
    assert_eq!(transports(&deployment, request).await, ["cuda"]);
    if is_exact() {
        assert_eq!(state.tokens, undisturbed.tokens);
    }
    deployment.all_slots_free().await;
}
