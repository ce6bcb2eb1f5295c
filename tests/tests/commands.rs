//! What a user meets when something is missing: exit code 1, and a message that says what to do.

use forebay_streams::server::Server;
use forebay_tests::{PATIENCE, deployment::forebay, files, process::Process};
use rustix::process::Signal;
use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Runs a command that must fail by itself, and returns what it says.
fn fails(command: &mut Command) -> String {
    let begun = Instant::now();
    let output = command.output().expect("forebay runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
    assert!(begun.elapsed() < PATIENCE, "{command:?} took {:?}", begun.elapsed());
    let last = said.lines().filter(|line| line.starts_with("forebay: ")).count();
    assert_eq!(last, 1, "one line says what is wrong: {said}");
    said
}

fn says(said: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(said.contains(part), "no {part:?} in: {said}"));
}

/// The URL of a NATS server that is not there.
fn no_nats() -> String {
    format!("nats://127.0.0.1:{}", forebay_streams::server::free_port().expect("a port is free"))
}

#[test]
fn a_taken_port() {
    let folder = files::scratch();
    let data = folder.path().to_str().expect("UTF-8");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = taken.local_addr().expect("an address").to_string();
    let said = fails(&mut forebay(&["gateway", "--listen", &address, "--nats", &no_nats()]));
    says(&said, &["can't listen on", &address, "--listen HOST:PORT"]);
    let said = fails(&mut forebay(&["up", "--data", data, "--listen", &address, "--nats-port", "0"]));
    says(&said, &["can't listen on", &address, "--listen HOST:PORT"]);
    let port = address.rsplit(':').next().expect("a port");
    let said = fails(&mut forebay(&["up", "--data", data, "--listen", "127.0.0.1:0", "--nats-port", port]));
    says(&said, &["is taken", "--nats nats://127.0.0.1:", "--nats-port 0"]);
}

/// A text through the built-in model, and what it says of that; a worker without ranges says what to do.
#[test]
fn ranges_for_kv_in_int8() {
    let folder = files::scratch();
    let data = ["--data", folder.path().to_str().expect("UTF-8")];
    says(&fails(forebay(&["calibrate"]).args(data)), &["has its ranges", "--out FILE"]);
    let demo = files::checkout().join("models/demo");
    let model = folder.path().join("model");
    std::fs::create_dir(&model).expect("a folder");
    for name in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ] {
        std::fs::copy(demo.join(name), model.join(name)).expect("a copy");
    }
    let model = model.to_str().expect("UTF-8");
    let worker = ["worker", "--role", "decode", "--device", "cpu", "--model", model, "--kv-type"];
    let said = fails(forebay(&worker).args(["int8", "--nats", &no_nats()]).args(data));
    says(&said, &["kv_ranges.safetensors is missing", "`forebay calibrate` writes it"]);
    says(&fails(forebay(&worker).args(["fp8", "--nats", &no_nats()]).args(data)), &["KV in fp8 is for GPUs"]);

    let text = folder.path().join("text");
    std::fs::write(&text, "river is 42. stone is 17.").expect("a file");
    let short = fails(forebay(&["calibrate", model, "--text"]).arg(&text).args(data));
    says(&short, &["tokens of text are too few to measure", "at least 512"]);
    let output =
        forebay(&["calibrate", model, "--tokens", "1200"]).args(data).output().expect("forebay runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    says(
        &said,
        &[
            "944 of 944 tokens",
            "largest keys:",
            "1024 bytes in int8, 2048 in bf16, 4096 in fp32",
            "--kv-type int8",
        ],
    );
    let found: Vec<String> = std::fs::read_dir(model)
        .expect("a folder")
        .flatten()
        .map(|file| file.file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("kv_ranges"))
        .collect();
    assert_eq!(found, ["kv_ranges.safetensors"]);
    // Now it only lacks NATS.
    let said = fails(forebay(&worker).args(["int8", "--nats", &no_nats()]).args(data));
    assert!(!said.contains("calibrate") && said.contains("NATS"), "{said}");
}

