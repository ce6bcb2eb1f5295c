//! Log-exact replay: the state that follows from a request's events, and what the client saw when.

use crate::{
    cancel::ending,
    request::fold,
    show::{millis, print},
};
use anyhow::bail;
use forebay_schemas::{
    event::{Body, Event},
    export::Export,
    lifecycle::Lifecycle,
};

pub(super) fn show(export: &Export, at: Option<usize>) -> anyhow::Result<()> {
    let all = export.events.len();
    let at = at.unwrap_or(all);
    if !(1..=all).contains(&at) {
        bail!("--at {at}: the log has events 1 to {all}");
    }
    let state = fold(&export.events, at)?;
    let (seq, event) = &export.events[at - 1];
    let elapsed = millis(event.time_us.saturating_sub(state.accepted_us));
    print(format!(
        "after event {at} of {all}: {} (sequence {seq}), {elapsed} after the first\n",
        event.body.name()
    ))?;
    facts(export, &state).iter().try_for_each(print)?;
    print("\nwhat the client saw")?;
    let mut seen = export.events[..at].iter().filter_map(|(_, event)| shown(event)).peekable();
    if seen.peek().is_none() {
        return print("  nothing yet");
    }
    seen.try_for_each(|(time_us, text)| {
        print(format!("{:>12}  {text:?}", millis(time_us.saturating_sub(state.accepted_us))))
    })
}

/// The text that an event released.
fn shown(event: &Event) -> Option<(u64, &str)> {
    let text = match &event.body {
        Body::PrefillCompleted(prefill) => &prefill.text,
        Body::TokensGenerated(generated) => &generated.text,
        _ => return None,
    };
    (!text.is_empty()).then_some((event.time_us, text))
}

fn facts(export: &Export, state: &Lifecycle) -> Vec<String> {
    let named = |name: &Option<forebay_schemas::ids::WorkerId>| {
        name.as_ref().map_or("none".to_owned(), ToString::to_string)
    };
    let accepted = &state.accepted;
    let mut facts = vec![
        format!("request    {} of gateway {}", state.request, export.header.gateway),
        format!(
            "asked      {} of {}, {} prompt tokens",
            accepted.endpoint,
            accepted.model,
            accepted.prompt.len()
        ),
        format!("phase      {}", ending(state)),
        format!("attempt    {}", state.attempt),
        format!("worker     {}", named(&state.worker)),
        format!("prefiller  {}", named(&state.prefiller)),
        format!("deadline   {:.1} s after the first event", accepted.timeout_ms as f64 / 1e3),
    ];
    for kv in &state.kv {
        let (start, end) = (kv.tokens.start, kv.tokens.end());
        facts.push(format!(
            "kv         tokens {start}..{end} in slot {} (generation {}) of {}, layout {}",
            kv.slot, kv.generation, kv.agent, kv.layout_hash
        ));
    }
    facts.push(format!(
        "tokens     {} of at most {}: {:?}",
        state.tokens.len(),
        accepted.max_tokens,
        state.tokens
    ));
    facts.push(format!("text       {:?}", state.text));
    facts
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::{
        event::{FailureCode, RequestAccepted, RequestFailed},
        export::{FORMAT, Header, ModelFacts, VERSION},
        ids::RequestId,
    };

    fn export() -> Export {
        let request: RequestId = "019ab3c4d5e67f80a1b2c3d4e5f60718".parse().unwrap();
        let accepted = RequestAccepted::greedy("demo", vec![1, 2, 3], 9);
        let header = Header {
            format: FORMAT.into(),
            version: VERSION,
            forebay: "0.1.0".into(),
            request,
            gateway: "gw-1".parse().unwrap(),
            model: ModelFacts::default(),
            exported_us: 0,
        };
        let failed =
            RequestFailed { code: FailureCode::DeadlineExceeded, message: "no worker took it".into() };
        let event = |attempt, body| Event { request, attempt, time_us: 5, body };
        let events =
            vec![(4, event(0, Body::RequestAccepted(accepted))), (9, event(0, Body::RequestFailed(failed)))];
        Export { header, events }
    }

    #[test]
    fn the_state_reads_well() {
        let export = export();
        let state = fold(&export.events, 2).unwrap();
        insta::assert_snapshot!(format!("{}", facts(&export, &state).join("\n")), @r#"
        request    019ab3c4d5e67f80a1b2c3d4e5f60718 of gateway gw-1
        asked      chat.completions of demo, 3 prompt tokens
        phase      failed: no worker took it
        attempt    0
        worker     none
        prefiller  none
        deadline   60.0 s after the first event
        tokens     0 of at most 9: []
        text       ""
        "#);
    }

    #[test]
    fn what_does_not_fold_is_named() {
        let mut export = export();
        export.events[1].1.attempt = 3;
        let error = fold(&export.events, 2).unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "event 2 of 2 (RequestFailed, sequence 9) does not fit: RequestFailed of attempt 3, expected 0"
        );
        assert!(fold(&export.events, 1).is_ok());
        assert!(show(&export, Some(3)).unwrap_err().to_string().contains("events 1 to 2"));
    }
}
