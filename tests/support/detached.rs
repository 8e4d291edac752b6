//! A fake socket on its way between workers. Dropped there it is lost, and its world closes it: what
//! travels must be `Send`, so it cannot do that itself.

use std::sync::{Arc, Mutex};

/// Numbers of the sockets that were dropped on their way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lost(Arc<Mutex<Vec<usize>>>);

impl Lost {
    /// Those since the last call.
    pub(crate) fn take(&self) -> Vec<usize> {
        std::mem::take(&mut self.0.lock().expect("nobody panics with it"))
    }
}

/// The socket of number `at`.
#[derive(Debug)]
pub(crate) struct Detached {
    at: usize,
    lost: Option<Lost>,
}

impl Detached {
    pub(crate) fn new(at: usize, lost: &Lost) -> Detached {
        Detached { at, lost: Some(lost.clone()) }
    }

    /// It arrived.
    pub(crate) fn arrived(mut self) -> usize {
        self.lost = None;
        self.at
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        if let Some(lost) = &self.lost {
            lost.0.lock().expect("nobody panics with it").push(self.at);
        }
    }
}
