//! Ctrl-C and friends: the first asks for a good end, the second for a quick one.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub struct Signals {
    /// Finish what is in hand, checkpoint, end.
    pub drain: CancellationToken,
    /// End now; the journal holds what is needed to go on.
    pub quick: CancellationToken,
}

impl Signals {
    /// Listens for SIGINT and SIGTERM until the process ends. Must be called inside the runtime.
    ///
    /// # Errors
    /// If the handlers cannot be installed.
    pub fn listen() -> std::io::Result<Self> {
        let signals = Self::default();
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let told = signals.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if told.drain.is_cancelled() {
                    told.quick.cancel();
                } else {
                    told.drain.cancel();
                }
            }
        });
        Ok(signals)
    }
}
