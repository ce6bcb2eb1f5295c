//! Text from tokens, with a byte-level tokenizer: half characters, stop strings, and resuming anywhere.

use forebay_schemas::{
    event::{Body, Claimed, Event, FinishReason, RequestAccepted, TokensGenerated},
    ids::{RequestId, WorkerId},
    lifecycle::Lifecycle,
};
use forebay_workers::output::OutputText;
use proptest::{collection::vec, prelude::*};
use std::sync::{Arc, LazyLock};
use tokenizers::Tokenizer;

/// `<|im_end|>`.
const EOS: u32 = 2;

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/reference/gqa1-tied-bf16/tokenizer.json");
    Arc::new(Tokenizer::from_file(folder).unwrap())
});

#[derive(Clone, Debug)]
struct Ask {
    stop: Vec<String>,
    max_tokens: u32,
    ignore_eos: bool,
}

impl Default for Ask {
    fn default() -> Self {
        Ask { stop: Vec::new(), max_tokens: 10_000, ignore_eos: false }
    }
}

impl Ask {
    fn stop(strings: &[&str]) -> Ask {
        Ask { stop: strings.iter().map(|&stop| stop.to_owned()).collect(), ..Ask::default() }
    }

    /// The log of a request of which so much was generated.
    fn log(&self, tokens: &[u32], text: &str) -> Lifecycle {
        let accepted = RequestAccepted {
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            ..RequestAccepted::greedy("demo", vec![1], self.max_tokens)
        };
        let claimed = Claimed {
            worker: WorkerId::new("worker").unwrap(),
            ack_subject: "ack".into(),
            delivery: 1,
            engine: None,
        };
        let generated = TokensGenerated {
            first_index: 0,
            tokens: tokens.to_vec(),
            text: text.to_owned(),
            cached_tokens: 0,
            logprobs: Vec::new(),
        };
        let request = RequestId::from_parts(0, &[0; 10]);
        let event = |attempt, body| Event { request, attempt, time_us: 0, body };
        let events = [
            event(0, Body::RequestAccepted(accepted)),
            event(1, Body::Claimed(claimed)),
            event(1, Body::TokensGenerated(generated)),
        ];
        Lifecycle::fold(&events).unwrap().unwrap()
    }

    fn resume(&self, eos: &[u32], tokens: &[u32], text: &str) -> OutputText {
        OutputText::resume(TOKENIZER.clone(), eos.into(), &self.log(tokens, text))
    }

    fn begin(&self) -> OutputText {
        self.resume(&[EOS], &[], "")
    }

    /// What comes out token by token, released after each, and how it ends.
    fn pieces(&self, tokens: &[u32]) -> (Vec<String>, Option<FinishReason>) {
        let mut output = self.begin();
        let pieces = tokens.iter().map(|token| {
            output.push(*token);
            output.release()
        });
        (pieces.collect(), output.finish())
    }

    fn text(&self, tokens: &[u32]) -> (String, Option<FinishReason>) {
        let (pieces, finish) = self.pieces(tokens);
        (pieces.concat(), finish)
    }
}

fn encode(text: &str) -> Vec<u32> {
    TOKENIZER.encode(text, false).unwrap().get_ids().to_vec()
}

/// One token for each byte, as a model could write it too.
fn encode_bytes(text: &str) -> Vec<u32> {
    let single = |byte: u8| {
        let char = byte_level(byte).to_string();
        TOKENIZER.token_to_id(&char).unwrap_or_else(|| panic!("no token for byte {byte}"))
    };
    text.bytes().map(single).collect()
}

/// The character that stands for a byte in byte-level vocabularies (GPT-2's table).
fn byte_level(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return byte as char;
    }
    let before = (0..byte).filter(|byte| !printable(*byte)).count() as u32;
    char::from_u32(256 + before).unwrap()
}

fn whole(tokens: &[u32]) -> String {
    TOKENIZER.decode(tokens, true).unwrap()
}

fn any_tokens() -> impl Strategy<Value = Vec<u32>> {
    vec(3..TOKENIZER.get_vocab_size(true) as u32, 0..40)
}

/// Text that looks like text, with characters of one to four bytes.
fn any_text() -> impl Strategy<Value = String> {
    let word = prop_oneof!["[a-c ]{1,3}", "[äßé€日本]{1,2}", "[😀🏽🛑👨‍👩‍👧]{1,2}", Just("\n".to_owned())];
    vec(word, 0..12).prop_map(|words| words.concat())
}

