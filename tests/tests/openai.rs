//! The HTTP surface, through OpenAI's own client.

use forebay_schemas::{event::Body, lifecycle::Phase};
use forebay_tests::{Deployment, python};
use std::{collections::HashSet, time::Duration};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_official_client_gets_what_it_expects() {
    let deployment = Deployment::start().await;
    let (_prefill, _decode) = tokio::join!(deployment.prefill(), deployment.decode());
    let gateway = deployment.gateway(&[]).await;
    let reported = python::run("official_client.py", &gateway.url, &[]).await;
    assert!(reported.len() > 50);
    let requests: HashSet<_> = reported.iter().map(|reported| reported.answer.request).collect();
    assert_eq!(requests.len(), reported.len(), "one id for each request");
    for reported in &reported {
        deployment.check(&reported.answer).await;
    }
    deployment.all_slots_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_request_is_refused_in_openais_words() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::ZERO);
    let _decode = deployment.decode().await;
    let gateway = deployment.gateway(&[]).await;
    for (body, status, code, param) in [
        ("{\"model\":", 400, "invalid_json", None),
        ("", 400, "invalid_json", None),
        ("[]", 400, "invalid_type", None),
        ("{\"messages\": []}", 400, "missing_required_parameter", Some("model")),
        ("{\"model\": \"demo\"}", 400, "missing_required_parameter", Some("messages")),
        (
            "{\"model\": \"demo\", \"messages\": [{\"role\": \"king\"}]}",
            400,
            "invalid_value",
            Some("messages[0].role"),
        ),
        ("{\"model\": \"nobody\", \"messages\": []}", 404, "model_not_found", Some("model")),
    ] {
        let (answered, error) = gateway.client.refused(body).await;
        assert_eq!((answered, error["code"].as_str()), (status, Some(code)), "{body}: {error}");
        assert_eq!(error["param"].as_str(), param, "{body}: {error}");
        assert_eq!(error["type"], "invalid_request_error", "{body}: {error}");
    }
}

/// A client goes in mid-stream: politely, or killed. Either way its request is cancelled, and its slot free again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_broken_off_is_cancelled() {
    let mut deployment = Deployment::start().await;
    // 3000 tokens take a minute: it ends because it is cancelled, not because it is over.
    deployment.simulate(Duration::from_millis(20));
    let (decode, _prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let gateway = deployment.gateway(&[]).await;

    let closed = python::run("break_off.py", &gateway.url, &["close"]).await;
    let hung = async {
        let (mut process, reported) = python::started("break_off.py", &gateway.url, &["hang"]).await;
        deployment.busy(&decode.id).await;
        process.kill().await.expect("it is killed");
        reported
    };
    for reported in [&closed[0], &hung.await] {
        let state = deployment.check(&reported.answer).await;
        assert_eq!(state.phase, Phase::Cancelled);
        assert!(state.tokens.len() < 2000, "{} tokens after the client had gone", state.tokens.len());
        let events = deployment.events(state.request).await;
        let Body::RequestCancelled(cancelled) = &events.last().expect("events").event.body else {
            unreachable!()
        };
        assert_eq!(cancelled.cause, "client disconnected");
    }
    deployment.all_slots_free().await;
    deployment.queue_empty(forebay_schemas::task::Role::Decode).await;
}
