//! `forebay config`: what can be changed while everything runs.

use crate::{
    config::{NatsArgs, RegistryArgs, init_logging, runtime},
    show::print,
};
use clap::{Args, Subcommand};
use forebay_schemas::config::{LiveConfig, SETTINGS, Setting, setting};
use forebay_streams::settings::SettingsStore;
use std::collections::BTreeMap;

#[derive(Args, Debug)]
#[command(after_help = "\
Workers and gateways follow a change within moments, and none has to be started again. What is not set is as each \
process was started. A value that a setting does not take is refused here; one that gets into the store by other \
means is ignored, and the last good one stays.

Examples:
  forebay config list                                    all settings, what they do and where they stand
  forebay config set max_local_prefill_length 512        longer prompts stay with the decode worker
  forebay config unset max_local_prefill_length          back to what each worker was started with")]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Args, Debug)]
struct StoreArgs {
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// All settings: value, where it comes from, what it does.
    List {
        #[command(flatten)]
        store: StoreArgs,
    },
    /// The value of one that is set.
    Get {
        /// Which setting.
        key: String,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Set one, everywhere and from now on.
    Set {
        /// Which setting.
        key: String,
        /// Its value.
        #[arg(allow_negative_numbers = true)]
        value: String,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Unset one: each process goes by what it was started with.
    Unset {
        /// Which setting.
        key: String,
        #[command(flatten)]
        store: StoreArgs,
    },
}

pub(crate) fn run(args: &ConfigArgs) -> anyhow::Result<()> {
    init_logging("warn");
    // A mistake is told before anything is connected to.
    match &args.action {
        Action::Set { key, value, .. } => LiveConfig::default().set(key, Some(value))?,
        Action::Get { key, .. } | Action::Unset { key, .. } => setting(key).map(drop)?,
        Action::List { .. } => {}
    }
    let (Action::List { store }
    | Action::Get { store, .. }
    | Action::Set { store, .. }
    | Action::Unset { store, .. }) = &args.action;
    runtime(1)?.block_on(async {
        let streams = store.registry.apply(store.nats.connect("log", "config").await?).await?;
        act(&args.action, &*streams.settings).await
    })
}

async fn act(action: &Action, store: &dyn SettingsStore) -> anyhow::Result<()> {
    match action {
        Action::List { .. } => {
            let values = store.watch().await?.borrow().clone();
            list(&values).iter().try_for_each(print)
        }
        Action::Get { key, .. } => match store.get(key).await? {
            Some(value) => print(value),
            None => print(format!("not set: {}", setting(key)?.otherwise)),
        },
        Action::Set { key, value, .. } => {
            let value = value.trim();
            store.put(key, value).await?;
            print(format!("{key} = {value}"))
        }
        Action::Unset { key, .. } => {
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
