//! The engine's thread: schedule → run → hand out, for as long as there is work.
//!
//! One engine has one thread, because ONNX Runtime sessions and CUDA graphs want one. Everybody else talks to
//! it through a [`Runner`]: sequences go in, tokens come out on a bounded channel for each. In a simulation the same
//! loop is a task, whose steps take virtual time.

use crate::{
    engine::{Engine, EngineCard, EngineError, KvMover, Row, Sampled, onnx::OpenError},
    scheduler::{Budget, Chunk, Scheduler, Sequence, Step},
};
use forebay_kernels::Region;
use forebay_streams::environment;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

/// Tokens that wait for one reader. A sequence whose reader is further behind pauses.
const OUTPUT_MAX: usize = 64;

/// What one step of a sequence can bring: filled positions, a token, and that it failed.
const STEP_OUTPUTS_MAX: usize = 3;

/// Commands that wait for the engine's thread.
const COMMANDS_MAX: usize = 1024;

/// How often the engine looks whether a reader has caught up, when there is nothing else to do.
const READER_POLL: Duration = Duration::from_micros(200);

/// How often a sequence that waits for memory tries again although none was given back here.
const STARVED_POLL: Duration = Duration::from_millis(100);

/// How long an engine may take to end.
const STOP_MAX: Duration = Duration::from_secs(5);

/// What a sequence brings.
#[derive(Debug)]
pub enum Output {
    /// KV of all positions below this is in the slot (said at the end of each chunk of a prompt).
    Filled(u32),
    /// The next token.
    Token(Sampled),
    /// The sequence can't go on.
    Failed(EngineError),
}

enum Command {
    Add(Sequence, mpsc::Sender<Output>),
    Remove(u32, oneshot::Sender<Option<Sequence>>),
    Park(u32, u32, oneshot::Sender<bool>),
    Free(u32, oneshot::Sender<()>),
    Answer(oneshot::Sender<()>),
    Stop(oneshot::Sender<()>),
    Budget(Budget),
}

/// A handle on the engine's thread, which ends when the last handle is dropped.
#[derive(Clone)]
pub struct Runner {
    commands: mpsc::Sender<Command>,
    card: Arc<EngineCard>,
    kv: Arc<Region>,
    mover: Option<Arc<dyn KvMover>>,
    load: Arc<Load>,
    /// Why the engine did not start.
    failed: Arc<Mutex<Option<OpenError>>>,
}

/// What the engine has to do and to hold, as its last step left it.
#[derive(Debug, Default)]
struct Load {
    active_tokens: AtomicU32,
    prefill_tokens: AtomicU32,
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It could not warm up.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It panicked.
    #[error(transparent)]
    Stopped(#[from] EngineStopped),
}

/// The engine's thread is gone: the engine panicked, and the worker must end.
#[derive(Debug, thiserror::Error)]
#[error("the engine has stopped")]
pub struct EngineStopped;

impl Runner {
    /// Starts the thread.
    pub fn start(engine: Box<dyn Engine>, budget: Budget) -> Runner {
        let card = Arc::new(engine.card().clone());
        let (kv, mover) = (engine.kv().clone(), engine.mover());
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let scheduler = Scheduler::new(card.layout.slots, budget);
        let load = Arc::<Load>::default();
        let mut engine = EngineLoop {
            engine,
            scheduler,
            outputs: BTreeMap::new(),
            inbox,
            drawn: Vec::new(),
            starving: BTreeSet::new(),
            starved: Instant::now(),
            stopping: None,
            load: load.clone(),
        };
        let failed = Arc::<Mutex<Option<OpenError>>>::default();
        let why = failed.clone();
        if environment::is_simulated() {
            environment::spawn(engine.simulate());
        } else {
            let thread = std::thread::Builder::new().name("engine".into());
            let run = move || match engine.engine.warm_up() {
                Ok(()) => engine.run(),
                Err(error) => *why.lock().unwrap_or_else(PoisonError::into_inner) = Some(error),
            };
            thread.spawn(run).expect("a thread can be started");
        }
        Runner { commands, card, kv, mover, load, failed }
    }

    /// Resolves once the engine is ready for its first step.
    pub async fn started(&self) -> Result<(), StartError> {
        self.answers().await;
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        match failed {
            Some(error) => Err(error.into()),
            None if self.commands.is_closed() => Err(EngineStopped.into()),
            None => Ok(()),
        }
    }

