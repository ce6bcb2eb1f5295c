//! What a GPU can multiply at best, by the library that the engine multiplies with.

use super::super::{
    binding::{add_owned, with_cuda},
    library,
    onnx::OpenError,
};
use forebay_kernels::cuda::Device;
use half::bf16;
use ort::{
    editor::{Graph, Model, Node, ONNX_DOMAIN, Opset},
    session::{Session, builder::GraphOptimizationLevel},
    value::{Outlet, Shape, SymbolicDimensions, Tensor, TensorElementType, ValueType},
};
use std::time::Instant;

/// Rows and columns.
const SIZE: usize = 8192;

/// Products of a short run and of a long one; what else a run takes is in both.
const PRODUCTS: [usize; 2] = [2, 12];

/// Runs of each, of which the fastest counts.
const RUNS: usize = 5;

/// Multiplications and additions a second of products of large square matrices in bf16.
pub fn matmul_rate(ordinal: usize) -> Result<f64, OpenError> {
    let device = Device::open(ordinal)?;
    let [short, long] = PRODUCTS.map(|products| seconds(&device, products));
    let products = (PRODUCTS[1] - PRODUCTS[0]) as f64;
    Ok(2.0 * (SIZE as f64).powi(3) * products / (long? - short?))
}

/// Seconds of the fastest run of a chain of products.
fn seconds(device: &Device, products: usize) -> Result<f64, OpenError> {
    let environment = library::load_cuda(None)?;
    let stream = device.stream()?;
    let builder = Session::builder(&environment)
        .and_then(|builder| Ok(builder.with_optimization_level(GraphOptimizationLevel::Disable)?))?;
    let ordinal = device.facts().ordinal.to_string();
    let builder = with_cuda(builder, &stream, &[("device_id", &ordinal)])?;
    let mut session = model(products)?.into_session(&builder)?;
    let mut fastest = f64::INFINITY;
    for _ in 0..RUNS {
        let one = Tensor::from_array(([1usize], vec![1.0f32]))?;
        let begun = Instant::now();
        session.run(ort::inputs![one])?;
        fastest = fastest.min(begun.elapsed().as_secs_f64());
    }
    Ok(fastest)
}

/// y = the first row of x · factor · w · w · …, of which only a row leaves the GPU.
fn model(products: usize) -> ort::Result<Model> {
    let mut graph = Graph::new()?;
    let outlet = |name: &str, element, shape: &[i64]| {
        let dimension_symbols = SymbolicDimensions::new(shape.iter().map(|_| String::new()));
        let ty =
            ValueType::Tensor { ty: element, shape: Shape::new(shape.iter().copied()), dimension_symbols };
        Outlet::new(name, ty)
    };
    graph.set_inputs([outlet("factor", TensorElementType::Float32, &[1])])?;
    graph.set_outputs([outlet("y", TensorElementType::Float32, &[1, SIZE as i64])])?;
    let shape = [SIZE as i64; 2];
    // Of no meaning, but not all alike: a GPU is faster on zeros.
    let numbers = |scale: f32| -> Vec<bf16> {
        let number = |at: usize| (at.wrapping_mul(2_654_435_761) >> 8 & 0xff) as f32 / 128.0 - 1.0;
        (0..SIZE * SIZE).map(|at| bf16::from_f32(number(at) * scale)).collect()
    };
    add_owned(&mut graph, "x0", numbers(1.0), &shape)?;
    add_owned(&mut graph, "w", numbers(0.02), &shape)?;
    add_owned(&mut graph, "first", vec![0i64], &[1])?;
    let mut number = 0;
    let mut node = |graph: &mut Graph, operator: &str, inputs: &[&str], output: &str, cast: Option<i64>| {
        number += 1;
        let attributes: Vec<_> =
            cast.map(|to| ort::operator::Attribute::new("to", to)).transpose()?.into_iter().collect();
        graph.add_node(Node::new(operator, ONNX_DOMAIN, format!("{number}"), inputs, [output], attributes)?)
    };
    node(&mut graph, "Cast", &["factor"], "factor.bf16", Some(16))?;
    node(&mut graph, "Mul", &["x0", "factor.bf16"], "x1", None)?;
    for product in 1..=products {
        node(&mut graph, "MatMul", &[&format!("x{product}"), "w"], &format!("x{}", product + 1), None)?;
    }
    node(&mut graph, "Gather", &[&format!("x{}", products + 1), "first"], "row", None)?;
    node(&mut graph, "Cast", &["row"], "y", Some(1))?;
    let mut model = Model::new([Opset::new(ONNX_DOMAIN, 22)?])?;
    model.set_graph(graph)?;
    Ok(model)
}
