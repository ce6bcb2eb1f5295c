//! A session of the engine's graph, and one run of it.

use super::{KvView, Tensor, check};
use ort::{AsPointer, editor::Model, environment::Environment, session::builder::SessionBuilder, sys};
use std::{
    ffi::CString,
    ptr::{self, NonNull},
};

/// What one run of the graph reads and writes.
pub(in super::super) struct Step<'a> {
    /// `[batch, tokens]`: token ids.
    pub(in super::super) input_ids: &'a Tensor<i64>,
    /// `[batch]`: tokens in each slot after this step, less one.
    pub(in super::super) seqlens_k: &'a Tensor<i32>,
    /// `[1]`: the largest number of tokens in a slot after this step.
    pub(in super::super) total_len: &'a Tensor<i32>,
    /// `[rows, 2]`: (batch, token) of each row whose logits are wanted.
    pub(in super::super) last: &'a Tensor<i64>,
    /// Past KV, and the place of the present.
    pub(in super::super) kv: &'a KvView,
    /// `[rows, vocab]`: written.
    pub(in super::super) logits: &'a mut Tensor<f32>,
}

/// A session, released when dropped.
struct RawSession(NonNull<sys::OrtSession>);

impl Drop for RawSession {
    fn drop(&mut self) {
        // SAFETY: the session was made by the C API and is released once.
        unsafe { (ort::api().ReleaseSession)(self.0.as_ptr()) };
    }
}

/// A session with the names of its inputs and outputs, in the order of [`Step`].
pub(in super::super) struct Program {
    session: RawSession,
    inputs: Vec<CString>,
    outputs: Vec<CString>,
    /// Holds the environment and our operators, which the session calls: dropped after it.
    _options: SessionBuilder,
}

// SAFETY: a session is tied to no thread. Of the options only what is `Send` anyway is left to drop: the environment,
// and operators, which `Operator` wants `Send`.
unsafe impl Send for Program {}

impl Program {
    /// Makes a session that adds `model` to the serialized model `base`. (A session of a [`Model`] alone does not
    /// look at custom operators, and `ort`'s editable session asks for facts that a session has only when it is
    /// complete.)
    pub(in super::super) fn new(
        environment: &Environment,
        options: SessionBuilder,
        base: &[u8],
        model: &Model,
        layers: usize,
    ) -> ort::Result<Program> {
        let editor = ort::editor::editor_api()?;
        let mut session = ptr::null_mut();
        // SAFETY: environment, bytes and options are valid for the call.
        check(unsafe {
            (editor.CreateModelEditorSessionFromArray)(
                environment.ptr(),
                base.as_ptr().cast(),
                base.len(),
                options.ptr(),
                &mut session,
            )
        })?;
        let session = RawSession(NonNull::new(session).expect("a successful call sets its result"));
        // SAFETY: session and model are valid; the model is only read.
        check(unsafe {
            (editor.ApplyModelToModelEditorSession)(session.0.as_ptr(), model.ptr().cast_mut())
        })?;
        // SAFETY: session and options are valid; no container of prepacked weights is allowed to be null.
        check(unsafe {
            (editor.FinalizeModelEditorSession)(session.0.as_ptr(), options.ptr(), ptr::null())
        })?;
        let name = |name: String| CString::new(name).expect("names of the graph hold no NUL");
        let kv = |what: &'static str| {
            (0..layers).flat_map(move |l| [format!("{what}.{l}.k"), format!("{what}.{l}.v")])
        };
        let inputs = ["input_ids", "seqlens_k", "total_len", "last"].map(str::to_owned);
        Ok(Program {
            session,
            inputs: inputs.into_iter().chain(kv("past")).map(name).collect(),
            outputs: ["logits".to_owned()].into_iter().chain(kv("present")).map(name).collect(),
            _options: options,
        })
    }

    /// Runs the graph once, on the calling thread and the session's pool.
    pub(in super::super) fn run(&mut self, step: &mut Step<'_>) -> ort::Result<()> {
        let pointers = |names: &[CString]| names.iter().map(|name| name.as_ptr()).collect::<Vec<_>>();
        let (input_names, output_names) = (pointers(&self.inputs), pointers(&self.outputs));
        let first = [&step.input_ids.value, &step.seqlens_k.value, &step.total_len.value, &step.last.value];
        let inputs = first.into_iter().chain(&step.kv.values).map(|value| value.0.as_ptr().cast_const());
        let inputs: Vec<_> = inputs.collect();
        let outputs = [&step.logits.value].into_iter().chain(&step.kv.values).map(|value| value.0.as_ptr());
        let mut outputs: Vec<_> = outputs.collect();
        assert!(
            inputs.len() == input_names.len() && outputs.len() == output_names.len(),
            "a view of another model"
        );
        // SAFETY: names and values are valid for the call and of equal number. The inputs are borrowed, the logits
        // borrowed exclusively, the KV reachable only by raw pointers; past and present may share memory because
        // GroupQueryAttention then appends in place. `&mut self` keeps runs of one session apart.
        check(unsafe {
            (ort::api().Run)(
                self.session.0.as_ptr(),
                ptr::null(),
                input_names.as_ptr(),
                inputs.as_ptr(),
                inputs.len(),
                output_names.as_ptr(),
                output_names.len(),
                outputs.as_mut_ptr(),
            )
        })
    }
}
