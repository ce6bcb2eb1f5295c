//! A request run again on an engine of this process, and compared with its log.

use crate::{
    cancel::ending,
    config::data_folder,
    model::ModelArgs,
    request::{engines, fold},
    show::print,
};
use anyhow::{Context, bail};
use forebay_schemas::{event::FinishReason, export::Export, lifecycle::Lifecycle};
use forebay_workers::{
    engine::EngineCard,
    logits::LogitsProcessors,
    model::ModelText,
    replay::{self, Comparison, Divergence},
    vocabulary::Vocabulary,
};
use std::{path::PathBuf, sync::Arc, time::Instant};

pub(super) fn run(
    export: &Export,
    args: &ModelArgs,
    data: Option<PathBuf>,
    chunk: u32,
) -> anyhow::Result<()> {
    let state = fold(&export.events, export.events.len())?;
    let data = data_folder(data);
    let model = args.find(&data)?;
    let text = ModelText::open(&model.folder)?;
    let vocab = text.tokenizer.get_vocab_size(true) as u32;
    let mut engine = args.engine.open(args.engine.device(), &model, vocab, (1, chunk), &data)?;
    engine.warm_up()?;
    request(&state).iter().try_for_each(print)?;
    engine_lines(export, engine.card(), &model.name).iter().try_for_each(print)?;
    check_context(&state, engine.card())?;

    let begun = Instant::now();
    let eos: Arc<[u32]> = engine.card().eos.clone().into();
    let vocabulary = Vocabulary::new(text.tokenizer.clone(), eos.clone(), engine.card().vocab);
    let processors = LogitsProcessors::new(&state.accepted, &[], &vocabulary)?;
    let comparison =
        replay::compare(&mut *engine, &state, processors, chunk).context("running the request again")?;
    print(format!("compared   {} tokens in {:.1?}", comparison.tokens, begun.elapsed()))?;
    let (derived, finish) = replay::output(text.tokenizer.clone(), eos, &state);
    let differences = differences(&text, &state, &comparison, &derived, finish);
    if differences.is_empty() {
        return print(match (comparison.tokens, state.finish) {
            (0, _) => "equal      trivially: the log has no tokens".to_owned(),
            (_, Some(_)) => "equal      every token, the text and the end".to_owned(),
            (_, None) => "equal      every token and the text".to_owned(),
        });
    }
    differences.iter().try_for_each(print)?;
    match comparison.first {
        Some(Divergence { index, .. }) => bail!(
            "the replay differs from the log in {} of {} tokens, first in token {index}",
            comparison.differing,
            comparison.tokens
        ),
        None => bail!("the tokens are equal, but not what follows from them here"),
    }
}

fn request(state: &Lifecycle) -> [String; 2] {
    let accepted = &state.accepted;
    let (prompt, drawn) = (accepted.prompt.len(), state.tokens.len());
    let taken_over = match state.attempt {
        0 | 1 => String::new(),
        // A takeover computes KV anew in one go, and decode kernels may round otherwise.
        attempts => format!(", over {attempts} attempts: what follows a takeover may round differently"),
    };
    [
        format!("request    {} of {}, {}", state.request, accepted.model, ending(state)),
        format!("logged     {prompt} prompt tokens, {drawn} generated{taken_over}"),
    ]
}

/// What ran the request then, and what runs it here.
fn engine_lines(export: &Export, here: &EngineCard, name: &str) -> Vec<String> {
    let mut recorded = engines(&export.events);
    let mut source = "";
    if recorded.is_empty()
        && let Some(hash) = export.header.model.layout_hash
    {
        recorded.push((hash, export.header.model.weights.clone()));
        source = " (by the model's card when it was exported, not by the log)";
    }
    let mut lines: Vec<String> = recorded
        .iter()
        .map(|(hash, weights)| {
            let weights = weights.as_deref().unwrap_or("weights not named");
            format!("ran        {weights}, layout {hash}{source}")
        })
        .collect();
    let verdict = match (recorded.len(), recorded.iter().all(|(hash, _)| *hash == here.layout_hash)) {
        (0, _) => "; the log does not say what ran the request",
        (_, true) => ": the same",
        (_, false) => ": another model or precision, so tokens may differ",
    };
    lines.push(format!("runs here  {}, layout {} ({name}){verdict}", here.weights, here.layout_hash));
    lines
}

fn check_context(state: &Lifecycle, card: &EngineCard) -> anyhow::Result<()> {
    let (tokens, limit) = (state.sequence().len(), card.context_limit as usize);
    if tokens > limit {
        bail!("the request has {tokens} tokens, and the engine takes {limit}: raise --context");
    }
    Ok(())
}

fn differences(
    text: &ModelText,
    state: &Lifecycle,
    comparison: &Comparison,
    derived: &str,
    finish: Option<FinishReason>,
) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(first) = &comparison.first {
        lines.push(format!(
            "differs    {} of {} tokens; first token {}:",
            comparison.differing, comparison.tokens, first.index
        ));
        let token = |id: u32| format!("{id} {:?}", text.tokenizer.decode(&[id], false).unwrap_or_default());
        let [logged, drawn] = [first.logged, first.drawn].map(token);
        match first.logits {
            Some(logits) => {
                lines.push(format!("  logged   {logged}, logit {:.4}", logits.logged));
                lines.push(format!(
                    "  here     {drawn}, logit {:.4}: {}",
                    logits.drawn,
                    ahead(logits.margin())
                ));
            }
            None => {
                lines.push(format!("  logged   {logged}"));
                lines.push(format!("  here     {drawn} (this engine has no logits)"));
            }
        }
    }
    if derived != state.text {
        let same = derived.bytes().zip(state.text.bytes()).take_while(|(a, b)| a == b).count();
        lines.push(format!("differs    the text of the logged tokens, from byte {same}:"));
        lines.push(format!("  logged   {:?}", state.text));
        lines.push(format!("  here     {derived:?}"));
    }
    if state.finish.is_some() && state.finish != finish {
        let word = |reason: Option<FinishReason>| {
            reason.map_or("it goes on".to_owned(), |reason| format!("{reason:?}").to_lowercase())
        };
        lines.push(format!("differs    the end: logged {}, here {}", word(state.finish), word(finish)));
    }
    lines
}

fn ahead(margin: f32) -> String {
    match margin {
        margin if margin > 0.0 => format!("ahead by {margin:.4}"),
        // Drawn with a temperature, the less probable token can win.
        margin => format!("behind by {:.4}", -margin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_have_a_direction() {
        assert_eq!(ahead(0.25), "ahead by 0.2500");
        assert_eq!(ahead(-0.25), "behind by 0.2500");
    }
}
