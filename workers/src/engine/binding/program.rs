//! A session of the engine's graph, and one run of it.

use super::{AsValue, KvView, check};
use ort::{AsPointer, editor::Model, environment::Environment, session::builder::SessionBuilder, sys};
use std::{
    ffi::CString,
    ptr::{self, NonNull},
};

/// What one run of the graph reads and writes.
pub(in super::super) struct Step<'a> {
    /// `[batch, tokens]` i64: token ids.
    pub(in super::super) input_ids: &'a dyn AsValue,
    /// `[batch]` i32: tokens in each slot after this step, less one.
    pub(in super::super) seqlens_k: &'a dyn AsValue,
    /// `[1]` i32: the largest number of tokens in a slot after this step.
    pub(in super::super) total_len: &'a dyn AsValue,
    /// `[rows]` i64: which of the batch's tokens, counted through, have their logits wanted.
    pub(in super::super) last: &'a dyn AsValue,
    /// Past KV, and the place of the present.
    pub(in super::super) kv: &'a KvView,
    /// `[rows, vocab]` f32: written.
    pub(in super::super) logits: &'a mut dyn AsValue,
}

/// How a graph is run, released when dropped.
pub(in super::super) struct RunOptions(NonNull<sys::OrtRunOptions>);

// SAFETY: the options are only read once they are made.
unsafe impl Send for RunOptions {}

impl RunOptions {
    /// Options by name.
    pub(in super::super) fn new(entries: &[(&str, &str)]) -> ort::Result<RunOptions> {
        let mut options = ptr::null_mut();
        // SAFETY: the out-pointer is valid.
        check(unsafe { (ort::api().CreateRunOptions)(&mut options) })?;
        let options = RunOptions(NonNull::new(options).expect("a successful call sets its result"));
        for (key, value) in entries {
            let [key, value] = [key, value].map(|text| CString::new(*text).expect("options hold no NUL"));
            // SAFETY: the options are valid, and both strings for the call.
            check(unsafe {
                (ort::api().AddRunConfigEntry)(options.0.as_ptr(), key.as_ptr(), value.as_ptr())
            })?;
        }
        Ok(options)
    }
}

impl Drop for RunOptions {
    fn drop(&mut self) {
        // SAFETY: the options were made by the C API and are released once.
        unsafe { (ort::api().ReleaseRunOptions)(self.0.as_ptr()) };
    }
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
    pub(in super::super) fn run(
        &mut self,
        step: &mut Step<'_>,
        options: Option<&RunOptions>,
    ) -> ort::Result<()> {
        let pointers = |names: &[CString]| names.iter().map(|name| name.as_ptr()).collect::<Vec<_>>();
        let (input_names, output_names) = (pointers(&self.inputs), pointers(&self.outputs));
        let first = [step.input_ids, step.seqlens_k, step.total_len, step.last];
        let inputs = first
            .map(AsValue::value)
            .into_iter()
            .chain(&step.kv.values)
            .map(|value| value.0.as_ptr().cast_const());
        let inputs: Vec<_> = inputs.collect();
        let outputs = [step.logits.value()].into_iter().chain(&step.kv.values).map(|value| value.0.as_ptr());
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
                options.map_or(ptr::null(), |options| options.0.as_ptr().cast_const()),
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
