//! The engine on its own thread. It talks to the async side over bounded channels only: when finished samples are not
//! taken, it waits, and so nothing piles up.

use std::sync::{Arc, Mutex, PoisonError};

use freewheel_types::PolicyVersion;

use crate::ActorError;
use crate::engine::{Backend, Engine, EngineStats, Finished, Request};

/// What the async side may ask of the engine. It ends when every sender is gone.
pub(super) enum Command<W> {
    /// Take in a request.
    Submit(Request),
    /// Use new weights.
    Swap(Arc<W>),
}

/// What the engine tells.
pub(super) enum Event {
    /// Samples that are over.
    Finished(Vec<Finished>),
    /// A request that can never run.
    Refused { request: u64, error: ActorError },
}

/// Counters of the engine as of its last step.
#[derive(Clone, Default)]
pub(super) struct Gauge(Arc<Mutex<(EngineStats, Option<PolicyVersion>)>>);

impl Gauge {
    pub(super) fn read(&self) -> (EngineStats, Option<PolicyVersion>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, stats: EngineStats, version: PolicyVersion) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (stats, Some(version));
    }
}

/// The engine's ends of its channels.
pub(super) struct Wires<W> {
    pub(super) commands: flume::Receiver<Command<W>>,
    pub(super) events: flume::Sender<Event>,
    /// Weights no longer used, to be filled again; dropped if nobody takes them.
    pub(super) retired: flume::Sender<Arc<W>>,
    pub(super) gauge: Gauge,
}

/// Steps `engine` until the async side hangs up.
pub(super) fn drive<B: Backend>(mut engine: Engine<B>, wires: &Wires<B::Weights>) {
    loop {
        wires.gauge.write(engine.stats(), engine.version());
        if engine.is_idle() {
            let Ok(command) = wires.commands.recv() else { return };
            if !obey(&mut engine, command, wires) {
                return;
            }
        }
        loop {
            match wires.commands.try_recv() {
                Ok(command) => {
                    if !obey(&mut engine, command, wires) {
                        return;
                    }
                }
                Err(flume::TryRecvError::Empty) => break,
                Err(flume::TryRecvError::Disconnected) => return,
            }
        }
        let finished = engine.step();
        engine.take_retired().into_iter().for_each(|weights| drop(wires.retired.try_send(weights)));
        if !finished.is_empty() && wires.events.send(Event::Finished(finished)).is_err() {
            return;
        }
    }
}

fn obey<B: Backend>(engine: &mut Engine<B>, command: Command<B::Weights>, wires: &Wires<B::Weights>) -> bool {
    match command {
        Command::Swap(weights) => engine.swap(weights),
        Command::Submit(request) => {
            let id = request.id;
            if let Err(error) = engine.submit(request) {
                return wires.events.send(Event::Refused { request: id, error }).is_ok();
            }
        }
    }
    true
}
