//! Safetensors files: mapped, with the header checked by the `safetensors` crate.

use super::{super::binding::MappedFile, CheckpointError};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::SafeTensors;
use std::{
    collections::HashMap,
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Element types of weights that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "fp16",
            Dtype::F32 => "fp32",
        })
    }
}

/// A tensor in a mapped file.
#[derive(Clone)]
pub struct WeightTensor {
    file: Arc<MappedFile>,
    range: Range<usize>,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl WeightTensor {
    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Dimensions; matrices are `[out, in]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements, little-endian, row-major.
    pub fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.range.clone()]
    }

    pub(in super::super) fn file(&self) -> &Arc<MappedFile> {
        &self.file
    }

    /// Where in the file the elements are.
    pub(in super::super) fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Lets the system take back the memory that reading the tensor has brought in.
    pub fn release(&self) {
        self.file.release(self.range.clone());
    }

    /// Rows of a matrix; 1 for a vector.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// One row, as fp32, into `out` of the row's length.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let width = self.columns() * self.dtype.bytes();
        let bytes = &self.bytes()[row * width..][..width];
        match self.dtype {
            Dtype::Bf16 => {
                for (out, two) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *out = bf16::from_le_bytes([two[0], two[1]]).to_f32();
                }
            }
            Dtype::F16 => {
                let halves: Vec<f16> =
                    bytes.chunks_exact(2).map(|two| f16::from_le_bytes([two[0], two[1]])).collect();
                halves.convert_to_f32_slice(out);
            }
            Dtype::F32 => {
                for (out, four) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *out = f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
                }
            }
        }
    }

    /// All elements as fp32.
    pub fn to_f32(&self) -> Vec<f32> {
        let columns = self.columns();
        let mut all = vec![0.0; self.rows() * columns];
        for (row, out) in all.chunks_exact_mut(columns).enumerate() {
            self.row(row, out);
        }
        all
    }
}

/// A matrix as the graph multiplies with it.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// In the checkpoint.
    pub tensor: &'a WeightTensor,
    /// What it is multiplied by.
    pub factors: Factors<'a>,
}

/// What a matrix is multiplied by.
#[derive(Clone, Copy)]
pub enum Factors<'a> {
    /// Nothing.
    One,
    /// A number for each row.
    Rows(&'a [f32]),
    /// A number for each column.
    Columns(&'a [f32]),
}

impl<'a> Matrix<'a> {
    /// As it is in the checkpoint.
    pub fn plain(tensor: &'a WeightTensor) -> Matrix<'a> {
        Matrix { tensor, factors: Factors::One }
    }

    /// One row, as fp32, into `out` of the row's length.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        self.tensor.row(row, out);
        match self.factors {
            Factors::One => {}
            Factors::Rows(factors) => out.iter_mut().for_each(|x| *x *= factors[row]),
            Factors::Columns(factors) => out.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor),
        }
    }
}

/// Elements in memory of one's own.
#[derive(Clone, Debug, PartialEq)]
pub(in super::super) enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Elements {
    /// The same numbers, rounded to nearest even.
    pub(in super::super) fn from_f32(values: Vec<f32>, dtype: Dtype) -> Elements {
        match dtype {
            Dtype::F32 => Elements::F32(values),
            Dtype::F16 => Elements::F16(values.into_iter().map(f16::from_f32).collect()),
            Dtype::Bf16 => Elements::Bf16(values.into_iter().map(bf16::from_f32).collect()),
        }
    }
}

/// Matrices of one width, stacked, on `threads` threads.
pub(in super::super) fn stack(matrices: &[Matrix<'_>], dtype: Dtype, threads: usize) -> Elements {
    match dtype {
        Dtype::F32 => Elements::F32(converted(matrices, threads, |x| x)),
        Dtype::F16 => Elements::F16(converted(matrices, threads, f16::from_f32)),
        Dtype::Bf16 => Elements::Bf16(converted(matrices, threads, bf16::from_f32)),
    }
}

fn converted<T: Copy + Default + Send>(
    matrices: &[Matrix<'_>],
    threads: usize,
    convert: impl Fn(f32) -> T + Copy + Send,
) -> Vec<T> {
    let columns = matrices[0].tensor.columns();
    let rows: Vec<(Matrix<'_>, usize)> =
        matrices.iter().flat_map(|matrix| (0..matrix.tensor.rows()).map(move |row| (*matrix, row))).collect();
    let mut all = vec![T::default(); rows.len() * columns];
    let share = rows.len().div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        for (rows, out) in rows.chunks(share).zip(all.chunks_mut(share * columns)) {
            scope.spawn(move || {
                let mut values = vec![0.0; columns];
                for ((matrix, row), out) in rows.iter().zip(out.chunks_exact_mut(columns)) {
                    matrix.row(*row, &mut values);
                    out.iter_mut().zip(&values).for_each(|(out, value)| *out = convert(*value));
                }
            });
        }
    });
    all
}

/// One mapped safetensors file.
pub(super) struct Shard {
    path: PathBuf,
    file: Arc<MappedFile>,
    tensors: HashMap<String, (safetensors::Dtype, Vec<usize>, Range<usize>)>,
    notes: HashMap<String, String>,
}

impl Shard {
    pub(super) fn open(path: PathBuf) -> Result<Shard, CheckpointError> {
        let file = MappedFile::open(&path).map_err(|source| CheckpointError::unreadable(&path, source))?;
        let damaged = |problem: String| CheckpointError::Damaged { file: path.clone(), problem };
        let bytes = file.bytes();
        let (header, metadata) =
            SafeTensors::read_metadata(bytes).map_err(|error| damaged(error.to_string()))?;
        let start = 8 + header;
        let tensors = metadata.tensors().into_iter().map(|(name, info)| {
            let (begin, end) = info.data_offsets;
            (name, (info.dtype, info.shape.clone(), start + begin..start + end))
        });
        let tensors = tensors.collect();
        let notes = metadata.metadata().clone().unwrap_or_default();
        Ok(Shard { file: Arc::new(file), tensors, notes, path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What the file's metadata says.
    pub(super) fn notes(&self) -> &HashMap<String, String> {
        &self.notes
    }

    /// The tensor, if the file has it and it is what the model needs.
    pub(super) fn tensor(
        &self,
        name: &str,
        expected: &[usize],
    ) -> Result<Option<WeightTensor>, CheckpointError> {
        let Some((dtype, shape, range)) = self.tensors.get(name) else { return Ok(None) };
        let (file, tensor) = (self.path.clone(), name.to_owned());
        let dtype = match dtype {
            safetensors::Dtype::BF16 => Dtype::Bf16,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::F32 => Dtype::F32,
            other => return Err(CheckpointError::WrongDtype { file, tensor, found: format!("{other:?}") }),
        };
        if shape != expected {
            let (expected, found) = (expected.to_vec(), shape.clone());
            return Err(CheckpointError::WrongShape { file, tensor, expected, found });
        }
        Ok(Some(WeightTensor { file: self.file.clone(), range: range.clone(), dtype, shape: shape.clone() }))
    }
}
