//! Sealed KV, when somebody dies, is late or meddles: a read gives the sealed bytes or an error, and nothing stays
//! held. What every transport must do, run on each of them.

mod forged;
mod killed;
mod leases;
mod over_tcp;
mod peers;
mod reads;
mod site;

use forged::*;
use killed::*;
use leases::*;
use peers::*;
use reads::*;

macro_rules! conformance {
    ($($name:ident),+ $(,)?) => {
        mod shm {
            $(#[tokio::test(start_paused = true)] async fn $name() { super::$name(super::site::Way::Shm).await; })+
        }
        mod tcp {
            $(#[tokio::test(start_paused = true)] async fn $name() { super::$name(super::site::Way::Tcp).await; })+
        }
        mod nixl {
            $(#[tokio::test(start_paused = true)] async fn $name() {
                if super::site::library().is_none() {
                    return super::site::skipped(stringify!($name));
                }
                super::$name(super::site::Way::Nixl).await;
            })+
        }
    };
}

conformance! {
    what_was_sealed_is_read_once_and_given_back,
    a_second_release_gives_back_nothing_of_anybody_else,
    a_lease_lasts_as_long_as_it_says,
    a_lease_that_is_over_is_not_read,
    a_slot_that_is_used_again_under_a_reader_is_noticed,
    a_handle_of_an_older_generation_claims_nothing,
    a_flipped_bit_is_noticed,
    a_handle_beyond_the_region_is_refused,
    a_handle_of_another_layout_is_refused,
    a_capability_counts_where_the_owner_serves,
    large_pieces_arrive_whole,
    many_read_at_once,
    a_reader_that_dies_holds_nothing_for_ever_and_another_may_read,
    a_reader_that_is_killed_leaves_the_kv_to_another,
    an_owner_that_is_killed_under_a_reader_gives_its_bytes_or_an_error,
    an_owner_that_lives_again_is_another,
    an_owner_that_comes_back_is_met_again,
}
