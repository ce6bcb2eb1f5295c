//! A decode worker's own queue: one subject of the decode stream, with a consumer of its own.

use super::{
    JetStream, failed,
    tasks::AckSubject,
    topology::{
        OWN, OWN_SUBJECTS, ensure_own_consumer, own_consumer_name, own_subject, queue_stream, queue_subject,
    },
};
use crate::{
    StreamError,
    own_queues::{OwnQueues, Owner},
    tasks::{Delivery, EnqueueError, Verdict},
};
use async_nats::jetstream::{message::StreamMessage, stream::Stream};
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{
    ids::{ModelKey, WorkerId},
    task::Role,
};
use futures::TryStreamExt;
use std::time::Duration;

/// When a task is tried again that could not move, the shared queue being full.
const FULL_PAUSE: Duration = Duration::from_secs(1);

/// The sequence of a message that was delivered from a worker's own queue, by its acknowledgement subject.
pub(super) fn sequence(ack_subject: &str) -> Option<u64> {
    let parsed = AckSubject::parse(ack_subject)?;
    (parsed.stream == queue_stream(Role::Decode) && parsed.consumer.starts_with(OWN)).then_some(parsed.seq)
}

/// Whose queue a subject (`fb.q.decode.<model>.w.<worker>`) is.
fn owner_of(subject: &str) -> Option<Owner> {
    let mut tokens = subject.strip_prefix("fb.q.decode.")?.split('.');
    let model = ModelKey::new(tokens.next()?).ok()?;
    (tokens.next()? == "w").then_some(())?;
    Some(Owner { model, worker: WorkerId::new(tokens.next()?).ok()? })
}

/// The answer to a question for a message that is not there (any more).
fn is_gone(error: &impl std::fmt::Display) -> bool {
    error.to_string().contains("no message found")
}

#[async_trait]
impl OwnQueues for JetStream {
    async fn open(&self, owner: &Owner) -> Result<(), StreamError> {
        ensure_own_consumer(&self.context, owner, &self.limits).await
    }

    async fn publish_to(&self, owner: &Owner, dedup_id: &str, payload: Bytes) -> Result<(), EnqueueError> {
        self.queue(own_subject(owner), (Role::Decode, &owner.model), dedup_id, payload).await
    }

    async fn pull_own(&self, owner: &Owner, wait: Duration) -> Result<Option<Delivery>, StreamError> {
        self.pull_from(queue_stream(Role::Decode), &own_consumer_name(&owner.worker), wait).await
    }

    async fn close(&self, owner: &Owner) -> Result<u64, StreamError> {
        let what = format!("closing the queue of {}", owner.worker);
        let queue = self.decode_queue(&what).await?;
        let (subject, mut moved, mut from) = (own_subject(owner), 0, 1);
        loop {
            let next =
                queue.raw_message_builder().sequence(from).next_by_subject(subject.clone()).send().await;
            let task = match next {
                Ok(task) => task,
                Err(error) if is_gone(&error) => break,
                Err(error) => return Err(StreamError::new(what, error)),
            };
            from = task.sequence + 1;
            self.move_to_shared(&queue, task).await.map_err(failed(&what))?;
            moved += 1;
        }
        // Last, for a task in it could not be delivered without. Gone already is as good.
        match queue.delete_consumer(&own_consumer_name(&owner.worker)).await {
            Err(error) if !error.to_string().contains("consumer not found") => {
                Err(StreamError::new(what, error))
            }
            _ => Ok(moved),
        }
    }

    async fn filled(&self) -> Result<Vec<Owner>, StreamError> {
        let what = "looking for tasks in the workers' own queues";
        let queue = self.decode_queue(what).await?;
        let subjects = queue.info_with_subjects(OWN_SUBJECTS).await.map_err(failed(what))?;
        let all: Vec<(String, usize)> = subjects.try_collect().await.map_err(failed(what))?;
        Ok(all.iter().filter_map(|(subject, _)| owner_of(subject)).collect())
    }
}

impl JetStream {
    async fn decode_queue(&self, what: &str) -> Result<Stream<()>, StreamError> {
        self.context.get_stream_no_info(queue_stream(Role::Decode)).await.map_err(failed(what))
    }

    /// Gives back a task that was delivered from a worker's own queue: it moves to the shared one. If it is not there any
    /// more, it has ended or moved already.
    pub(super) async fn give_up(&self, ack_subject: &str, seq: u64) -> Result<(), StreamError> {
        let what = format!("moving task {seq} to the shared queue");
        let queue = self.decode_queue(&what).await?;
        let task = match queue.get_raw_message(seq).await {
            Ok(task) => task,
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(StreamError::new(what, error)),
        };
        match self.move_to_shared(&queue, task).await {
            Ok(()) => Ok(()),
            // It stays where it is, for its worker, or for whoever closes the queue.
            Err(EnqueueError::Full { .. }) => self.say(ack_subject, Verdict::Later(FULL_PAUSE)).await,
            Err(EnqueueError::Unavailable(error)) => Err(error),
        }
    }

    /// Publishes first, then deletes: a task may be there twice for a moment, and that is normal. Two that do it at once
    /// publish it once, by the id.
    async fn move_to_shared(&self, queue: &Stream<()>, task: StreamMessage) -> Result<(), EnqueueError> {
        let (seq, what) = (task.sequence, "moving a task to the shared queue");
        let owner = owner_of(&task.subject)
            .ok_or_else(|| StreamError::new(what, format!("{} is no worker's queue", task.subject)))?;
        let subject = queue_subject(Role::Decode, &owner.model);
        self.queue(subject, (Role::Decode, &owner.model), &format!("own:{seq}"), task.payload).await?;
        match queue.delete_message(seq).await {
            Err(error) if !is_gone(&error) => Err(StreamError::new(what, error).into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_deliveries_from_own_queues_have_a_sequence_to_move() {
        assert_eq!(sequence("$JS.ACK.FB_DECODE.own-decode-1.1.42.1.175.0"), Some(42));
        assert_eq!(sequence("$JS.ACK.FB_DECODE.decode-own.1.42.1.175.0"), None);
        assert_eq!(sequence("$JS.ACK.FB_PREFILL.own-x.1.42.1.175.0"), None);
    }

    #[test]
    fn a_subject_tells_its_owner() {
        let owner = Owner { model: ModelKey::of("demo"), worker: WorkerId::new("decode-1").expect("a name") };
        assert_eq!(owner_of(&own_subject(&owner)), Some(owner));
        assert_eq!(owner_of("fb.q.decode.demo.any"), None);
    }
}
