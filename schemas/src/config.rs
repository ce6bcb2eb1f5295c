//! Live configuration: what can be changed while everything runs. The names, their bounds and meanings, and the one
//! function that decides whether a value is good.

use std::collections::BTreeMap;

/// A setting, as the store and the command line name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its name.
    pub key: &'static str,
    /// What it does.
    pub meaning: &'static str,
    /// What counts where it is not set.
    pub otherwise: &'static str,
    /// Which values it takes.
    pub bounds: &'static str,
}

/// All settings.
pub const SETTINGS: [Setting; 6] = [
    Setting {
        key: "max_local_prefill_length",
        meaning: "a decode worker prefills prompts of at most this many uncached tokens itself",
        otherwise: "each worker's --max-local-prefill-length",
        bounds: COUNT,
    },
    Setting {
        key: "max_prefill_queue_size",
        meaning: "a decode worker prefills itself while this many prefill tasks wait for a worker",
        otherwise: "each worker's --max-prefill-queue-size",
        bounds: COUNT,
    },
    Setting {
        key: "router_prefill_weight",
        meaning: "how much a block of 16 tokens counts that a worker would prefill, when a worker is chosen",
        otherwise: "1",
        bounds: WEIGHT,
    },
    Setting {
        key: "router_kv_load_weight",
        meaning: "how much a block of KV counts that a worker's running sequences hold",
        otherwise: "0.1",
        bounds: WEIGHT,
    },
    Setting {
        key: "router_active_weight",
        meaning: "how much a sequence counts that a worker runs already",
        otherwise: "2",
        bounds: WEIGHT,
    },
    Setting {
        key: "step_tokens",
        meaning: "tokens of one step of a decode worker while sequences decode, prefill included",
        otherwise: "each worker's --step-tokens",
        bounds: STEP,
    },
];

const COUNT: &str = "a whole number from 0 to 4294967295";
const STEP: &str = "a whole number from 1 to 4294967295";
const WEIGHT: &str = "a finite number of at least 0, such as 1 or 0.5";

/// What is set. None: what the process was started with counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LiveConfig {
    /// Prompts of at most this many uncached tokens are prefilled by the decode worker itself.
    pub max_local_prefill_length: Option<u32>,
    /// Prefill tasks that may wait; while there are as many, decode workers prefill themselves.
    pub max_prefill_queue_size: Option<u32>,
    /// Weight of the tokens that a worker would have to prefill.
    pub router_prefill_weight: Option<f64>,
    /// Weight of the KV that a worker holds.
    pub router_kv_load_weight: Option<f64>,
    /// Weight of the sequences that a worker runs.
    pub router_active_weight: Option<f64>,
    /// Tokens of one step of a decode worker while sequences decode.
    pub step_tokens: Option<u32>,
}

/// Why something can't be set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// Nothing is called so.
    #[error("there is no setting {key:?}; there are: {}", SETTINGS.map(|setting| setting.key).join(", "))]
    UnknownKey {
        /// What was asked for.
        key: String,
    },
    /// It does not take this value.
    #[error("{key} takes {bounds}, not {value:?}")]
    BadValue {
        /// Which setting.
        key: &'static str,
        /// What it takes.
        bounds: &'static str,
        /// What it was given.
        value: String,
    },
}

/// The setting of that name.
///
/// # Errors
/// If there is none.
pub fn setting(key: &str) -> Result<&'static Setting, SettingError> {
    let found = SETTINGS.iter().find(|setting| setting.key == key);
    found.ok_or_else(|| SettingError::UnknownKey { key: key.to_owned() })
}

impl LiveConfig {
    /// Sets a setting, or with no value unsets it.
    ///
    /// # Errors
    /// If there is no such setting, or the value is out of its bounds; nothing has changed then.
    pub fn set(&mut self, key: &str, value: Option<&str>) -> Result<(), SettingError> {
        let setting = setting(key)?;
        match setting.key {
            "max_local_prefill_length" => self.max_local_prefill_length = count(setting, value, 0)?,
            "max_prefill_queue_size" => self.max_prefill_queue_size = count(setting, value, 0)?,
            "router_prefill_weight" => self.router_prefill_weight = weight(setting, value)?,
            "router_kv_load_weight" => self.router_kv_load_weight = weight(setting, value)?,
            "router_active_weight" => self.router_active_weight = weight(setting, value)?,
            "step_tokens" => self.step_tokens = count(setting, value, 1)?,
            key => unreachable!("{key} is listed and has no field"),
        }
        Ok(())
    }

