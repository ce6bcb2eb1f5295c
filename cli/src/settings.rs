//! `forebay config`: what can be changed while everything runs.

use crate::{
    config::{NatsArgs, RegistryArgs, init_logging, runtime},
    show::print,
};
use anyhow::bail;
use clap::{Args, ValueEnum};
use forebay_schemas::config::{LiveConfig, SETTINGS, Setting, setting};
use forebay_streams::settings::SettingsStore;
use std::collections::BTreeMap;

#[derive(Args, Debug)]
#[command(after_help = "\
Workers and gateways follow a change within moments, and none has to be started again. What is not set is as each \
process was started. A value that a setting does not take is refused here; one that gets into the store by other \
means is ignored, and the last good one stays.

Examples:
  forebay config list                                all settings, what they do, where they stand
  forebay config set max_local_prefill_length 512    longer prompts stay with the decode worker
  forebay config unset max_local_prefill_length      back to what each worker was started with")]
pub(crate) struct ConfigArgs {
    /// What to do.
    #[arg(value_name = "ACTION")]
    action: Action,
    /// Which setting, for all but `list`.
    #[arg(required_if_eq_any([("action", "get"), ("action", "set"), ("action", "unset")]), value_name = "KEY")]
    key: Option<String>,
    /// Its value, for `set`.
    #[arg(required_if_eq("action", "set"), allow_negative_numbers = true, value_name = "VALUE")]
    value: Option<String>,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Action {
    /// All settings: value, where it comes from, what it does.
    List,
    /// The value of one that is set.
    Get,
    /// Set one, everywhere and from now on.
    Set,
    /// Unset one: each process goes by what it was started with.
    Unset,
}

pub(crate) fn run(args: &ConfigArgs) -> anyhow::Result<()> {
    init_logging("warn");
    let (key, value) = (args.key.as_deref().unwrap_or_default(), args.value.as_deref().map(str::trim));
    // A mistake is told before anything is connected to.
    match args.action {
        Action::List => {}
        Action::Set => LiveConfig::default().set(key, value)?,
        Action::Get | Action::Unset => setting(key).map(drop)?,
    }
    runtime(1)?.block_on(async {
        let streams = args.registry.apply(args.nats.connect("log", "config").await?).await?;
        act(args.action, key, value.unwrap_or_default(), &*streams.settings).await
    })
}

async fn act(action: Action, key: &str, value: &str, store: &dyn SettingsStore) -> anyhow::Result<()> {
    match action {
        Action::List => {
            let values = store.watch().await?.borrow().clone();
            list(&values).iter().try_for_each(print)
        }
        Action::Get => match store.get(key).await? {
            Some(value) => print(value),
            // For scripts: what is printed is the value, and nothing else.
            None => bail!("{key} is not set: {}", setting(key)?.otherwise),
        },
        Action::Set => {
            store.put(key, value).await?;
            print(format!("{key} = {value}"))
        }
        Action::Unset => {
            store.remove(key).await?;
            print(format!("{key} is not set: {}", setting(key)?.otherwise))
        }
    }
}

/// A line for each setting, and for each value that nobody goes by.
fn list(values: &BTreeMap<String, String>) -> Vec<String> {
    let width = SETTINGS.iter().map(|setting| setting.key.len()).max().unwrap_or(0);
    let (_, errors) = LiveConfig::default().follow(values);
    let mut lines = Vec::new();
    for Setting { key, meaning, otherwise, bounds } in SETTINGS {
        let stands = match values.get(key) {
            Some(value) => format!("{value} (set)"),
            None => format!("not set: {otherwise}"),
        };
        lines.push(format!("{key:<width$}  {stands}"));
        lines.push(format!("{:width$}    {meaning}; {bounds}", ""));
    }
    lines.extend(errors.iter().map(|error| format!("ignored: {error}")));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_shows_what_is_set_and_what_is_ignored() {
        let values = [("step_tokens", "64"), ("max_prefill_queue_size", "many"), ("colour", "red")];
        let values = values.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let lines = list(&values).join("\n");
        assert!(lines.contains("step_tokens               64 (set)"), "{lines}");
        assert!(lines.contains("max_local_prefill_length  not set: each worker's"), "{lines}");
        assert!(lines.contains("ignored: max_prefill_queue_size takes a whole number"), "{lines}");
        assert!(lines.contains("ignored: there is no setting \"colour\""), "{lines}");
    }
}
