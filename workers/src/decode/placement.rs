//! Conditional disaggregation: whether a prompt is prefilled here or by a prefill worker, and why.

/// What there is to prefill.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prompt {
    /// Tokens.
    pub(super) tokens: u32,
    /// Of these, how many have their KV here already.
    pub(super) cached: u32,
}

/// From where on prefill workers are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// At most this many uncached tokens are prefilled here.
    pub(super) max_local_prefill_length: u32,
    /// While this many tasks wait for a prefill worker, everything is prefilled here.
    pub(super) max_prefill_queue_size: u32,
}

/// What is known of the prefill workers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prefill {
    /// Workers that live, compute the same KV, and take tasks.
    pub(super) workers: usize,
    /// Tasks that wait for one of them.
    pub(super) queue_depth: u64,
}

/// Where a prompt is prefilled, and why.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Placement {
    Local { reason: String },
    Remote { reason: String },
}

/// A prompt goes to a prefill worker if there is one, if it is long enough to disturb those that decode here, and if it
/// would not wait there for long.
pub(super) fn place(prompt: Prompt, limits: Limits, prefill: Prefill) -> Placement {
    let Limits { max_local_prefill_length: length, max_prefill_queue_size: size } = limits;
    let uncached = prompt.tokens.saturating_sub(prompt.cached);
    let what = match prompt.cached {
        0 => format!("prompt of {uncached}"),
        cached => format!("uncached {uncached} of prompt of {} ({cached} cached)", prompt.tokens),
    };
    if prefill.workers == 0 {
        return Placement::Local { reason: "no prefill worker of this layout".into() };
    }
    if uncached <= length {
        return Placement::Local { reason: format!("{what} <= max_local_prefill_length {length}") };
    }
    if prefill.queue_depth >= u64::from(size) {
        let reason = format!("prefill queue of {} >= max_prefill_queue_size {size}", prefill.queue_depth);
        return Placement::Local { reason };
    }
    Placement::Remote { reason: format!("{what} > max_local_prefill_length {length}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { max_local_prefill_length: 128, max_prefill_queue_size: 4 };
    const IDLE: Prefill = Prefill { workers: 1, queue_depth: 0 };

    fn local(prompt: (u32, u32), limits: Limits, prefill: Prefill) -> Option<String> {
        let (tokens, cached) = prompt;
        match place(Prompt { tokens, cached }, limits, prefill) {
            Placement::Local { reason } => Some(reason),
            Placement::Remote { .. } => None,
        }
    }

    #[test]
    fn long_prompts_go_to_prefill_workers_and_say_why() {
        let Placement::Remote { reason } = place(Prompt { tokens: 129, cached: 0 }, LIMITS, IDLE) else {
            panic!("it is long enough")
        };
        assert_eq!(reason, "prompt of 129 > max_local_prefill_length 128");
    }

    #[test]
    fn short_ones_stay_and_what_is_cached_does_not_count() {
        assert_eq!(local((128, 0), LIMITS, IDLE).unwrap(), "prompt of 128 <= max_local_prefill_length 128");
        assert!(local((1000, 872), LIMITS, IDLE).unwrap().contains("uncached 128 of prompt of 1000"));
        assert_eq!(local((1000, 871), LIMITS, IDLE), None);
        let always = Limits { max_local_prefill_length: 0, ..LIMITS };
        assert_eq!(local((1, 0), always, IDLE), None);
        assert!(local((64, 64), always, IDLE).is_some(), "there is nothing to prefill");
    }

    #[test]
    fn a_long_queue_keeps_prompts_here() {
        assert_eq!(local((1000, 0), LIMITS, Prefill { queue_depth: 3, ..IDLE }), None);
        let reason = local((1000, 0), LIMITS, Prefill { queue_depth: 4, ..IDLE }).unwrap();
        assert_eq!(reason, "prefill queue of 4 >= max_prefill_queue_size 4");
        let never = Limits { max_prefill_queue_size: 0, ..LIMITS };
        assert!(local((1000, 0), never, IDLE).is_some());
    }

    #[test]
    fn nobody_to_ask_keeps_prompts_here() {
        let reason = local((1000, 0), LIMITS, Prefill { workers: 0, queue_depth: 0 }).unwrap();
        assert_eq!(reason, "no prefill worker of this layout");
    }
}