#[test]
fn characters_come_whole() {
    let tokens = encode_bytes("a😀é!");
    assert_eq!(tokens.len(), 8);
    let (pieces, finish) = Ask::default().pieces(&tokens);
    assert_eq!(pieces, ["a", "", "", "", "😀", "", "é", "!"]);
    assert_eq!(finish, None);
}

#[test]
fn half_a_character_at_the_end_shows_as_such() {
    let half = &encode_bytes("😀")[..2];
    let ask = Ask { max_tokens: 2, ..Ask::default() };
    assert_eq!(ask.text(half), (whole(half), Some(FinishReason::Length)));
    let ended = [half, &[EOS]].concat();
    assert_eq!(Ask::default().text(&ended), (whole(half), Some(FinishReason::Stop)));
}

#[test]
fn bytes_that_are_no_text_do_not_hold_up_what_follows() {
    let tokens = [&encode_bytes("é")[..1], &encode_bytes("ok")[..]].concat();
    let (pieces, _) = Ask::default().pieces(&tokens);
    assert_eq!(pieces, ["", "\u{fffd}o", "k"]);
}

#[test]
fn a_stop_string_over_several_tokens_is_cut_and_never_seen() {
    let tokens = encode_bytes("one STOP two");
    let (pieces, finish) = Ask::stop(&["STOP"]).pieces(&tokens);
    assert_eq!((pieces.concat().as_str(), finish), ("one ", Some(FinishReason::Stop)));
    assert!(pieces.iter().all(|piece| !piece.contains('S')), "{pieces:?}");
}

#[test]
fn what_only_began_like_a_stop_string_is_released() {
    let tokens = encode_bytes("a STOR");
    assert_eq!(Ask::stop(&["STOP"]).pieces(&tokens).0, ["a", " ", "", "", "", "STOR"]);
    let tokens = [encode_bytes("a STO"), vec![EOS]].concat();
    assert_eq!(Ask::stop(&["STOP"]).text(&tokens), ("a STO".into(), Some(FinishReason::Stop)));
    let ask = Ask { max_tokens: 5, ..Ask::stop(&["STOP"]) };
    assert_eq!(ask.text(&encode_bytes("a STO")), ("a STO".into(), Some(FinishReason::Length)));
}

#[test]
fn stop_strings_of_several_bytes_a_character() {
    let tokens = encode_bytes("los 🛑 weiter");
    assert_eq!(Ask::stop(&["🛑"]).text(&tokens), ("los ".into(), Some(FinishReason::Stop)));
    let tokens = encode_bytes("aé aéb");
    assert_eq!(Ask::stop(&["éb"]).text(&tokens), ("aé a".into(), Some(FinishReason::Stop)));
}

#[test]
fn of_overlapping_stop_strings_the_first_to_be_complete_ends() {
    assert_eq!(Ask::stop(&["abcd", "bc"]).text(&encode_bytes("xabcd")).0, "xa");
    assert_eq!(Ask::stop(&["bcd", "ab"]).text(&encode_bytes("xabcd")).0, "x");
    // A prefix that repeats within itself.
    assert_eq!(Ask::stop(&["aab"]).text(&encode_bytes("aaab!")).0, "a");
}

#[test]
fn ends() {
    let tokens = [encode_bytes("ab"), vec![EOS], encode_bytes("cd")].concat();
    assert_eq!(Ask::default().text(&tokens), ("ab".into(), Some(FinishReason::Stop)));
    let ignoring = Ask { ignore_eos: true, ..Ask::default() };
    assert_eq!(ignoring.text(&tokens), ("abcd".into(), None));
    let short = Ask { max_tokens: 1, ..Ask::default() };
    assert_eq!(short.text(&tokens), ("a".into(), Some(FinishReason::Length)));
    // The end token as the last one allowed: the model did end.
    let exact = Ask { max_tokens: 3, ..Ask::default() };
    assert_eq!(exact.text(&tokens), ("ab".into(), Some(FinishReason::Stop)));
    // A stop string in the last token allowed.
    let stopped = Ask { max_tokens: 2, ..Ask::stop(&["b"]) };
    assert_eq!(stopped.text(&tokens), ("a".into(), Some(FinishReason::Stop)));
    let mut output = Ask::default().begin();
    tokens.iter().for_each(|token| output.push(*token));
    assert_eq!(output.tokens(), &tokens[..3], "what follows the end is ignored");
}

