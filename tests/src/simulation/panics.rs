//! A panic within a simulation is a violation, whoever catches it.

use forebay_streams::environment::is_simulated;
use std::{cell::RefCell, sync::Once};

thread_local! {
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Takes note of panics from here on.
pub(super) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            usual(panic);
            if is_simulated() {
                PANICS.with_borrow_mut(|panics| panics.push(format!("panic: {panic}")));
            }
        }));
    });
}

/// Panics of this thread.
pub(super) fn take() -> Vec<String> {
    PANICS.take()
}
