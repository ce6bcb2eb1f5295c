//! What a damaged, foreign or unsuitable checkpoint is told: one sentence that names the file and the tensor.

mod parity_support;

use forebay_workers::engine::{
    Engine,
    checkpoint::{Checkpoint, CheckpointError},
    graph::Precision,
    library::LibraryError,
    onnx::{OnnxEngine, OnnxOptions, OpenError},
};
use parity_support::dir;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const SINGLE: &str = "gqa1-tied-bf16";
const SHARDED: &str = "gqa2-untied-fp32-sharded";

/// A copy of a reference checkpoint, to be damaged.
struct Copy(TempDir);

impl Copy {
    fn of(case: &str) -> Copy {
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(dir(case)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
        }
        Copy(copy)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn json(self, name: &str, change: impl FnOnce(&mut Value)) -> Copy {
        let mut json: Value = serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(self.path(name), json.to_string()).unwrap();
        self
    }

    fn config(self, key: &str, value: Value) -> Copy {
        self.json("config.json", |config| config[key] = value)
    }

    /// Changes the header of a safetensors file, leaving the tensors where they are.
    fn header(self, name: &str, change: impl FnOnce(&mut Value)) -> Copy {
        let bytes = std::fs::read(self.path(name)).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let header = header.to_string();
        let parts = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]];
        std::fs::write(self.path(name), parts.concat()).unwrap();
        self
    }

    fn error(&self) -> CheckpointError {
        Checkpoint::open(self.0.path()).err().expect("the checkpoint is damaged")
    }

    /// The message, with the directory cut out.
    fn message(&self) -> String {
        self.error().to_string().replace(&format!("{}/", self.0.path().display()), "")
    }
}

#[test]
fn whole_copies_open_and_hash_alike() {
    for case in [SINGLE, SHARDED] {
        let copy = Copy::of(case);
        let (a, b) = (Checkpoint::open(&dir(case)).unwrap(), Checkpoint::open(copy.0.path()).unwrap());
        assert_eq!(a.weights_hash(), b.weights_hash());
        assert_eq!(a.eos(), [2]);
    }
}