/// Some models end with a token that is not marked special: it still is no part of the answer.
#[test]
fn the_end_token_is_never_text() {
    let tokens = encode_bytes("ab.");
    let mut output = Ask::default().resume(&[tokens[2]], &[], "");
    tokens.iter().for_each(|token| output.push(*token));
    assert_eq!((output.release().as_str(), output.finish()), ("ab", Some(FinishReason::Stop)));
    let mut output = Ask { ignore_eos: true, ..Ask::default() }.resume(&[tokens[2]], &[], "");
    tokens.iter().for_each(|token| output.push(*token));
    assert_eq!((output.release().as_str(), output.finish()), ("ab.", None));
}

proptest! {
    #[test]
    fn pieces_add_up_to_the_whole(mut tokens in any_tokens()) {
        tokens.push(EOS);
        let (text, finish) = Ask::default().text(&tokens);
        prop_assert_eq!(text, whole(&tokens));
        prop_assert_eq!(finish, Some(FinishReason::Stop));
    }

    #[test]
    fn text_comes_out_as_it_went_in(text in any_text(), bytewise: bool) {
        let tokens = if bytewise { encode_bytes(&text) } else { encode(&text) };
        let (pieces, _) = Ask::default().pieces(&tokens);
        prop_assert_eq!(pieces.concat(), text);
    }

    /// The text ends before the first stop string, and nothing of one is ever seen.
    #[test]
    fn stop_strings_cut(text in any_text(), stop in vec("[a-c ]{1,3}|[é€😀]{1,2}", 1..3), bytewise: bool) {
        let mut tokens = if bytewise { encode_bytes(&text) } else { encode(&text) };
        tokens.push(EOS);
        let (answer, finish) = Ask { stop: stop.clone(), ..Ask::default() }.text(&tokens);
        prop_assert!(text.starts_with(&answer));
        prop_assert_eq!(finish, Some(FinishReason::Stop));
        let found = stop.iter().any(|stop| text.contains(stop.as_str()));
        prop_assert_eq!(found, answer != text);
        prop_assert!(stop.iter().all(|stop| !answer.contains(stop.as_str())));
        prop_assert!(!found || stop.iter().any(|stop| text[answer.len()..].starts_with(stop.as_str())));
    }

    /// A request continued on another worker after any number of tokens: the same text, cut anywhere.
    #[test]
    fn resuming_changes_nothing(
        text in any_text(),
        noise in any_tokens(),
        stop in vec("[a-c ]{2,3}|[é€😀]{1,2}", 0..3),
        max_tokens in 1u32..60,
        ignore_eos: bool,
    ) {
        let tokens = [encode_bytes(&text), noise, vec![EOS], encode("ab")].concat();
        let ask = Ask { stop, max_tokens, ignore_eos };
        let (pieces, finish) = ask.pieces(&tokens);
        for cut in 0..=tokens.len() {
            let mut output = ask.begin();
            tokens[..cut].iter().for_each(|token| output.push(*token));
            // The log holds no token after the end.
            let before = output.tokens().len();
            let released = pieces[..cut].concat();
            let mut resumed = ask.resume(&[EOS], &tokens[..before], &released);
            let rest = tokens[before..].iter().map(|token| {
                resumed.push(*token);
                resumed.release()
            });
            let rest: Vec<String> = rest.collect();
            prop_assert_eq!(released + &rest.concat(), pieces.concat(), "cut at {}", cut);
            prop_assert_eq!(resumed.finish(), finish);
        }
    }

    /// How many tokens come between two releases does not matter to the text.
    #[test]
    fn batches_change_nothing(text in any_text(), stop in vec("[a-c ]{2,3}", 0..2), batch in 1usize..9) {
        let tokens = [encode_bytes(&text), vec![EOS]].concat();
        let ask = Ask { stop, ..Ask::default() };
        let mut output = ask.begin();
        let mut released = String::new();
        for batch in tokens.chunks(batch) {
            batch.iter().for_each(|token| output.push(*token));
            released += &output.release();
        }
        prop_assert_eq!(released, ask.text(&tokens).0);
    }
}
