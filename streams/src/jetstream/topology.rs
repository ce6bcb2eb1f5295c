//! The streams, buckets and consumers that everything runs on: made where missing, and read back, because an
//! older server ignores settings that it does not know.

use super::{catalog::patiently, failed};
use crate::{StreamError, own_queues::Owner};
use async_nats::jetstream::{
    Context,
    consumer::{AckPolicy, pull},
    kv, object_store,
    stream::{Config, DiscardPolicy, Republish, RetentionPolicy, StorageType},
};
use forebay_schemas::{
    ids::{ModelKey, WorkerId},
    task::Role,
};
use std::time::Duration;

pub(crate) const LOG: &str = "FB_LOG";
pub(crate) const DLQ: &str = "FB_DLQ";
pub(crate) const KV: &str = "FB_KV";

/// Where a sign of each event in [`KV`] goes.
pub(crate) const KV_SIGNS: &str = "fb.kvsign";

/// How long events of prefix caches are kept. Workers tell all that they have several times within it.
const KV_AGE: Duration = Duration::from_secs(900);

/// Events of one worker that are kept; workers begin anew long before.
const KV_EVENTS: i64 = 16_384;

/// What all of them may take; the oldest go first, and whoever misses them waits for the worker's next snapshot.
const KV_BYTES: i64 = 256 << 20;

pub(crate) const MODELS: &str = "fb_models";
pub(crate) const WORKERS: &str = "fb_workers";
pub(crate) const CONFIG: &str = "fb_config";
pub(crate) const BLOBS: &str = "fb_blobs";

/// The consumer of the server's advisories of spent deliveries.
pub(crate) const SPENT: &str = "spent";

/// Where the server publishes them.
const SPENT_SUBJECT: &str = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES";

/// How long an advisory may take to be dealt with before another gateway tries.
const SPENT_ACK_WAIT: Duration = Duration::from_secs(30);

/// How long dead letters are kept.
const DLQ_AGE: Duration = Duration::from_secs(30 * 24 * 3600);

/// How many dead letters and advisories are kept; the oldest go first.
const DLQ_MESSAGES: i64 = 100_000;

/// Bounds and times of what is made. What exists keeps its own.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Copies of each stream on a cluster: 1, 3 or 5.
    pub replicas: usize,
    /// How long logs are kept.
    pub log_age: Duration,
    /// Bytes that all logs together may take; the oldest go first.
    pub log_bytes: u64,
    /// Tasks that all queues of one role hold; more are refused.
    pub queue_max: u64,
    /// Time without a verdict after which a task is delivered again: the backstop of failover.
    pub ack_wait: Duration,
    /// Deliveries of one task: a backstop against tasks that end workers before they can claim.
    pub max_deliver: u64,
    /// How long a worker's lease lasts after its last renewal.
    pub lease_time: Duration,
    /// Whether appends are fenced. Without it nothing that Forebay promises holds: only to measure what the fence costs.
    pub fence: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            replicas: 1,
            log_age: Duration::from_secs(24 * 3600),
            log_bytes: 4 << 30,
            queue_max: 65_536,
            ack_wait: Duration::from_secs(30),
            max_deliver: 100,
            lease_time: Duration::from_millis(1500),
            fence: true,
        }
    }
}

/// The work queue of a role.
pub fn queue_stream(role: Role) -> &'static str {
    match role {
        Role::Decode => "FB_DECODE",
        Role::Prefill => "FB_PREFILL",
    }
}

/// The durable consumer that a role's workers of one model pull from, and that KEDA watches.
pub fn consumer_name(role: Role, model: &ModelKey) -> String {
    format!("{}-{model}", role.as_str())
}

/// The subject that a role's tasks of one model are published to.
pub(crate) fn queue_subject(role: Role, model: &ModelKey) -> String {
    match role {
        Role::Decode => format!("fb.q.decode.{model}.any"),
        Role::Prefill => format!("fb.q.prefill.{model}"),
    }
}

/// The subject of a decode worker's own queue.
pub(crate) fn own_subject(owner: &Owner) -> String {
    format!("fb.q.decode.{}.w.{}", owner.model, owner.worker)
}

/// The subjects of all of them.
pub(crate) const OWN_SUBJECTS: &str = "fb.q.decode.*.w.*";

/// The consumer of a decode worker's own queue. No other consumer's name begins like that, and workers' names are unique.
pub(crate) fn own_consumer_name(worker: &WorkerId) -> String {
    format!("{OWN}{worker}")
}

/// What the names of these consumers begin with.
pub(crate) const OWN: &str = "own-";

/// How long a worker's own queue may go unused: a backstop, for a worker that died while no gateway looked.
const OWN_UNUSED_MAX: Duration = Duration::from_secs(600);

