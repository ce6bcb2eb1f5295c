//! The lifecycle against a second, simpler statement of the same rules, over random histories.

use forebay_schemas::{
    event::{
        Body, Claimed, Event, FailureCode, FinishReason, KvLost, KvReady, KvTransferred, PrefillClaimed,
        PrefillCompleted, PrefillQueued, ReleaseCause, Released, RequestAccepted, RequestCancelled,
        RequestCompleted, RequestFailed, TokensGenerated, Usage,
    },
    ids::{RequestId, WorkerId},
    kv::{KvDtype, KvGeometry, KvHandle, KvLayout, LayoutHash, TokenRange},
    lifecycle::{Illegal, Lifecycle, Phase},
};
use proptest::{collection::vec, prelude::*, sample::Index};

/// What can happen after a request was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Claimed,
    PrefillQueued,
    PrefillClaimed,
    KvReady,
    PrefillCompleted,
    KvTransferred,
    KvLost,
    TokensGenerated,
    Drained,
    Completed,
    Failed,
    Cancelled,
}

const KINDS: [Kind; 12] = [
    Kind::Claimed,
    Kind::PrefillQueued,
    Kind::PrefillClaimed,
    Kind::KvReady,
    Kind::PrefillCompleted,
    Kind::KvTransferred,
    Kind::KvLost,
    Kind::TokensGenerated,
    Kind::Drained,
    Kind::Completed,
    Kind::Failed,
    Kind::Cancelled,
];

/// The rules, as a table: what may follow in which phase, and where it leads.
fn next(phase: &Phase, kind: Kind) -> Option<Phase> {
    use Kind as K;
    use Phase as P;
    Some(match (phase, kind) {
        (P::Completed | P::Failed | P::Cancelled, _) => return None,
        (_, K::Claimed) => P::Claimed,
        (P::Queued, K::Drained) => return None,
        (_, K::Drained) => P::Queued,
        (_, K::Failed) => P::Failed,
        (_, K::Cancelled) => P::Cancelled,
        (P::Claimed, K::PrefillQueued) => P::PrefillQueued,
        (P::PrefillQueued | P::Prefilling, K::PrefillClaimed) => P::Prefilling,
        (P::Prefilling, K::KvReady) => P::Prefilling,
        (P::Prefilling, K::PrefillCompleted) => P::Prefilled,
        (P::Prefilled, K::KvTransferred) => P::Decoding,
        (P::PrefillQueued | P::Prefilling | P::Prefilled, K::KvLost) => P::Claimed,
        (P::Claimed | P::Decoding, K::TokensGenerated) => P::Decoding,
        (P::Claimed | P::Prefilled | P::Decoding, K::Completed) => P::Completed,
        _ => return None,
    })
}

fn request(number: u8) -> RequestId {
    RequestId::from_parts(1_764_000_000_000, &[number; 10])
}

fn worker(attempt: u32) -> WorkerId {
    WorkerId::new(format!("worker-{attempt}")).unwrap()
}

fn event(attempt: u32, body: Body) -> Event {
    Event { request: request(1), attempt, time_us: 1_764_000_000_000_000, body }
}

fn accepted() -> Event {
    let accepted =
        RequestAccepted { timeout_ms: 1000, ..RequestAccepted::greedy("demo", vec![1, 2, 3], 100) };
    event(0, Body::RequestAccepted(accepted))
}

fn handle(agent: WorkerId, tokens: TokenRange) -> KvHandle {
    KvHandle {
        agent,
        incarnation: 1,
        layout: KvLayout {
            geometry: KvGeometry { layers: 1, kv_heads: 1, head_dim: 8, dtype: KvDtype::F32 },
            slots: 1,
            positions: 64,
        },
        layout_hash: LayoutHash(1),
        slot: 0,
        generation: 1,
        tokens,
        checksums: vec![0],
        lease_remaining_ms: 1000,
        capability: 0,
    }
}

/// What a random event says besides its kind.
#[derive(Clone, Debug)]
struct Details {
    tokens: Vec<u32>,
    text: String,
    /// Added to the attempt that would fit.
    attempt_off: i64,
    /// Added to the index that would join.
    index_off: i64,
}