    /// Facts about the model.
    pub fn card(&self) -> &Arc<EngineCard> {
        &self.card
    }

    /// The KV region.
    pub fn kv(&self) -> &Arc<Region> {
        &self.kv
    }

    /// What copies KV between the region and where the engine computes, if these are two.
    pub fn mover(&self) -> Option<&Arc<dyn KvMover>> {
        self.mover.as_ref()
    }

    /// Tokens whose KV the running sequences hold.
    pub fn active_tokens(&self) -> u32 {
        self.load.active_tokens.load(Ordering::Relaxed)
    }

    /// Tokens of prompts that are still to be run.
    pub fn prefill_tokens(&self) -> u32 {
        self.load.prefill_tokens.load(Ordering::Relaxed)
    }

    /// Resolves when the thread is gone: the engine panicked.
    pub async fn stopped(&self) {
        self.commands.closed().await;
    }

    /// Resolves once the engine has finished the step that runs.
    pub async fn answers(&self) {
        let (done, wait) = oneshot::channel();
        if self.commands.send(Command::Answer(done)).await.is_ok() {
            let _ = wait.await;
        }
    }

    /// Ends the engine, and resolves once it is gone, or takes too long: what it holds of a GPU must not go while the process ends.
    pub async fn stop(&self) {
        let (done, wait) = oneshot::channel();
        if self.commands.send(Command::Stop(done)).await.is_ok() {
            let _ = tokio::time::timeout(STOP_MAX, wait).await;
        }
    }

    /// Another budget, from the next step on.
    pub async fn set_budget(&self, budget: Budget) {
        let _ = self.commands.send(Command::Budget(budget)).await;
    }

    /// Runs a sequence. Its outputs end when it has drawn its last token or was removed.
    pub async fn add(&self, sequence: Sequence) -> Result<mpsc::Receiver<Output>, EngineStopped> {
        let (sender, receiver) = mpsc::channel(OUTPUT_MAX);
        self.commands.send(Command::Add(sequence, sender)).await.map_err(|_| EngineStopped)?;
        Ok(receiver)
    }

    /// Takes a sequence out, if it still runs, and returns how far it is. When this returns, the engine no longer
    /// touches the slot but for scratch writes at its parked position, and all that was drawn is in the channel.
    pub async fn remove(&self, slot: u32) -> Option<Sequence> {
        let (done, wait) = oneshot::channel();
        self.commands.send(Command::Remove(slot, done)).await.ok()?;
        wait.await.ok().flatten()
    }

    /// Tells where scratch writes to an unused slot may go: see [`Scheduler::park`]. When this returns, no step that
    /// runs or follows writes where they went before. Returns whether there is memory for the positions before.
    pub async fn park(&self, slot: u32, positions: u32) -> bool {
        let (done, wait) = oneshot::channel();
        if self.commands.send(Command::Park(slot, positions, done)).await.is_err() {
            return false;
        }
        wait.await.unwrap_or(false)
    }

    /// Nobody needs the KV of an unused slot any more.
    pub async fn free(&self, slot: u32) {
        let (done, wait) = oneshot::channel();
        if self.commands.send(Command::Free(slot, done)).await.is_ok() {
            let _ = wait.await;
        }
    }
}

/// What the engine does next.
enum Turn {
    Step(Step),
    /// Nothing, until a reader has caught up.
    Behind,
    /// Nothing, until a command comes.
    Idle,
    /// Nothing any more.
    Over,
}

struct EngineLoop {
    engine: Box<dyn Engine>,
    scheduler: Scheduler,
    outputs: BTreeMap<u32, mpsc::Sender<Output>>,
    inbox: mpsc::Receiver<Command>,
    drawn: Vec<Sampled>,
    /// Slots whose sequences wait for memory.
    starving: BTreeSet<u32>,
    /// When they were last let try.
    starved: Instant,
    /// Who waits for the end.
    stopping: Option<oneshot::Sender<()>>,
    load: Arc<Load>,
}

impl EngineLoop {
    fn run(mut self) {
        loop {
            match self.turn() {
                Turn::Step(step) => {
                    step.chunks.iter().for_each(|chunk| self.run_chunk(chunk));
                    self.run_rows(&step.rows);
                }
                Turn::Behind => std::thread::sleep(READER_POLL),
                Turn::Over => return self.end(),
                Turn::Idle => match self.inbox.blocking_recv() {
                    Some(command) => self.obey(command),
                    None => return,
                },
            }
        }
    }

