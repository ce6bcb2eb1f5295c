//! Random checkpoints in Hugging Face's format, for measuring without a download. Their text is noise; their speed,
//! memory and numerics are those of a model of the shape.

use std::{
    fs::File,
    io::{BufWriter, Result, Write},
    path::Path,
};

use super::checkpoint::{ModelConfig, tensors_of};

impl ModelConfig {
    /// The shape of Qwen3-0.6B.
    pub fn qwen3_0_6b() -> ModelConfig {
        ModelConfig {
            hidden: 1024,
            layers: 28,
            heads: 16,
            kv_heads: 8,
            head_dim: 128,
            intermediate: 3072,
            vocab: 151_936,
            positions_max: 40_960,
            rope_theta: 1e6,
            norm_epsilon: 1e-6,
            tied: true,
        }
    }

    /// The shape of Qwen3-8B.
    pub fn qwen3_8b() -> ModelConfig {
        ModelConfig {
            hidden: 4096,
            layers: 36,
            heads: 32,
            intermediate: 12_288,
            tied: false,
            ..ModelConfig::qwen3_0_6b()
        }
    }
}

/// Writes `config.json` and a bf16 `model.safetensors` of that shape into a directory, which is made if need be.
/// The same seed gives the same bytes. Returns the bytes of the weights.
pub fn write(dir: &Path, config: &ModelConfig, seed: u64) -> Result<u64> {
    std::fs::create_dir_all(dir)?;
    std::fs::write(dir.join("config.json"), config_json(config))?;
    // Written under another name first, so that an interrupted run leaves no checkpoint that looks whole.
    let partial = dir.join("model.safetensors.partial");
    let bytes = write_weights(BufWriter::with_capacity(1 << 20, File::create(&partial)?), config, seed)?;
    std::fs::rename(partial, dir.join("model.safetensors"))?;
    Ok(bytes)
}

fn config_json(config: &ModelConfig) -> String {
    let json = serde_json::json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.positions_max,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    });
    format!("{json:#}\n")
}

fn write_weights(mut file: impl Write, config: &ModelConfig, seed: u64) -> Result<u64> {
    let tensors = tensors_of(config);
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in &tensors {
        let start = end;
        end += shape.iter().product::<usize>() * 2;
        header.insert(
            name.clone(),
            serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}),
        );
    }
    let mut header = serde_json::Value::Object(header).to_string();
    // Padded so that the tensors are aligned in the mapped file.
    header.push_str(&" ".repeat(header.len().next_multiple_of(64) - header.len() + 56));
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut state = seed;
    let mut chunk = Vec::with_capacity(1 << 16);
    for (_, shape) in &tensors {
        let mut left = shape.iter().product::<usize>();
        while left > 0 {
            chunk.clear();
            for _ in 0..left.min(chunk.capacity() / 8) {
                let four = match shape[..] {
                    [_] => u64::from_le_bytes([0x80, 0x3f, 0x80, 0x3f, 0x80, 0x3f, 0x80, 0x3f]), // 1.0: norms
                    _ => four_weights(&mut state),
                };
                chunk.extend_from_slice(&four.to_le_bytes());
            }
            let bytes = chunk.len().min(left * 2);
            file.write_all(&chunk[..bytes])?;
            left -= bytes / 2;
        }
    }
    file.flush()?;
    Ok(end as u64)
}

/// Four bf16 of random sign and mantissa and an exponent of 2⁻⁷ to 2⁻⁴: of standard deviation about 0.03, much as
/// trained weights.
fn four_weights(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    const SIGN_AND_LOW_BITS: u64 = 0x81ff_81ff_81ff_81ff;
    // Exponent fields 120 to 123: 0x3c00 with the two low bits of the exponent free.
    (z & SIGN_AND_LOW_BITS) | 0x3c00_3c00_3c00_3c00
}

#[cfg(test)]
mod tests {
    use super::super::checkpoint::Checkpoint;
    use super::*;

    #[test]
    fn what_is_written_opens_and_is_spread_like_weights() {
        let config =
            ModelConfig { hidden: 64, layers: 2, intermediate: 96, vocab: 100, ..ModelConfig::qwen3_0_6b() };
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &config, 1).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.config(), &config);
        let values = checkpoint.tensor("model.layers.1.mlp.up_proj.weight").to_f32();
        let (mean, square) = values.iter().fold((0.0, 0.0), |(m, s), x| (m + x, s + x * x));
        let (mean, deviation) = (mean / values.len() as f32, (square / values.len() as f32).sqrt());
        assert!(mean.abs() < 0.002 && (0.015..0.06).contains(&deviation), "{mean} ± {deviation}");
        assert!(checkpoint.tensor("model.norm.weight").to_f32().iter().all(|x| *x == 1.0));
    }
}