/// An event of a kind that fits a state in attempt and index, but for the details' offsets.
fn event_of(kind: Kind, state: &Lifecycle, details: &Details) -> Event {
    let off = |fits: u32, by: i64| u32::try_from(i64::from(fits) + by).unwrap_or(0);
    let attempt = off(state.attempt + u32::from(kind == Kind::Claimed), details.attempt_off);
    let first_index = off(state.tokens.len() as u32, details.index_off);
    let body = match kind {
        Kind::Claimed => Body::Claimed(Claimed {
            worker: worker(attempt),
            ack_subject: "ack".into(),
            delivery: 1,
            engine: None,
        }),
        Kind::PrefillQueued => Body::PrefillQueued(PrefillQueued {
            tokens: 3,
            reason: "long".into(),
            cached_tokens: 0,
            layout_hash: None,
            kv: None,
        }),
        Kind::PrefillClaimed => {
            Body::PrefillClaimed(PrefillClaimed { worker: worker(9), ack_subject: "ack".into(), delivery: 1 })
        }
        Kind::KvReady => {
            let start = off(state.kv.last().map_or(state.kv_from(), |kv| kv.tokens.end()), details.index_off);
            let tokens = TokenRange { start, count: details.tokens.len() as u32 };
            let agent = state.prefiller.clone().unwrap_or_else(|| worker(0));
            Body::KvReady(KvReady { handle: handle(agent, tokens) })
        }
        Kind::PrefillCompleted => Body::PrefillCompleted(PrefillCompleted {
            worker: state.prefiller.clone().unwrap_or_else(|| worker(0)),
            first_index,
            token: details.tokens.len() as u32,
            text: details.text.clone(),
            compute_us: 1,
            cached_tokens: 0,
            logprobs: None,
        }),
        Kind::KvTransferred => Body::KvTransferred(KvTransferred {
            bytes: 1,
            tokens: 3,
            read_us: 1,
            after_us: 0,
            transport: "shm".into(),
        }),
        Kind::KvLost => Body::KvLost(KvLost { reason: "gone".into() }),
        Kind::TokensGenerated => Body::TokensGenerated(TokensGenerated {
            first_index,
            tokens: details.tokens.clone(),
            text: details.text.clone(),
            cached_tokens: 0,
            logprobs: Vec::new(),
        }),
        Kind::Drained => Body::Released(Released {
            worker: worker(attempt),
            cause: ReleaseCause::Drained,
            reason: "the worker stops".into(),
            kv: None,
            cached_tokens: 0,
        }),
        Kind::Completed => {
            Body::RequestCompleted(RequestCompleted { reason: FinishReason::Length, usage: Usage::default() })
        }
        Kind::Failed => {
            Body::RequestFailed(RequestFailed { code: FailureCode::EngineFailed, message: "no".into() })
        }
        Kind::Cancelled => Body::RequestCancelled(RequestCancelled { cause: "gone".into() }),
    };
    event(attempt, body)
}

fn details(offsets: impl Strategy<Value = i64> + Clone) -> impl Strategy<Value = Details> {
    (vec(0u32..1000, 1..4), "\\PC{0,3}", offsets.clone(), offsets)
        .prop_map(|(tokens, text, attempt_off, index_off)| Details { tokens, text, attempt_off, index_off })
}

/// Whether the last attempt has given the request back.
fn released(history: &[Event]) -> bool {
    let held = |event: &&Event| matches!(event.body, Body::Claimed(_) | Body::Released(_));
    history.iter().rev().find(held).is_some_and(|event| matches!(event.body, Body::Released(_)))
}

/// Mostly 0.
fn sometimes_off() -> impl Strategy<Value = i64> + Clone {
    prop_oneof![8 => Just(0i64), 1 => -2i64..0, 1 => 1i64..3]
}

/// A kind that may follow; endings are rare, so that histories get long.
fn pick(phase: &Phase, at: Index) -> Option<Kind> {
    let legal: Vec<Kind> = KINDS.into_iter().filter(|kind| next(phase, *kind).is_some()).collect();
    let going_on: Vec<Kind> = legal
        .iter()
        .copied()
        .filter(|kind| !matches!(kind, Kind::Completed | Kind::Failed | Kind::Cancelled))
        .collect();
    let weighted = [&going_on[..], &going_on, &going_on, &going_on, &legal].concat();
    (!weighted.is_empty()).then(|| weighted[at.index(weighted.len())])
}

