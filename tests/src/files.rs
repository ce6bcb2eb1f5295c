//! Where things are.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The checkout.
pub fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace")
}

/// The `forebay` program: `FOREBAY_BIN`, or the one built beside this test, or one that is built now.
pub fn forebay() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(named) = std::env::var_os("FOREBAY_BIN") {
            return std::path::absolute(named).expect("FOREBAY_BIN is a path");
        }
        let test = std::env::current_exe().expect("this test is a program");
        // target/<profile>/deps/<test>
        let profile = test.ancestors().nth(2).expect("the folder of a profile");
        let binary = profile.join("forebay");
        if !binary.is_file() {
            build(profile.ends_with("release"));
        }
        binary
    })
}

fn build(release: bool) {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let profile: &[&str] = if release { &["--release"] } else { &[] };
    let built = Command::new(cargo)
        .current_dir(checkout())
        .args(["build", "--package", "forebay"])
        .args(profile)
        .status()
        .expect("cargo runs");
    assert!(built.success(), "the forebay program could not be built");
}

/// A folder for a test's files, with a short path: those of Unix sockets have at most 107 bytes.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("fb-").tempdir().expect("a temporary folder can be made")
}
