//! A gateway that serves on a port of its own, and the worker's part as the test plays it.

use forebay_api::{Gateway, GatewayConfig};
use forebay_schemas::{
    card::{ModelCard, SamplingDefaults},
    event::{Body, Claimed, FinishReason, RequestCompleted, TokensGenerated},
    ids::{ModelKey, RequestId, WorkerId},
    kv::LayoutHash,
    openai::ChatChunk,
    sampling::Logprobs,
    task::{DecodeTask, Role, Task},
};
use forebay_streams::{
    Streams, jetstream,
    log::{LogRef, Recorded},
    server::Server,
    tasks::{Delivery, Verdict},
    writer::LogWriter,
};
use futures::StreamExt;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

/// A template in which the prompt is easy to predict.
pub(crate) const TEMPLATE: &str = "{% for m in messages %}{% if m.content == 'refuse me' %}\
    {{ raise_exception('not this') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// A gateway, its backend, and a client.
pub(crate) struct Site {
    pub(crate) url: String,
    pub(crate) streams: Streams,
    pub(crate) config: GatewayConfig,
    pub(crate) http: reqwest::Client,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Site {
    pub(crate) async fn start() -> Site {
        Site::with(forebay_streams::memory::streams(), GatewayConfig::default()).await
    }

    pub(crate) async fn with(streams: Streams, config: GatewayConfig) -> Site {
        streams.catalog.publish_model(&card(&streams, "demo").await).await.unwrap();
        let gateway = Gateway::start(streams.clone(), config.clone()).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(gateway.serve(listener, async {
            let _ = stopped.await;
        }));
        Site { url, streams, config, http: reqwest::Client::new(), stop: Some(stop), serving }
    }

    pub(crate) async fn get(&self, path: &str) -> reqwest::Response {
        self.http.get(format!("{}{path}", self.url)).send().await.unwrap()
    }

    pub(crate) async fn post(&self, body: Value) -> reqwest::Response {
        self.post_to("/v1/chat/completions", &[], body).await
    }

    pub(crate) async fn post_to(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: Value,
    ) -> reqwest::Response {
        let mut request = self.http.post(format!("{}{path}", self.url)).json(&body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.unwrap()
    }

    pub(crate) async fn delete(&self, path: &str) -> reqwest::Response {
        self.http.delete(format!("{}{path}", self.url)).send().await.unwrap()
    }

    /// The events of a request's stream, after one of them.
    pub(crate) async fn resume(&self, request: RequestId, last: Option<&str>) -> Events {
        let url = format!("{}/v1/chat/completions/chatcmpl-{request}?stream=true", self.url);
        let mut get = self.http.get(url);
        if let Some(last) = last {
            get = get.header("last-event-id", last);
        }
        Events::of(get.send().await.unwrap())
    }

    /// A request that completes with these pieces.
    pub(crate) async fn serve(&self, pieces: &[&str]) {
        let mut attempt = self.claim().await;
        for piece in pieces {
            attempt.text(piece).await;
        }
        attempt.complete(FinishReason::Stop).await;
    }

    /// Tells the gateway to stop.
    pub(crate) fn stop(&mut self) {
        let _ = self.stop.take().expect("stopped once").send(());
    }

    /// Waits for it to have stopped.
    pub(crate) async fn stopped(self) {
        tokio::time::timeout(PATIENCE, self.serving).await.unwrap().unwrap().unwrap();
    }

    /// The next task of the model, as a worker gets it.
    pub(crate) async fn pull(&self) -> (DecodeTask, Delivery) {
        let key = ModelKey::of("demo");
        let delivery = self.streams.tasks.pull(Role::Decode, &key, PATIENCE).await.unwrap().expect("a task");
        (DecodeTask::decode(&delivery.payload).unwrap(), delivery)
    }

    /// The next request, claimed.
    pub(crate) async fn claim(&self) -> Attempt {
        let (task, delivery) = self.pull().await;
        let log = LogRef { gateway: task.gateway, request: task.request };
        let mut writer = LogWriter::open(self.streams.log.clone(), log).await.unwrap();
        let claimed = Claimed {
            worker: WorkerId::new("worker-1").unwrap(),
            ack_subject: delivery.ack_subject.clone(),
            delivery: delivery.delivery,
            engine: None,
        };
        writer.append(Body::Claimed(claimed)).await.unwrap();
        Attempt { streams: self.streams.clone(), writer, ack_subject: delivery.ack_subject }
    }

    /// Another gateway on the same backend.
    pub(crate) async fn another(&self) -> Site {
        let config = GatewayConfig { gateway: GatewayConfig::default().gateway, ..self.config.clone() };
        Site::with(self.streams.clone(), config).await
    }

    pub(crate) fn log(&self, request: RequestId) -> LogRef {
        LogRef { gateway: self.config.gateway.clone(), request }
    }

    /// The log of a request, once it holds an event of the kind.
    pub(crate) async fn until(&self, log: &LogRef, wanted: impl Fn(&Body) -> bool) -> Vec<Recorded> {
        let look = async {
            loop {
                let events = self.streams.log.read(log, 0).await.unwrap();
                if events.iter().any(|recorded| wanted(&recorded.event.body)) {
                    return events;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, look).await.expect("the event comes")
    }
}

/// A gateway over a real server.
pub(crate) async fn over(server: &Server, limits: jetstream::Limits) -> Site {
    let options = jetstream::Options {
        url: server.url(),
        name: "gateway-test".into(),
        inbox_prefix: "_INBOX.gateway-test".into(),
        credentials: None,
        limits,
    };
    let streams = jetstream::connect(options).await.unwrap();
    streams.tasks.ensure(&ModelKey::of("demo")).await.unwrap();
    Site::with(streams, GatewayConfig::default()).await
}

/// A worker's hold on a request.
pub(crate) struct Attempt {
    streams: Streams,
    pub(crate) writer: LogWriter,
    ack_subject: String,
}

impl Attempt {
    pub(crate) async fn text(&mut self, text: &str) {
        self.generated(text, Vec::new()).await;
    }

    pub(crate) async fn told(&mut self, text: &str, logprobs: Logprobs) {
        self.generated(text, vec![logprobs]).await;
    }

    async fn generated(&mut self, text: &str, logprobs: Vec<Logprobs>) {
        let first_index = self.writer.state().tokens.len() as u32;
        let (tokens, text) = (vec![7], text.into());
        let generated = TokensGenerated { first_index, tokens, text, cached_tokens: 0, logprobs };
        self.writer.append(Body::TokensGenerated(generated)).await.unwrap();
    }

    pub(crate) async fn complete(mut self, reason: FinishReason) {
        let completed = RequestCompleted { reason, usage: self.writer.state().usage() };
        self.end(Body::RequestCompleted(completed)).await;
    }

    pub(crate) async fn end(&mut self, body: Body) {
        self.writer.append(body).await.unwrap();
        self.streams.tasks.answer(&self.ack_subject, Verdict::Ack).await.unwrap();
    }
}

pub(crate) async fn card(streams: &Streams, name: &str) -> ModelCard {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/reference/gqa4-tied-fp16/tokenizer.json");
    let tokenizer = std::fs::read(path).expect("tests/reference is part of the repository");
    ModelCard {
        name: name.into(),
        key: ModelKey::of(name),
        created_s: 1_700_000_000,
        vocab_size: 512,
        context_tokens: 512,
        eos_token_ids: vec![2],
        tokenizer: streams.catalog.put_blob(tokenizer.into()).await.unwrap(),
        chat_template: Some(TEMPLATE.into()),
        special_tokens: vec![],
        defaults: SamplingDefaults::default(),
        layout_hash: LayoutHash(0xabc),
        weights: "fp32".into(),
    }
}

pub(crate) fn ask(more: Value) -> Value {
    let mut request = json!({ "model": "demo", "messages": [{ "role": "user", "content": "What waits?" }] });
    let Value::Object(more) = more else { panic!("fields") };
    request.as_object_mut().unwrap().extend(more);
    request
}

/// The id in the header.
pub(crate) fn id_of(response: &reqwest::Response) -> RequestId {
    response.headers()["x-request-id"].to_str().unwrap().parse().unwrap()
}

/// One event of a stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Sse {
    pub(crate) id: Option<String>,
    pub(crate) event: Option<String>,
    pub(crate) data: String,
}

impl Sse {
    fn read(text: &str) -> Sse {
        let mut sse = Sse::default();
        for line in text.lines() {
            match line.split_once(": ") {
                Some(("id", id)) => sse.id = Some(id.into()),
                Some(("event", event)) => sse.event = Some(event.into()),
                Some(("data", data)) => sse.data = data.into(),
                _ => sse.data = line.into(),
            }
        }
        sse
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }
}

/// A stream's events as they come.
pub(crate) struct Events {
    bytes: futures::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    text: String,
}

impl Events {
    pub(crate) fn of(response: reqwest::Response) -> Events {
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        Events { bytes: response.bytes_stream().boxed(), text: String::new() }
    }

    /// The next event, or comment; none at the end of the body.
    pub(crate) async fn event(&mut self) -> Option<Sse> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let event = Sse::read(event);
                self.text = rest.to_owned();
                return Some(event);
            }
            let bytes =
                tokio::time::timeout(PATIENCE, self.bytes.next()).await.expect("an event comes")?.unwrap();
            self.text.push_str(std::str::from_utf8(&bytes).unwrap());
        }
    }

    /// Its data.
    pub(crate) async fn next(&mut self) -> Option<String> {
        self.event().await.map(|event| event.data)
    }

    pub(crate) async fn chunk(&mut self) -> ChatChunk {
        serde_json::from_str(&self.next().await.unwrap()).unwrap()
    }

    /// All events that are left.
    pub(crate) async fn rest(&mut self) -> Vec<String> {
        self.events().await.into_iter().map(|event| event.data).collect()
    }

    /// The same, whole.
    pub(crate) async fn events(&mut self) -> Vec<Sse> {
        let mut events = Vec::new();
        while let Some(event) = self.event().await {
            events.push(event);
        }
        events
    }
}