/// Makes streams and buckets that are missing, and checks those that are there.
pub(crate) async fn ensure(context: &Context, limits: &Limits) -> Result<(), StreamError> {
    ensure_stream(context, log_stream(limits)).await?;
    for role in [Role::Decode, Role::Prefill] {
        ensure_stream(context, work_queue(role, limits)).await?;
    }
    ensure_stream(context, cache_events(limits)).await?;
    ensure_stream(context, dead_letters(limits)).await?;
    ensure_spent(context, limits).await?;
    let bucket = |bucket: &str, max_age| kv::Config {
        bucket: bucket.to_owned(),
        history: 1,
        max_age,
        num_replicas: limits.replicas,
        storage: StorageType::File,
        ..Default::default()
    };
    ensure_bucket(context, bucket(MODELS, Duration::ZERO)).await?;
    ensure_bucket(context, bucket(WORKERS, limits.lease_time)).await?;
    ensure_bucket(context, bucket(CONFIG, Duration::ZERO)).await?;
    if context.get_object_store(BLOBS).await.is_err() {
        let config = object_store::Config {
            bucket: BLOBS.to_owned(),
            num_replicas: limits.replicas,
            ..Default::default()
        };
        context.create_object_store(config).await.map_err(failed(format!("making object store {BLOBS}")))?;
    }
    Ok(())
}

fn log_stream(limits: &Limits) -> Config {
    Config {
        name: LOG.to_owned(),
        description: Some("events of every request, one subject a request".to_owned()),
        subjects: vec!["fb.log.*.*".to_owned()],
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        num_replicas: limits.replicas,
        max_age: limits.log_age,
        max_bytes: limits.log_bytes as i64,
        allow_direct: true,
        // Only what was stored is republished: a follower never sees an event that the fence refused.
        republish: Some(Republish {
            source: "fb.log.>".to_owned(),
            destination: "fb.live.>".to_owned(),
            headers_only: false,
        }),
        // The fence makes resends harmless; a window would only cost memory.
        duplicate_window: Duration::from_millis(100),
        ..Default::default()
    }
}

fn work_queue(role: Role, limits: &Limits) -> Config {
    Config {
        name: queue_stream(role).to_owned(),
        description: Some(format!("{} tasks that wait for a worker", role.as_str())),
        subjects: match role {
            Role::Decode => vec!["fb.q.decode.*.any".to_owned(), "fb.q.decode.*.w.*".to_owned()],
            Role::Prefill => vec!["fb.q.prefill.*".to_owned()],
        },
        retention: RetentionPolicy::WorkQueue,
        storage: StorageType::File,
        num_replicas: limits.replicas,
        max_messages: limits.queue_max as i64,
        // A task that was delivered as often as it may be stays; at the latest it goes with its log.
        max_age: limits.log_age,
        discard: DiscardPolicy::New,
        duplicate_window: Duration::from_secs(120),
        ..Default::default()
    }
}

fn cache_events(limits: &Limits) -> Config {
    Config {
        name: KV.to_owned(),
        description: Some("what workers have in their prefix caches, one subject a worker".to_owned()),
        subjects: vec!["fb.kv.*.*".to_owned()],
        retention: RetentionPolicy::Limits,
        // On file, so that a server that restarts does not make every router forget what every worker has.
        storage: StorageType::File,
        num_replicas: limits.replicas,
        max_age: KV_AGE,
        max_messages_per_subject: KV_EVENTS,
        max_bytes: KV_BYTES,
        allow_direct: true,
        // A snapshot takes the place of all that was told before.
        allow_rollup: true,
        republish: Some(Republish {
            source: "fb.kv.>".to_owned(),
            destination: format!("{KV_SIGNS}.>"),
            headers_only: true,
        }),
        ..Default::default()
    }
}

fn dead_letters(limits: &Limits) -> Config {
    Config {
        name: DLQ.to_owned(),
        description: Some("tasks that nobody could do, and the server's word of them".to_owned()),
        subjects: vec![
            "fb.dlq.*.*.*".to_owned(),
            format!("{SPENT_SUBJECT}.{}.*", queue_stream(Role::Decode)),
            format!("{SPENT_SUBJECT}.{}.*", queue_stream(Role::Prefill)),
        ],
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        num_replicas: limits.replicas,
        max_age: DLQ_AGE,
        max_messages: DLQ_MESSAGES,
        allow_direct: true,
        // A newer letter of the same request and role takes the place of the older one.
        allow_rollup: true,
        ..Default::default()
    }
}