#[test]
fn no_nats_server() {
    let folder = files::scratch();
    let url = no_nats();
    let gateway = ["gateway", "--listen", "127.0.0.1:0", "--nats", &url];
    let data = folder.path().to_str().expect("UTF-8");
    let worker = ["worker", "--role", "decode", "--engine", "sim", "--data", data, "--nats", &url];
    let id = "chatcmpl-01997a5ce2b47d0c8e3f0f8ddc0c6a11";
    let log = ["log", id, "--nats", &url];
    let tail = ["tail", "--nats", &url];
    let replay = ["replay", id, "--nats", &url];
    let dlq = ["dlq", "list", "--nats", &url];
    for arguments in [&gateway[..], &worker, &log, &tail, &replay, &dlq] {
        says(&fails(&mut forebay(arguments)), &["no NATS server answers at", &url, "forebay up"]);
    }
    let mut up = forebay(&["up", "--data", data, "--listen", "127.0.0.1:0", "--nats-port", "0"]);
    let said = fails(up.env("FOREBAY_NATS_SERVER", "/nowhere/nats-server"));
    says(&said, &["/nowhere/nats-server"]);
}

#[test]
fn no_exported_request() {
    let folder = files::scratch();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file can be written");
        path.to_str().expect("UTF-8").to_owned()
    };
    says(&fails(&mut forebay(&["replay", "./nowhere"])), &["./nowhere is neither a request id nor a file"]);
    let (other, empty) = (file("other.json", "{\"format\":\"gguf\"}\n"), file("empty", ""));
    for path in [&other, &empty] {
        says(&fails(&mut forebay(&["replay", path])), &[path, "line 1: not an exported request"]);
        says(&fails(&mut forebay(&["import", path, "--nats", &no_nats()])), &[path, "line 1"]);
    }
}

/// What is read by `head` ends without a complaint when `head` does.
#[test]
fn a_reader_that_goes_away() {
    let folder = files::scratch();
    let file = folder.path().join("request.jsonl");
    let request = "01997a5ce2b47d0c8e3f0f8ddc0c6a11";
    let header = format!(
        r#"{{"format":"forebay-request","version":1,"forebay":"0","request":"{request}","gateway":"g","model":{{"name":"demo"}},"exported_us":0}}"#
    );
    let accepted = format!(
        r#"{{"seq":1,"version":1,"request":"{request}","attempt":0,"time_us":1,"type":"RequestAccepted","data":{{"model":"demo","endpoint":"chat.completions","prompt":[1],"sampling":{{"temperature":0,"top_p":1,"top_k":0,"seed":1}},"max_tokens":1,"timeout_ms":1000}}}}"#
    );
    std::fs::write(&file, format!("{header}\n{accepted}\n")).expect("a file can be written");
    let mut command = forebay(&["replay", file.to_str().expect("UTF-8")]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("forebay runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn no_onnx_runtime() {
    let folder = files::scratch();
    let data = folder.path().to_str().expect("UTF-8");
    let worker = ["worker", "--role", "decode", "--data", data, "--nats", &no_nats()];
    let said = fails(forebay(&worker).env("ORT_DYLIB_PATH", "/nowhere/libonnxruntime.so"));
    says(&said, &["/nowhere/libonnxruntime.so", "make setup", "ORT_DYLIB_PATH"]);
    let other = folder.path().join("libonnxruntime.so");
    std::fs::write(&other, "not a library").expect("a file can be written");
    let said = fails(forebay(&worker).env("ORT_DYLIB_PATH", &other));
    says(&said, &["libonnxruntime.so", "make setup"]);
}

#[test]
fn no_model() {
    let folder = files::scratch();
    let data = folder.path().to_str().expect("UTF-8");
    let with = |model: &str| {
        fails(&mut forebay(&[
            "worker",
            "--role",
            "prefill",
            "--data",
            data,
            "--nats",
            &no_nats(),
            "--model",
            model,
        ]))
    };
    says(&with("./nowhere"), &["no folder ./nowhere", "a model is a folder or a hub id"]);
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).expect("a folder can be made");
    says(&with(empty.to_str().expect("UTF-8")), &["empty/", "No such file"]);
}

#[test]
fn a_checkpoint_without_one_of_its_tensors() {
    let folder = files::scratch();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).expect("a folder can be made");
    let demo = files::checkout().join("models/demo");
    for file in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(demo.join(file), model.join(file)).expect("the demo has it");
    }
    let name = "model.layers.0.mlp.up_proj.weight";
    rename_tensor(&demo.join("model.safetensors"), &model.join("model.safetensors"), name);
    let path = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let (model, data) = (path(&model), path(folder.path()));
    let worker = ["worker", "--role", "decode", "--data", &data, "--nats", &no_nats(), "--model", &model];
    says(&fails(&mut forebay(&worker)), &[name]);
}