    /// The same in virtual time, which passes before a step has its effect.
    async fn simulate(mut self) {
        loop {
            match self.turn() {
                Turn::Step(step) => {
                    for chunk in &step.chunks {
                        tokio::time::sleep(self.engine.simulated_step(chunk.count, 0)).await;
                        self.run_chunk(chunk);
                    }
                    tokio::time::sleep(self.engine.simulated_step(0, step.rows.len() as u32)).await;
                    self.run_rows(&step.rows);
                }
                Turn::Behind => tokio::time::sleep(READER_POLL).await,
                Turn::Over => return self.end(),
                Turn::Idle => match self.inbox.recv().await {
                    Some(command) => self.obey(command),
                    None => return,
                },
            }
        }
    }

    fn end(mut self) {
        let stopping = self.stopping.take();
        drop(self);
        // Nobody may wait for it any more.
        stopping.map(|done| done.send(()));
    }

    /// Obeys what there is to obey, and says what comes next.
    fn turn(&mut self) -> Turn {
        while let Ok(command) = self.inbox.try_recv() {
            self.obey(command);
        }
        if self.stopping.is_some() {
            return Turn::Over;
        }
        self.load.active_tokens.store(self.scheduler.tokens(), Ordering::Relaxed);
        self.load.prefill_tokens.store(self.scheduler.prompt_tokens(), Ordering::Relaxed);
        let is_read =
            |slot| self.outputs.get(&slot).is_some_and(|output| output.capacity() >= STEP_OUTPUTS_MAX);
        let can_take = |slot| !self.starving.contains(&slot) && is_read(slot);
        let step = self.scheduler.plan(can_take);
        if step != Step::default() {
            return Turn::Step(step);
        }
        if self.scheduler.is_idle() {
            return Turn::Idle;
        }
        if !self.starving.is_empty() && self.starved.elapsed() > STARVED_POLL {
            // Memory may have come from elsewhere.
            self.starved = Instant::now();
            self.starving.clear();
        }
        self.drop_unread();
        Turn::Behind
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Add(sequence, output) => {
                self.outputs.insert(sequence.slot, output);
                self.scheduler.add(sequence);
            }
            Command::Remove(slot, done) => {
                let sequence = self.leave(slot);
                let _ = done.send(sequence);
            }
            Command::Answer(done) => drop(done.send(())),
            Command::Stop(done) => self.stopping = Some(done),
            Command::Budget(budget) => self.scheduler.set_budget(budget),
            // Commands are obeyed between steps: whoever waits knows that the next step goes by it.
            Command::Park(slot, positions, done) => {
                self.scheduler.park(slot, positions);
                let _ = done.send(self.engine.reserve(slot, positions).is_ok());
            }
            Command::Free(slot, done) => {
                self.scheduler.park(slot, 0);
                self.engine.release(slot);
                self.starving.clear();
                let _ = done.send(());
            }
        }
    }

    /// Has memory for the first positions of a sequence's slot. If there is none, sequences give theirs back, those that came
    /// last first, and are run again from their beginning when there is; if that is this one itself, it waits.
    fn make_room(&mut self, slot: u32, positions: u32) -> bool {
        loop {
            match self.engine.reserve(slot, positions) {
                Ok(()) => return true,
                Err(EngineError::KvFull { .. }) => {}
                Err(error) => {
                    self.fail(slot, error);
                    return false;
                }
            }
            // One that is being copied keeps its memory until that is done.
            let last = self.scheduler.latest(slot, |other| !self.engine.is_copied(other));
            self.starving.insert(last);
            if last == slot && self.engine.is_copied(slot) {
                return false;
            }
            if self.scheduler.sequence(last).is_some_and(|sequence| sequence.filled > 0) {
                tracing::info!(slot, preempted = last, "no memory for more KV");
            }
            self.scheduler.preempt(last);
            self.engine.release(last);
            if last == slot {
                return false;
            }
        }
    }

    fn leave(&mut self, slot: u32) -> Option<Sequence> {
        self.starving.remove(&slot);
        self.outputs.remove(&slot);
        self.scheduler.remove(slot)
    }

    /// Sequences that nobody reads any more leave.
    fn drop_unread(&mut self) {
        let unread: Vec<u32> =
            self.outputs.iter().filter(|(_, out)| out.is_closed()).map(|(slot, _)| *slot).collect();
        unread.into_iter().for_each(|slot| drop(self.leave(slot)));
    }