    /// What is set once a store holds these values, and what is wrong with them. A bad value changes nothing: what was
    /// set before stays.
    pub fn follow(&self, values: &BTreeMap<String, String>) -> (LiveConfig, Vec<SettingError>) {
        let mut next = self.clone();
        let known = SETTINGS.iter().map(|setting| (setting.key, values.get(setting.key).map(String::as_str)));
        let unknown = values.keys().filter(|key| setting(key).is_err()).map(|key| (key.as_str(), None));
        let errors = known.chain(unknown).filter_map(|(key, value)| next.set(key, value).err()).collect();
        (next, errors)
    }
}

fn count(setting: &Setting, value: Option<&str>, min: u32) -> Result<Option<u32>, SettingError> {
    parse(setting, value, |count| *count >= min)
}

fn weight(setting: &Setting, value: Option<&str>) -> Result<Option<f64>, SettingError> {
    parse(setting, value, |weight: &f64| weight.is_finite() && *weight >= 0.0)
}

fn parse<T: std::str::FromStr>(
    setting: &Setting,
    value: Option<&str>,
    is_good: impl FnOnce(&T) -> bool,
) -> Result<Option<T>, SettingError> {
    let Some(text) = value else { return Ok(None) };
    let bad = || SettingError::BadValue {
        key: setting.key,
        bounds: setting.bounds,
        // What came in by other means may be anything.
        value: text.chars().take(VALUE_SHOWN).collect(),
    };
    text.trim().parse().ok().filter(is_good).map(Some).ok_or_else(bad)
}

/// Characters of a bad value that an error shows.
const VALUE_SHOWN: usize = 40;

#[cfg(test)]
mod tests {
    use super::*;

    fn values(values: &[(&str, &str)]) -> BTreeMap<String, String> {
        values.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn every_setting_takes_what_is_within_its_bounds() {
        for setting in SETTINGS {
            let mut config = LiveConfig::default();
            config.set(setting.key, Some("1")).unwrap();
            assert_ne!(config, LiveConfig::default(), "{}", setting.key);
            for bad in ["", "-1", "x", "nan", "inf", "1e999", "4294967296x"] {
                let before = config.clone();
                let error = config.set(setting.key, Some(bad)).unwrap_err().to_string();
                assert!(error.contains(setting.key) && error.contains(setting.bounds), "{error}");
                assert_eq!(config, before);
            }
            config.set(setting.key, None).unwrap();
            assert_eq!(config, LiveConfig::default());
        }
        let mut config = LiveConfig::default();
        assert!(config.set("step_tokens", Some("0")).is_err());
        config.set("max_local_prefill_length", Some("0")).unwrap();
        config.set("router_active_weight", Some(" 0.25 ")).unwrap();
        assert_eq!((config.max_local_prefill_length, config.router_active_weight), (Some(0), Some(0.25)));
        let error = config.set("max_local_prefil_length", Some("1")).unwrap_err().to_string();
        assert!(error.contains("max_local_prefill_length"), "the error names what there is: {error}");
    }

    #[test]
    fn the_last_good_value_stays() {
        let good = values(&[("step_tokens", "256"), ("max_prefill_queue_size", "8")]);
        let (config, errors) = LiveConfig::default().follow(&good);
        assert_eq!((config.step_tokens, config.max_prefill_queue_size), (Some(256), Some(8)));
        assert_eq!(errors, []);
        let bad = values(&[("step_tokens", "none"), ("max_prefill_queue_size", "9"), ("other", "1")]);
        let (config, errors) = config.follow(&bad);
        assert_eq!((config.step_tokens, config.max_prefill_queue_size), (Some(256), Some(9)));
        assert_eq!(errors.len(), 2, "{errors:?}");
        let (config, errors) = config.follow(&values(&[]));
        assert_eq!((config, errors), (LiveConfig::default(), vec![]));
    }
}
