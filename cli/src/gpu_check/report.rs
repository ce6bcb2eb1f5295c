//! What was found, as lines while it goes on and as a table of Markdown.

use std::{fmt::Write as _, path::Path};

/// One finding.
pub(super) struct Finding {
    what: String,
    aim: String,
    found: String,
    verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Right,
    Wrong,
    Reached,
    Missed,
    Told,
}

/// All findings of a run.
#[derive(Default)]
pub(super) struct Report {
    findings: Vec<Finding>,
}

impl Report {
    /// Whether something is as it must be.
    pub(super) fn check(&mut self, what: &str, found: anyhow::Result<String>) {
        let (found, verdict) = match found {
            Ok(found) => (found, Verdict::Right),
            Err(error) => (format!("{error:#}"), Verdict::Wrong),
        };
        self.add(what, "", &found, verdict);
    }

    /// A part that should be at least so large.
    pub(super) fn at_least(&mut self, what: &str, aim: f64, found: f64, text: &str) {
        let verdict = if found >= aim { Verdict::Reached } else { Verdict::Missed };
        let (aim, found) = (format!("≥ {:.0} %", aim * 100.0), format!("{:.1} % ({text})", found * 100.0));
        self.add(what, &aim, &found, verdict);
    }

    /// A part that should be at most so large.
    pub(super) fn at_most(&mut self, what: &str, aim: f64, found: f64, text: &str) {
        let verdict = if found <= aim { Verdict::Reached } else { Verdict::Missed };
        let (aim, found) = (format!("≤ {:.0} %", aim * 100.0), format!("{:.1} % ({text})", found * 100.0));
        self.add(what, &aim, &found, verdict);
    }

    /// A number without an aim.
    pub(super) fn tell(&mut self, what: &str, found: &str) {
        self.add(what, "", found, Verdict::Told);
    }

    fn add(&mut self, what: &str, aim: &str, found: &str, verdict: Verdict) {
        let mark = match verdict {
            Verdict::Right | Verdict::Reached => "ok     ",
            Verdict::Wrong => "WRONG  ",
            Verdict::Missed => "missed ",
            Verdict::Told => "       ",
        };
        println!(
            "{mark} {what}: {found}{}",
            if aim.is_empty() { String::new() } else { format!(", aim {aim}") }
        );
        self.findings.push(Finding { what: what.into(), aim: aim.into(), found: found.into(), verdict });
    }

    /// How many things are not as they must be.
    pub(super) fn wrong(&self) -> usize {
        self.findings.iter().filter(|finding| finding.verdict == Verdict::Wrong).count()
    }

    /// The table, under a line that says where and when.
    pub(super) fn markdown(&self, heading: &str) -> String {
        let mut text = format!("{heading}\n\n| what | aim | found | |\n|---|---|---|---|\n");
        for Finding { what, aim, found, verdict } in &self.findings {
            let mark = match verdict {
                Verdict::Right | Verdict::Reached => "ok",
                Verdict::Wrong => "**wrong**",
                Verdict::Missed => "missed",
                Verdict::Told => "",
            };
            let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
            let _ = writeln!(text, "| {} | {} | {} | {mark} |", cell(what), cell(aim), cell(found));
        }
        text
    }
}

const BEGIN: &str = "<!-- what was measured last: written by `make gpu-check` -->";
const END: &str = "<!-- end -->";

/// Puts a table in the place of the one before, between two marks of a file.
pub(super) fn put(file: &Path, table: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(file)?;
    let place = text.find(BEGIN).zip(text.find(END)).filter(|(begin, end)| begin < end);
    let Some((begin, end)) = place else { anyhow::bail!("{} has no place for a table", file.display()) };
    let (before, after) = (&text[..begin + BEGIN.len()], &text[end..]);
    Ok(std::fs::write(file, format!("{before}\n\n{table}\n{after}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_takes_the_place_of_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("gpu.md");
        std::fs::write(&file, format!("# GPU\n\n{BEGIN}\n\nold\n\n{END}\nthe rest\n")).unwrap();
        let mut report = Report::default();
        report.at_least("copies", 0.9, 0.95, "100 of 105 GB/s");
        report.check("tokens", Err(anyhow::anyhow!("3 | 4")));
        assert_eq!(report.wrong(), 1);
        put(&file, &report.markdown("NVIDIA X")).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains("| copies | ≥ 90 % | 95.0 % (100 of 105 GB/s) | ok |"), "{text}");
        assert!(
            text.contains("3 \\| 4") && !text.contains("old") && text.ends_with("-->\nthe rest\n"),
            "{text}"
        );
        assert!(put(&folder.path().join("none.md"), "").is_err());
    }
}
