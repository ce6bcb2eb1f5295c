//! What every backend must do, run on each of them: in memory, and on a real nats-server.

mod cache_events;
mod followers;
mod logs;
mod own_queues;
mod registry;
mod server_faults;
mod site;
mod tasks;

use cache_events::*;
use followers::*;
use logs::*;
use own_queues::*;
use registry::*;
use tasks::*;

macro_rules! conformance {
    ($($name:ident),+ $(,)?) => {
        mod in_memory {
            $(#[tokio::test] async fn $name() { super::site::on_memory(super::$name).await; })+
        }
        mod nats_server {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
              async fn $name() { super::site::on_jetstream(super::$name).await; })+
        }
    };
}

conformance! {
    a_log_reads_back_in_order,
    the_fence_lets_one_author_through,
    an_overtaken_author_is_told,
    a_cancel_ends_the_log_once,
    a_follower_misses_nothing,
    a_follower_of_a_stuck_client_catches_up,
    a_watch_sees_only_its_log,
    what_was_there_before_is_read_at_once,
    tasks_are_delivered_once_while_worked_on,
    an_unanswered_task_comes_again,
    a_returned_task_comes_at_once,
    a_task_is_not_delivered_for_ever,
    a_task_published_twice_is_queued_once,
    a_full_queue_refuses,
    models_outlive_and_leases_lapse,
    blobs_read_back,
    signals_reach_their_worker,
    a_request_is_begun_once_whatever_the_gateway,
    a_log_can_be_removed,
    two_followers_of_one_request_miss_nothing,
    a_task_given_back_for_later_comes_later,
    a_workers_presence_is_known,
    spent_tasks_are_found_and_settled,
    dead_letters_are_kept_and_dropped,
    an_own_queue_is_its_workers_alone,
    a_task_given_back_from_an_own_queue_moves_to_the_shared_one,
    a_closed_queue_leaves_nothing_behind,
    a_routed_task_is_queued_once,
    an_own_queue_can_be_opened_again,
    a_task_of_an_own_queue_waits_while_the_shared_one_is_full,
    cache_events_are_followed_from_what_is_kept,
    a_snapshot_replaces_what_was_told,
    a_worker_learns_that_its_events_are_gone,
}
