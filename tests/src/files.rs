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

/// The `forebay` program: `FOREBAY_BIN`, or `target/release/forebay`, which is built if it is not there. One that is
/// there is taken as it is.
pub fn forebay() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(named) = std::env::var_os("FOREBAY_BIN") {
            return std::path::absolute(named).expect("FOREBAY_BIN is a path");
        }
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| checkout().join("target"), PathBuf::from);
        let binary = target.join("release/forebay");
        if !binary.is_file() {
            build();
        }
        assert!(binary.is_file(), "no {}: build it, or name it in FOREBAY_BIN", binary.display());
        binary
    })
}

fn build() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["build", "--release", "--package", "forebay"];
    let built = Command::new(cargo).current_dir(checkout()).args(arguments).status().expect("cargo runs");
    assert!(built.success(), "the forebay program could not be built");
}

/// A folder for a test's files, with a short path: those of Unix sockets have at most 107 bytes.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("fb-").tempdir().expect("a temporary folder can be made")
}
