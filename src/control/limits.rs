//! Rate limits as they change while the process runs: asked for by a client of the control API, or by settings that
//! are read again.
//!
//! May touch: `rate_limit`, `requests`.

use futures_util::future::join_all;
use thiserror::Error;

use crate::config::{LimitSpec, LimitsConfig};
use crate::rate_limit::RateLimits;
use crate::requests::{Request, WorkerHandle};
use crate::time::Clock;

/// Why limits stay as they are.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum LimitsError {
    /// Flows are to be limited where nobody follows them.
    #[error(
        "flows=: on a link this process carries frames and follows no flows; limit rate= and packets=, or start it \
         with --nat packet"
    )]
    NoFlows,
}

/// The limits of a process, to be changed.
#[derive(Clone, Debug)]
pub struct LiveLimits {
    limits: RateLimits,
    workers: Vec<WorkerHandle>,
    clock: Clock,
    follows_flows: bool,
}

impl LiveLimits {
    /// Limits that all `workers` share, whose clock is `clock`. `follows_flows`: whether they know which frame begins
    /// a flow.
    pub fn new(
        limits: RateLimits,
        workers: Vec<WorkerHandle>,
        clock: Clock,
        follows_flows: bool,
    ) -> LiveLimits {
        LiveLimits { limits, workers, clock, follows_flows }
    }

    /// What they are.
    pub fn config(&self) -> LimitsConfig {
        self.limits.config()
    }

    /// Sets what is given; the rest stays. All of it, or nothing.
    ///
    /// # Errors
    /// [`LimitsError`].
    pub fn set(
        &self,
        from_guest: Option<LimitSpec>,
        to_guest: Option<LimitSpec>,
    ) -> Result<LimitsConfig, LimitsError> {
        let known = self.config();
        let wanted = LimitsConfig {
            from_guest: from_guest.unwrap_or(known.from_guest),
            to_guest: to_guest.unwrap_or(known.to_guest),
        };
        if wanted.limits_flows() && !self.follows_flows {
            return Err(LimitsError::NoFlows);
        }
        self.limits.set(self.clock.now(), &wanted);
        self.wake();
        tracing::info!(from_guest = %wanted.from_guest, to_guest = %wanted.to_guest, "rate limits were set");
        Ok(wanted)
    }

    /// Has workers that sleep look at once. Others look with their next batch.
    fn wake(&self) {
        let workers = self.workers.clone();
        tokio::spawn(async move { join_all(workers.iter().map(|worker| worker.ask(Request::Wake))).await });
    }
}
