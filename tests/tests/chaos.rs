//! Chaos, in small: a fixed seed and few faults. `make chaos` is the real thing.

use forebay_tests::chaos::{self, Engine, Options};
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_suffers_from_a_few_faults() {
    let options = Options { clients: 6, questions: 8, tokens: 100, ..Options::new(Engine::Sim, 25, 5) };
    let say = |line: &str| println!("{line}");
    let report = chaos::run(&options, &CancellationToken::new(), say).await.expect("a deployment");
    println!("{report}");
    for violation in &report.violations {
        println!("{}\n{}", violation.broken, violation.shown);
    }
    assert!(report.violations.is_empty());
    assert_eq!(report.count(), options.faults);
    assert!(report.outcomes.get("completed").is_some_and(|completed| *completed > 10));
}