    fn run_chunk(&mut self, chunk: &Chunk) {
        let end = chunk.start + chunk.count;
        // A sequence that was preempted begins anew in another step.
        let is_there = |of: &Scheduler| of.sequence(chunk.slot).is_some_and(|now| now.filled == chunk.start);
        if !is_there(&self.scheduler) || !self.make_room(chunk.slot, end) {
            return;
        }
        let Some(sequence) = self.scheduler.sequence(chunk.slot) else { return };
        let tokens = &sequence.tokens[chunk.start as usize..end as usize];
        let draw = chunk.last.then(|| sequence.draw());
        match self.engine.prefill(chunk.slot, chunk.start, tokens, draw) {
            Ok(sampled) => {
                self.scheduler.filled(chunk);
                self.send(chunk.slot, Output::Filled(end));
                if let Some(sampled) = sampled {
                    self.hand_out(chunk.slot, sampled);
                }
            }
            Err(error) => self.fail(chunk.slot, error),
        }
    }

    fn run_rows(&mut self, slots: &[u32]) {
        let mut roomy = BTreeSet::new();
        for slot in slots {
            let position = self.scheduler.decodes(*slot);
            if position.is_some_and(|position| self.make_room(*slot, position + 1)) {
                roomy.insert(*slot);
            }
        }
        let row = |slot: &u32| {
            // One that had room may have given it to a later one of these.
            self.scheduler.decodes(*slot).filter(|_| roomy.contains(slot))?;
            let sequence = self.scheduler.sequence(*slot)?;
            Some(Row {
                slot: *slot,
                position: sequence.filled,
                token: *sequence.tokens.last()?,
                draw: sequence.draw(),
            })
        };
        let rows: Vec<Row<'_>> = slots.iter().filter_map(row).collect();
        if rows.is_empty() {
            return;
        }
        let slots: Vec<u32> = rows.iter().map(|row| row.slot).collect();
        let mut drawn = std::mem::take(&mut self.drawn);
        let outcome = self.engine.decode(&rows, self.scheduler.parked(), &mut drawn);
        drop(rows);
        match outcome {
            Ok(()) => {
                for (slot, sampled) in slots.into_iter().zip(drawn.drain(..)) {
                    self.scheduler.stepped(slot);
                    self.hand_out(slot, sampled);
                }
            }
            Err(error) => self.fail_rows(&slots, error),
        }
        self.drawn = drawn;
    }

    /// An error of one slot ends that slot's sequence, one of the runtime ends all that took part.
    fn fail_rows(&mut self, slots: &[u32], error: EngineError) {
        if let Some(slot) = slot_of(&error) {
            return self.fail(slot, error);
        }
        let text = error.to_string();
        slots.iter().for_each(|slot| self.fail(*slot, EngineError::Runtime(text.clone())));
    }

    fn hand_out(&mut self, slot: u32, sampled: Sampled) {
        let drawn = self.scheduler.drawn(slot, sampled.token);
        self.send(slot, Output::Token(sampled));
        match drawn {
            Ok(true) => {}
            Ok(false) => drop(self.outputs.remove(&slot)),
            Err(error) => self.fail(slot, EngineError::OutOfFormat { slot, error }),
        }
    }

    fn fail(&mut self, slot: u32, error: EngineError) {
        tracing::warn!(slot, %error, "a sequence failed");
        self.send(slot, Output::Failed(error));
        self.leave(slot);
    }

    /// `plan` only runs sequences whose channel has room for what one step can bring.
    fn send(&mut self, slot: u32, output: Output) {
        if let Some(sender) = self.outputs.get(&slot)
            && sender.try_send(output).is_err()
        {
            self.leave(slot);
        }
    }
}

/// The one slot that an error concerns, if it does not concern the whole engine.
fn slot_of(error: &EngineError) -> Option<u32> {
    match error {
        EngineError::ContextFull { slot, .. }
        | EngineError::UnknownToken { slot, .. }
        | EngineError::NotFinite { slot, .. }
        | EngineError::KvFull { slot }
        | EngineError::KvGone { slot }
        | EngineError::OutOfFormat { slot, .. }
        | EngineError::DamagedKv { slot, .. } => Some(*slot),
        EngineError::Runtime(_) => None,
    }
}
