//! A process loses its way to NATS, and nothing else happens: what it was doing goes on, here or elsewhere.

use forebay_schemas::{lifecycle::Phase, task::Role};
use forebay_tests::{
    Chat, Deployment,
    chaos::link::{Link, Weather},
    client::Streaming,
    deployment::LEASE,
};
use std::time::{Duration, Instant};

/// How long the way is closed: less than it takes to be given up for dead.
const BLINK: Duration = Duration::from_millis(300);

/// A longer silence is a hang: far more than it takes, whatever the machine does besides.
const SILENCE_MAX: Duration = Duration::from_secs(9);

/// Reads to the end, and measures the longest silence on the way.
async fn longest_silence(stream: &mut Streaming) -> Duration {
    let mut longest = Duration::ZERO;
    while stream.answer().finish.is_none() && stream.answer().error.is_none() {
        let since = Instant::now();
        stream.read_text(stream.answer().text.len() + 1).await;
        longest = longest.max(since.elapsed());
    }
    longest
}

/// Who is cut off.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cut {
    Decode,
    Gateway,
}

async fn blinks(cut: Cut, weather: Weather) {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::from_millis(20));
    let link = Link::to(deployment.nats_addresses()).await.expect("a link");
    let url = link.url();
    let flags = |part| if cut == part { vec!["--nats", &url] } else { vec![] };
    let _worker = deployment.worker(Role::Decode, &flags(Cut::Decode)).await;
    let gateway = deployment.gateway(&flags(Cut::Gateway)).await;
    let chat = Chat::new("Say something while nobody hears you.").tokens(150).seed(3);
    let undisturbed = deployment.check(&gateway.client.ask(&chat).await).await;
    let mut stream = gateway.client.stream(&chat).await;
    stream.read_text(50).await;
    // Slow enough for something always to be under way.
    link.set(Weather::Slow(Duration::from_millis(50)));
    tokio::time::sleep(BLINK).await;
    link.set(weather);
    let fair = async {
        tokio::time::sleep(BLINK).await;
        link.set(Weather::Fair);
    };
    let (silence, ()) = tokio::join!(longest_silence(&mut stream), fair);
    println!("{cut:?}, {weather:?} for {BLINK:?}: {silence:.1?} of silence");
    let state = deployment.check(&stream.rest().await).await;
    assert_eq!((&state.phase, &state.tokens), (&Phase::Completed, &undisturbed.tokens));
    assert!(silence < SILENCE_MAX, "{silence:?}");
    tokio::time::sleep(LEASE).await;
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_worker_is_cut_off_for_a_moment() {
    blinks(Cut::Decode, Weather::Cut).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_is_cut_off_for_a_moment() {
    blinks(Cut::Gateway, Weather::Cut).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_worker_is_unheard_for_a_moment() {
    blinks(Cut::Decode, Weather::Still).await;
}