#[test]
fn one_changed_weight_changes_the_hash() {
    let copy = Copy::of(SINGLE);
    let before = Checkpoint::open(copy.0.path()).unwrap().weights_hash();
    let mut bytes = std::fs::read(copy.path("model.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(copy.path("model.safetensors"), bytes).unwrap();
    assert_ne!(Checkpoint::open(copy.0.path()).unwrap().weights_hash(), before);
}

#[test]
fn other_architectures_and_features_are_refused_by_name() {
    let refused = |key: &str, value: Value| Copy::of(SINGLE).config(key, value).message();
    assert_eq!(
        refused("architectures", json!(["LlamaForCausalLM"])),
        "config.json: the architecture is LlamaForCausalLM; only Qwen3ForCausalLM is supported"
    );
    assert_eq!(refused("attention_bias", json!(true)), "config.json: attention_bias is not supported");
    assert_eq!(
        refused("use_sliding_window", json!(true)),
        "config.json: use_sliding_window is not supported"
    );
    assert_eq!(
        refused("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})),
        // This config has `rope_parameters` too: what either says counts.
        "config.json: rope scaling of type \"yarn\" is not supported"
    );
    assert_eq!(
        refused("rope_parameters", json!({"rope_type": "linear", "factor": 2.0})),
        "config.json: rope scaling of type \"linear\" is not supported"
    );
    assert_eq!(
        refused("layer_types", json!(["full_attention", "sliding_attention"])),
        "config.json: layer type \"sliding_attention\" is not supported"
    );
    assert_eq!(
        refused("head_dim", json!(24)),
        "config.json: head_dim 24, which is not a multiple of 16, is not supported"
    );
    assert_eq!(
        refused("hidden_size", json!("big")),
        "config.json: hidden_size is \"big\", not a positive number"
    );
    assert_eq!(refused("hidden_size", Value::Null), "config.json: hidden_size is missing");
    assert!(matches!(
        Copy::of(SINGLE).config("hidden_act", json!("gelu")).error(),
        CheckpointError::Unsupported { .. }
    ));
}

#[test]
fn head_dim_follows_from_the_hidden_size_and_eos_from_either_file() {
    let copy = Copy::of(SINGLE).config("head_dim", Value::Null).config("eos_token_id", json!([7, 8]));
    let checkpoint = Checkpoint::open(copy.0.path()).unwrap();
    assert_eq!((checkpoint.config().head_dim, checkpoint.eos()), (16, &[2][..]));
    std::fs::remove_file(copy.path("generation_config.json")).unwrap();
    assert_eq!(Checkpoint::open(copy.0.path()).unwrap().eos(), [7, 8]);
}

#[test]
fn missing_files_are_named() {
    for (case, name) in [
        (SINGLE, "config.json"),
        (SINGLE, "model.safetensors"),
        (SHARDED, "model-00003-of-00004.safetensors"),
    ] {
        let copy = Copy::of(case);
        std::fs::remove_file(copy.path(name)).unwrap();
        assert_eq!(copy.message(), format!("cannot read {name}: No such file or directory (os error 2)"));
    }
    assert!(matches!(Checkpoint::open(Path::new("/nowhere")), Err(CheckpointError::Unreadable { .. })));
}

#[test]
fn missing_tensors_are_named() {
    let rename = |header: &mut Value| {
        let tensor = header.as_object_mut().unwrap().remove("model.layers.1.mlp.up_proj.weight").unwrap();
        header["other"] = tensor;
    };
    let copy = Copy::of(SINGLE).header("model.safetensors", rename);
    assert_eq!(copy.message(), "model.safetensors: tensor model.layers.1.mlp.up_proj.weight is missing");
    let copy = Copy::of(SHARDED).json("model.safetensors.index.json", |index| {
        index["weight_map"].as_object_mut().unwrap().remove("model.norm.weight");
    });
    assert_eq!(copy.message(), "model.safetensors.index.json: tensor model.norm.weight is missing");
    let copy = Copy::of(SHARDED).json("model.safetensors.index.json", |index| {
        index["weight_map"]["model.norm.weight"] = json!("model-00001-of-00004.safetensors");
    });
    assert!(
        copy.message().ends_with("of-00004.safetensors: tensor model.norm.weight is missing"),
        "{}",
        copy.message()
    );
}

#[test]
fn an_index_cannot_point_outside() {
    for name in ["../model.safetensors", "/etc/passwd", "", ".."] {
        let copy = Copy::of(SHARDED).json("model.safetensors.index.json", |index| {
            index["weight_map"]["model.norm.weight"] = json!(name);
        });
        assert!(matches!(copy.error(), CheckpointError::BadIndex { .. }), "{name}: {}", copy.message());
    }
    let copy = Copy::of(SHARDED).json("model.safetensors.index.json", |index| index["weight_map"] = json!(3));
    assert_eq!(copy.message(), "model.safetensors.index.json: weight_map is missing");
    std::fs::write(copy.path("model.safetensors.index.json"), "{\"weight_map\": {").unwrap();
    assert!(matches!(copy.error(), CheckpointError::Malformed { .. }));
}

#[test]
fn shapes_and_types_are_checked() {
    let copy = Copy::of(SINGLE).config("intermediate_size", json!(256));
    assert_eq!(
        copy.message(),
        "model.safetensors: tensor model.layers.0.mlp.gate_proj.weight has shape [128, 64], but config.json makes it \
         [256, 64]"
    );
    let copy = Copy::of(SINGLE).header("model.safetensors", |header| {
        header["model.norm.weight"]["dtype"] = json!("I16");
    });
    assert_eq!(
        copy.message(),
        "model.safetensors: tensor model.norm.weight holds I16; only BF16, F16 and F32 are supported"
    );
}

#[test]
fn truncated_files_are_refused() {
    let whole = std::fs::read(dir(SINGLE).join("model.safetensors")).unwrap();
    for keep in [0, 5, 8, 100, whole.len() / 2, whole.len() - 1] {
        let copy = Copy::of(SINGLE);
        std::fs::write(copy.path("model.safetensors"), &whole[..keep]).unwrap();
        let error = copy.error();
        assert!(matches!(error, CheckpointError::Damaged { .. }), "{keep} bytes: {error}");
        assert!(
            copy.message().starts_with("model.safetensors: truncated or damaged: "),
            "{}",
            copy.message()
        );
    }
}

#[test]
fn a_context_that_the_model_was_not_made_for_is_refused() {
    let open = |positions| {
        let options = OnnxOptions { positions, precision: Precision::F32, ..OnnxOptions::default() };
        OnnxEngine::open(&dir(SINGLE), &options)
    };
    // 512 positions of context, and the one that takes scratch writes.
    assert_eq!(open(513).unwrap().card().context_limit, 512);
    let error = open(514).err().unwrap();
    assert!(matches!(
        error,
        OpenError::Checkpoint(CheckpointError::ContextTooLong { asked: 513, limit: 512, .. })
    ));
    assert!(
        error
            .to_string()
            .ends_with("config.json: a context of 513 tokens was asked for, but the model was made for 512")
    );
}

/// Each in a process of its own, because a library stays loaded.
#[test]
fn a_bad_library_is_an_error_and_no_panic() {
    if let Ok(library) = std::env::var("FOREBAY_TEST_LIBRARY") {
        let options = OnnxOptions { library: Some(library.into()), positions: 100, ..OnnxOptions::default() };
        match OnnxEngine::open(&dir(SINGLE), &options) {
            Err(OpenError::Library(
                error @ (LibraryError::NotFound { .. } | LibraryError::Unusable { .. }),
            )) => {
                println!("{error}");
                assert!(error.to_string().contains("make setup"));
            }
            other => panic!("opened with {:?}", other.err()),
        }
        return;
    }
    let garbage = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(garbage.path(), "no library").unwrap();
    let libm = ["/lib/x86_64-linux-gnu/libm.so.6", "/usr/lib/libm.so.6", "/lib64/libm.so.6"];
    let libm = libm.into_iter().find(|path| Path::new(path).exists()).unwrap_or("/nowhere");
    for library in [garbage.path().to_str().unwrap(), "/nowhere/libonnxruntime.so", libm, "/tmp"] {
        let this = std::env::current_exe().unwrap();
        let child = std::process::Command::new(this)
            .args(["--exact", "a_bad_library_is_an_error_and_no_panic", "--nocapture"])
            .env("FOREBAY_TEST_LIBRARY", library)
            .output()
            .unwrap();
        assert!(child.status.success(), "{library}: {}", String::from_utf8_lossy(&child.stderr));
        assert!(!String::from_utf8_lossy(&child.stderr).contains("panicked"), "{library}");
    }
}