proptest! {
    /// Every history that the rules allow folds, and the fold says what happened.
    #[test]
    fn legal_histories_fold(steps in vec((any::<Index>(), details(Just(0))), 0..60)) {
        let mut history = vec![accepted()];
        let mut state = Lifecycle::begin(&history[0]).unwrap();
        let (mut phase, mut tokens, mut text, mut claims) = (Phase::Queued, Vec::new(), String::new(), 0);
        for (at, details) in steps {
            let Some(kind) = pick(&phase, at) else { break };
            let event = event_of(kind, &state, &details);
            prop_assert_eq!(state.apply(&event), Ok(()));
            phase = next(&phase, kind).unwrap();
            claims += u32::from(kind == Kind::Claimed);
            match &event.body {
                Body::PrefillCompleted(done) => {
                    tokens.push(done.token);
                    text.push_str(&done.text);
                }
                Body::TokensGenerated(generated) => {
                    tokens.extend(&generated.tokens);
                    text.push_str(&generated.text);
                }
                _ => {}
            }
            history.push(event);
            prop_assert_eq!(&state.phase, &phase);
            prop_assert_eq!((&state.tokens, &state.text, state.attempt), (&tokens, &text, claims));
            let owned = claims > 0 && phase != Phase::Queued && !released(&history);
            prop_assert_eq!(&state.worker, &owned.then(|| worker(claims)));
            prop_assert_eq!(state.finish.is_some(), phase == Phase::Completed);
            prop_assert!(state.kv.windows(2).all(|pair| pair[0].tokens.end() == pair[1].tokens.start));
            prop_assert_eq!(state.usage().completion_tokens as usize, tokens.len());
        }
        prop_assert_eq!(Lifecycle::fold(&history).unwrap().unwrap(), state);
    }

    /// Whatever is thrown at a state: what the rules refuse leaves no trace, and nothing panics.
    #[test]
    fn illegal_events_leave_no_trace(
        steps in vec((0..KINDS.len(), any::<Index>(), any::<bool>(), details(sometimes_off())), 0..80)
    ) {
        let mut state = Lifecycle::begin(&accepted()).unwrap();
        for (any_kind, at, sensible, details) in steps {
            let kind = if sensible { pick(&state.phase, at).unwrap_or(Kind::Claimed) } else { KINDS[any_kind] };
            let fits = event_of(kind, &state, &Details { attempt_off: 0, index_off: 0, ..details.clone() });
            let event = event_of(kind, &state, &details);
            let allowed = next(&state.phase, kind).is_some() && event == fits;
            let before = state.clone();
            prop_assert_eq!(state.check(&event).is_ok(), allowed, "{:?} while {:?}", event, before);
            match state.apply(&event) {
                Ok(()) => {
                    prop_assert!(allowed);
                    prop_assert_eq!(state.attempt, before.attempt + u32::from(kind == Kind::Claimed));
                    prop_assert!(state.tokens.starts_with(&before.tokens));
                    prop_assert!(state.text.starts_with(&before.text));
                }
                Err(illegal) => {
                    prop_assert!(!allowed, "{}", illegal);
                    prop_assert_eq!(&state, &before);
                    if before.phase.is_terminal() {
                        prop_assert!(matches!(illegal, Illegal::AfterEnd { .. }), "{}", illegal);
                    }
                }
            }
        }
    }

    /// The fence's other half: once a newer claim is in the log, an older attempt appends nothing.
    #[test]
    fn an_older_attempt_appends_nothing(
        steps in vec((any::<Index>(), details(Just(0))), 1..30),
        newer in 1u32..4,
        details in details(Just(0)),
    ) {
        let mut state = Lifecycle::begin(&accepted()).unwrap();
        for (at, details) in steps {
            let kind = pick(&state.phase, at).expect("the request has not ended");
            if next(&state.phase, kind).is_some_and(|phase| !phase.is_terminal()) {
                state.apply(&event_of(kind, &state, &details)).unwrap();
            }
        }
        // What the older attempt's worker would have appended next, had it not been overtaken.
        let late: Vec<Event> = KINDS.iter().map(|kind| event_of(*kind, &state, &details)).collect();
        for _ in 0..newer {
            state.apply(&event_of(Kind::Claimed, &state, &details)).unwrap();
        }
        for event in late {
            let refused = state.apply(&event);
            prop_assert!(matches!(refused, Err(Illegal::Attempt { .. })), "{:?}: {:?}", event.body.name(), refused);
        }
    }
}

