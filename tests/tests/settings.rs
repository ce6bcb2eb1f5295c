//! Where settings come from, and where models do.

use forebay_tests::{deployment::forebay, files};
use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Output,
};

fn said(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].concat().iter().map(|byte| char::from(*byte)).collect()
}

/// Flags win over the environment, which wins over the file. Each names a port that is taken, and the error says which
/// of them was tried.
#[test]
fn flags_then_environment_then_file() {
    let taken: Vec<TcpListener> =
        (0..3).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port is free")).collect();
    let [file, variable, flag] =
        [0, 1, 2].map(|index| taken[index].local_addr().expect("an address").to_string());
    let folder = files::scratch();
    let settings = folder.path().join("forebay.toml");
    std::fs::write(&settings, format!("listen = \"{file}\"\nin-flight-max = 7\n"))
        .expect("a file can be written");
    let tried = |with_variable: bool, with_flag: bool| {
        let mut command = forebay(&["--config", settings.to_str().expect("UTF-8"), "gateway"]);
        if with_variable {
            command.env("FOREBAY_LISTEN", &variable);
        }
        if with_flag {
            command.args(["--listen", &flag]);
        }
        said(&command.output().expect("forebay runs"))
    };
    assert!(tried(false, false).contains(&file));
    assert!(tried(true, false).contains(&variable));
    assert!(tried(true, true).contains(&flag));
}

#[test]
fn a_settings_file_with_a_mistake_is_refused() {
    let folder = files::scratch();
    let settings = folder.path().join("forebay.toml");
    for (text, problem) in [
        ("lisen = \"127.0.0.1:1\"", "no command has a flag --lisen"),
        ("listen = [1]", "listen must be a string, a number or a boolean"),
        ("listen", "forebay.toml"),
    ] {
        std::fs::write(&settings, text).expect("a file can be written");
        let output = forebay(&["gateway"]).env("FOREBAY_CONFIG", &settings).output().expect("forebay runs");
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains(problem), "{}", said(&output));
    }
}

/// A model by its id on a hub: fetched from HF_ENDPOINT into HF_HOME, and found there without the hub afterwards.
#[test]
fn a_model_is_fetched_from_a_hub_and_kept() {
    let folder = files::scratch();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/gqa2-untied-fp32-sharded");
    let hub = serve_hub(model);
    let doctor = |endpoint: &str, id: &str| {
        let mut command = forebay(&["doctor", "--model", id, "--nats", "nats://127.0.0.1:1"]);
        command.env("HF_ENDPOINT", endpoint).env("HF_HOME", folder.path().join("hf"));
        said(&command.output().expect("forebay runs"))
    };
    let found = "model: team/sharded: ";
    let first = doctor(&hub, "team/sharded");
    assert!(first.contains(found), "{first}");
    let nowhere = "http://127.0.0.1:1";
    let again = doctor(nowhere, "team/sharded");
    assert!(again.contains(found), "{again}");
    let unknown = doctor(nowhere, "team/unknown");
    assert!(unknown.contains("fetching team/unknown from the Hugging Face hub"), "{unknown}");
}

/// A hub of one repository, whatever its name: the part of the hub's HTTP interface that a download uses.
fn serve_hub(folder: PathBuf) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            // A client that leaves early is its own business.
            let _ = answer(connection, &folder);
        }
    });
    url
}

fn answer(mut connection: TcpStream, folder: &Path) -> std::io::Result<()> {
    let mut lines = BufReader::new(connection.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let mut range = None;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(bytes) = line.strip_prefix("range: bytes=") {
            range = bytes.split_once('-').map(|(start, end)| (start.to_owned(), end.to_owned()));
        }
    }
    let name = request.split_whitespace().nth(1).and_then(|path| path.split("/resolve/main/").nth(1));
    let Some(bytes) = name.and_then(|name| std::fs::read(folder.join(name)).ok()) else {
        return connection
            .write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    };
    let last = bytes.len() - 1;
    let (start, end) = range.map_or((0, last), |(start, end)| {
        (start.parse().unwrap_or(0), end.parse().unwrap_or(last).min(last))
    });
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {start}-{end}/{}\r\n\
         etag: \"{}\"\r\nx-repo-commit: 0123abcd\r\nconnection: close\r\n\r\n",
        end + 1 - start,
        bytes.len(),
        forebay_schemas::ids::fnv1a(&bytes),
    );
    connection.write_all(head.as_bytes())?;
    connection.write_all(&bytes[start..=end])
}
