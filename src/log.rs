//! The log on standard error, whose level can change while the process runs.

use thiserror::Error;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, fmt, reload};

use crate::config::LogConfig;

/// Why the level stays as it is.
#[derive(Debug, Error)]
#[error("the log level stays as it is: {0}")]
pub struct LevelError(String);

/// Changes what is logged from now on.
#[derive(Clone, Debug)]
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

impl LogLevel {
    /// Logs by this filter, such as `info` or `vunet::device=debug`.
    ///
    /// # Errors
    /// [`LevelError`] if it is none.
    pub fn set(&self, level: &str) -> Result<(), LevelError> {
        let filter = EnvFilter::try_new(level).map_err(|error| LevelError(error.to_string()))?;
        self.0.reload(filter).map_err(|error| LevelError(error.to_string()))
    }
}

/// Starts the log of the process.
///
/// # Panics
/// At the second call.
pub fn start(config: &LogConfig) -> LogLevel {
    let (filter, handle) = reload::Layer::new(EnvFilter::new(&config.level));
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = if config.json { lines.json().boxed() } else { lines.boxed() };
    tracing_subscriber::registry().with(filter).with(lines).init();
    LogLevel(handle)
}