#[test]
fn a_log_begins_with_its_acceptance_and_has_one() {
    let claim = event(
        1,
        Body::Claimed(Claimed { worker: worker(1), ack_subject: "ack".into(), delivery: 1, engine: None }),
    );
    assert_eq!(Lifecycle::begin(&claim), Err(Illegal::First("Claimed")));
    assert_eq!(Lifecycle::fold([]), Ok(None));
    let mut state = Lifecycle::begin(&accepted()).unwrap();
    assert!(matches!(state.apply(&accepted()), Err(Illegal::Phase { event: "RequestAccepted", .. })));
}

#[test]
fn another_requests_event_is_refused() {
    let mut state = Lifecycle::begin(&accepted()).unwrap();
    let body = Body::RequestCancelled(RequestCancelled { cause: "gone".into() });
    let other = Event { request: request(2), ..event(0, body) };
    assert_eq!(state.apply(&other), Err(Illegal::OtherRequest { expected: request(1), found: request(2) }));
}

#[test]
fn a_request_can_end_before_it_is_claimed() {
    let body = Body::RequestCancelled(RequestCancelled { cause: "client disconnected".into() });
    let state = Lifecycle::fold(&[accepted(), event(0, body)]).unwrap().unwrap();
    assert_eq!((state.phase, state.worker), (Phase::Cancelled, None));
}

#[test]
fn a_new_attempt_keeps_tokens_and_forgets_kv() {
    let mut state = Lifecycle::begin(&accepted()).unwrap();
    let details = Details { tokens: vec![7, 8], text: "ab".into(), attempt_off: 0, index_off: 0 };
    for kind in [
        Kind::Claimed,
        Kind::PrefillQueued,
        Kind::PrefillClaimed,
        Kind::KvReady,
        Kind::KvReady,
        Kind::PrefillCompleted,
    ] {
        state.apply(&event_of(kind, &state, &details)).unwrap();
    }
    assert_eq!((state.kv.len(), state.tokens.len(), &*state.text), (2, 1, "ab"));
    state.apply(&event_of(Kind::Claimed, &state, &details)).unwrap();
    assert_eq!((state.kv.len(), state.tokens.len(), &*state.text, state.attempt), (0, 1, "ab", 2));
}

/// What a cache saved is told by whoever draws the first token, or hands over before it; what a later attempt finds is of its
/// own making.
#[test]
fn cached_tokens_are_counted_once_whoever_goes_on() {
    let details = Details { tokens: vec![7, 8], text: "ab".into(), attempt_off: 0, index_off: 0 };
    let apply = |state: &mut Lifecycle, kind, cached| {
        let mut next = event_of(kind, state, &details);
        match &mut next.body {
            Body::Released(Released { cached_tokens, .. })
            | Body::TokensGenerated(TokensGenerated { cached_tokens, .. }) => *cached_tokens = cached,
            _ => {}
        }
        state.apply(&next).unwrap();
        state.usage().cached_tokens
    };
    let mut state = Lifecycle::begin(&accepted()).unwrap();
    let most = state.accepted.prompt.len() as u32;
    apply(&mut state, Kind::Claimed, 0);
    assert_eq!(apply(&mut state, Kind::Drained, 2), 2, "before the first token");
    assert_eq!(apply(&mut state, Kind::Claimed, 0), 2);
    // Another worker that finds nothing of it has computed all.
    let mut cold = state.clone();
    assert_eq!(apply(&mut cold, Kind::TokensGenerated, 0), 0);
    assert_eq!(apply(&mut state, Kind::TokensGenerated, 9), most, "of the prompt, not of what was generated");
    assert_eq!(apply(&mut state, Kind::Drained, 0), most);
    assert_eq!(apply(&mut state, Kind::Claimed, 0), most);
    assert_eq!(apply(&mut state, Kind::TokensGenerated, 1), most, "later attempts change nothing");
}