/// Copies a safetensors file, with another name of the same length for one tensor.
fn rename_tensor(from: &Path, to: &Path, name: &str) {
    let mut bytes = std::fs::read(from).expect("the demo has weights");
    let quoted = format!("\"{name}\"").into_bytes();
    let at = bytes.windows(quoted.len()).position(|window| window == quoted).expect("it has the tensor");
    bytes[at + quoted.len() - 2] = b'_';
    std::fs::write(to, bytes).expect("a file can be written");
}

/// `forebay up`: one command that answers, and leaves nothing behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn up_answers_and_takes_everything_down() {
    let folder = files::scratch();
    let port = forebay_streams::server::free_port().expect("a port is free");
    let data = folder.path().join("data");
    let mut command = forebay(&["up", "--ask", "What is a forebay?", "--nats-port", "0"]);
    command.args(["--listen", &format!("127.0.0.1:{port}"), "--data"]).arg(&data);
    command.env("FOREBAY_SOCKETS", folder.path().join("s"));
    let _no_server_left = NatsOf(data.join("nats"));
    let mut up = Process::start("up", &mut command, folder.path().join("up.log"));
    up.says("Serving on http://127.0.0.1").await;
    let log = up.log();
    let said =
        log.split("> What is a forebay?").nth(1).expect("the question is shown, and the answer below it");
    assert!(said.split_whitespace().count() > 5, "{log}");
    // What it says to do next, works.
    let next = said.lines().find_map(|line| line.strip_prefix("What happened to it:")).expect("a command");
    let mut words = next.split_whitespace().skip(1);
    assert_eq!(words.next(), Some("log"), "{next}");
    let timeline = forebay(&["log"]).args(words).output().expect("forebay runs");
    let timeline = String::from_utf8_lossy(&timeline.stdout).into_owned();
    assert!(
        timeline.contains("RequestAccepted") && timeline.contains("RequestCompleted"),
        "{next}: {timeline}"
    );

    up.signal(Signal::TERM);
    assert!(up.ended().await.success(), "{}", up.log());
    let left = || left_behind(&data);
    for _ in 0..100 {
        if left().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("left behind: {:?}", left());
}

/// The nats-server of a `forebay up` that could not stop it, because its test failed and killed it.
struct NatsOf(PathBuf);

impl Drop for NatsOf {
    fn drop(&mut self) {
        Server::stop_leftover(&self.0);
    }
}

/// Processes with a folder in their command line or environment.
fn left_behind(folder: &Path) -> Vec<String> {
    let folder = folder.to_str().expect("UTF-8");
    let processes = std::fs::read_dir("/proc").expect("Linux").flatten();
    let reads = |path: std::path::PathBuf| {
        String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
    };
    let of = |entry: std::fs::DirEntry| {
        let path = entry.path();
        let command = reads(path.join("cmdline"));
        let all = command.clone() + &reads(path.join("environ"));
        (all.contains(folder)).then(|| command.replace('\0', " "))
    };
    processes.filter_map(of).collect()
}