async fn ensure_spent(context: &Context, limits: &Limits) -> Result<(), StreamError> {
    let what = format!("making consumer {SPENT}");
    let stream = context.get_stream_no_info(DLQ).await.map_err(failed(&what))?;
    let wanted = pull::Config {
        durable_name: Some(SPENT.to_owned()),
        description: Some("gateways end the requests of spent tasks".to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: SPENT_ACK_WAIT,
        filter_subject: format!("{SPENT_SUBJECT}.>"),
        num_replicas: limits.replicas,
        ..Default::default()
    };
    stream.get_or_create_consumer(SPENT, wanted).await.map(drop).map_err(failed(what))
}

async fn ensure_stream(context: &Context, wanted: Config) -> Result<(), StreamError> {
    let name = wanted.name.clone();
    let stream =
        context.get_or_create_stream(wanted.clone()).await.map_err(|error| match error.to_string() {
            cause if cause.contains("insufficient storage") => {
                let hint = "less space than --log-gib asks for: lower it, or give the server more";
                StreamError::new(format!("making stream {name}"), format!("{cause} ({hint})"))
            }
            cause => StreamError::new(format!("making stream {name}"), cause),
        })?;
    let found = &stream.cached_info().config;
    let mismatch = [
        ("subjects", found.subjects != wanted.subjects),
        ("retention", found.retention != wanted.retention),
        ("discard", found.discard != wanted.discard),
        ("allow_direct", wanted.allow_direct && !found.allow_direct),
        ("republish", found.republish.is_some() != wanted.republish.is_some()),
    ];
    match mismatch.iter().find(|(_, differs)| *differs) {
        None => Ok(()),
        Some((field, _)) => Err(StreamError::new(
            format!("checking stream {name}"),
            format!(
                "its {field} is not what Forebay needs: another program's stream, or a server that ignores the \
                 setting; remove the stream (`nats stream rm {name}`) or use another account"
            ),
        )),
    }
}

async fn ensure_bucket(context: &Context, config: kv::Config) -> Result<(), StreamError> {
    let bucket = config.bucket.clone();
    context
        .create_or_update_key_value(config)
        .await
        .map(drop)
        .map_err(failed(format!("making bucket {bucket}")))
}

/// Makes the consumer of one queue if it is missing, and checks it.
pub(crate) async fn ensure_consumer(
    context: &Context,
    role: Role,
    model: &ModelKey,
    limits: &Limits,
) -> Result<(), StreamError> {
    let name = consumer_name(role, model);
    let stream = context
        .get_stream_no_info(queue_stream(role))
        .await
        .map_err(failed(format!("opening stream {}", queue_stream(role))))?;
    let wanted = pull::Config {
        durable_name: Some(name.clone()),
        description: Some("pulled by workers, watched by autoscalers".to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: limits.ack_wait,
        max_deliver: limits.max_deliver as i64,
        filter_subject: queue_subject(role, model),
        max_ack_pending: 16_384,
        max_waiting: 8_192,
        num_replicas: limits.replicas,
        ..Default::default()
    };
    // Of several workers that start at once with a cluster, one may go without an answer.
    let make = || async {
        let made = stream.get_or_create_consumer(&name, wanted.clone()).await;
        made.map_err(failed(format!("making consumer {name}")))
    };
    let consumer = patiently(make).await?;
    let found = &consumer.cached_info().config;
    if found.filter_subject != wanted.filter_subject || found.ack_policy != wanted.ack_policy {
        return Err(StreamError::new(
            format!("checking consumer {name}"),
            format!(
                "it exists with another filter or ack policy; remove it (`nats consumer rm {} {name}`)",
                queue_stream(role)
            ),
        ));
    }
    // Workers time their signs of life by their own settings: the server must go by the same.
    if found.ack_wait != wanted.ack_wait || found.max_deliver != wanted.max_deliver {
        stream.update_consumer(wanted).await.map_err(failed(format!("updating consumer {name}")))?;
    }
    Ok(())
}

/// Makes the consumer of a decode worker's own queue.
pub(crate) async fn ensure_own_consumer(
    context: &Context,
    owner: &Owner,
    limits: &Limits,
) -> Result<(), StreamError> {
    let name = own_consumer_name(&owner.worker);
    let what = format!("making consumer {name}");
    let stream = context.get_stream_no_info(queue_stream(Role::Decode)).await.map_err(failed(&what))?;
    let wanted = pull::Config {
        durable_name: Some(name.clone()),
        description: Some("tasks for one worker, which has a part of their KV".to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: limits.ack_wait,
        max_deliver: limits.max_deliver as i64,
        filter_subject: own_subject(owner),
        inactive_threshold: OWN_UNUSED_MAX,
        num_replicas: limits.replicas,
        ..Default::default()
    };
    stream.get_or_create_consumer(&name, wanted).await.map(drop).map_err(failed(what))
}
