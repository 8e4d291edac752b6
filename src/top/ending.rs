//! Signals that end the process: the terminal is given back first.
//!
//! They are met on a thread of their own. Who looks at keys may never come back from there: where the terminal is gone, its
//! library reads the end of the file again and again.

use std::io;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

/// How long the loop of keys has to see that the end was asked for.
const PATIENCE: Duration = Duration::from_millis(500);

/// Whether a signal asked for the end.
#[derive(Debug)]
pub(super) struct Ending(Arc<AtomicBool>);

impl Ending {
    /// Watches from now on. The process ends with code 0 soon after a signal, whatever it does.
    ///
    /// # Errors
    /// No descriptor, or no thread.
    pub(super) fn watch() -> io::Result<Ending> {
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM])?;
        let asked = Arc::new(AtomicBool::new(false));
        let ending = Ending(Arc::clone(&asked));
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            if signals.forever().next().is_some() {
                asked.store(true, Ordering::Release);
                thread::sleep(PATIENCE);
                // Fails if the terminal is gone.
                let _ = ratatui::try_restore();
                process::exit(0);
            }
        })?;
        Ok(ending)
    }

    pub(super) fn is_asked(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