/// What a draining worker leaves is there for the next one, and for no later one.
#[test]
fn kv_that_was_handed_over_is_read_once_or_lost() {
    let details = Details { tokens: vec![7, 8], text: "ab".into(), attempt_off: 0, index_off: 0 };
    let mut state = Lifecycle::begin(&accepted()).unwrap();
    for kind in [Kind::Claimed, Kind::TokensGenerated] {
        state.apply(&event_of(kind, &state, &details)).unwrap();
    }
    let released = |count| {
        let kv = Some(handle(worker(1), TokenRange { start: 0, count }));
        let (cause, reason) = (ReleaseCause::Drained, "the worker stops".into());
        event(1, Body::Released(Released { worker: worker(1), cause, reason, kv, cached_tokens: 0 }))
    };
    let too_much = Illegal::TooMuchKv { event: "Released", found: 5, most: 4 };
    assert_eq!(state.apply(&released(5)), Err(too_much));
    state.apply(&released(4)).unwrap();
    assert_eq!((&state.phase, &state.worker, state.fruitless), (&Phase::Queued, &None, 0));
    let mut died = state.clone();
    state.apply(&event_of(Kind::Claimed, &state, &details)).unwrap();
    assert!(state.handed_over && state.kv.len() == 1);
    let mut lost = state.clone();
    state.apply(&event_of(Kind::KvTransferred, &state, &details)).unwrap();
    assert_eq!((&state.phase, state.handed_over), (&Phase::Decoding, false));
    lost.apply(&event_of(Kind::KvLost, &lost, &details)).unwrap();
    assert!(lost.apply(&event_of(Kind::KvTransferred, &lost, &details)).is_err());
    for _ in 0..2 {
        died.apply(&event_of(Kind::Claimed, &died, &details)).unwrap();
    }
    assert_eq!((died.handed_over, died.kv.len(), died.fruitless), (false, 0, 2));
}

#[test]
fn attempts_without_a_token_are_counted() {
    let details = Details { tokens: vec![7], text: "a".into(), attempt_off: 0, index_off: 0 };
    let mut state = Lifecycle::begin(&accepted()).unwrap();
    for (kind, fruitless) in [
        (Kind::Claimed, 1),
        (Kind::Claimed, 2),
        (Kind::Drained, 1),
        (Kind::Claimed, 2),
        (Kind::TokensGenerated, 0),
        (Kind::Claimed, 1),
    ] {
        state.apply(&event_of(kind, &state, &details)).unwrap();
        assert_eq!(state.fruitless, fruitless, "{kind:?}");
    }
}

/// A prefill worker that was stopped and overtaken wakes up: its KV must not be taken for the other's.
#[test]
fn an_older_prefill_announces_nothing() {
    let mut state = Lifecycle::begin(&accepted()).unwrap();
    let details = Details { tokens: vec![7], text: String::new(), attempt_off: 0, index_off: 0 };
    for kind in [Kind::Claimed, Kind::PrefillQueued] {
        state.apply(&event_of(kind, &state, &details)).unwrap();
    }
    let claim = |number| {
        Body::PrefillClaimed(PrefillClaimed {
            worker: worker(number),
            ack_subject: "ack".into(),
            delivery: 1,
        })
    };
    let ready = |number, start, slot| {
        let handle = KvHandle { slot, ..handle(worker(number), TokenRange { start, count: 1 }) };
        event(1, Body::KvReady(KvReady { handle }))
    };
    state.apply(&event(1, claim(7))).unwrap();
    state.apply(&ready(7, 0, 0)).unwrap();
    state.apply(&event(1, claim(8))).unwrap();
    let refused = |number| Err(Illegal::OtherPrefill { event: "KvReady", worker: worker(number) });
    assert_eq!(state.apply(&ready(7, 0, 0)), refused(7));
    state.apply(&ready(8, 0, 0)).unwrap();
    assert_eq!(state.apply(&ready(7, 1, 0)), refused(7));
    let done = |number| PrefillCompleted {
        worker: worker(number),
        first_index: 0,
        token: 1,
        text: String::new(),
        compute_us: 1,
        cached_tokens: 0,
        logprobs: None,
    };
    let late = Illegal::OtherPrefill { event: "PrefillCompleted", worker: worker(7) };
    assert_eq!(state.apply(&event(1, Body::PrefillCompleted(done(7)))), Err(late));
    // The same worker again, in another of its slots.
    assert_eq!(state.apply(&ready(8, 1, 3)), refused(8));
    state.apply(&ready(8, 1, 0)).unwrap();
    assert_eq!(state.kv.len(), 2);
    state.apply(&event(1, Body::PrefillCompleted(done(8)))).unwrap();
}

#[test]
fn deadlines_count_from_acceptance_and_do_not_overflow() {
    let mut first = accepted();
    let state = Lifecycle::begin(&first).unwrap();
    assert_eq!(state.deadline_us(), 1_764_000_001_000_000);
    let Body::RequestAccepted(accepted) = &mut first.body else { unreachable!() };
    accepted.timeout_ms = u64::MAX;
    assert_eq!(Lifecycle::begin(&first).unwrap().deadline_us(), u64::MAX);
}
