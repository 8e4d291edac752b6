//! The log on standard error: its level changes while the process runs, and warnings are events too.

use std::fmt::{self, Write as _};
use std::io::IsTerminal as _;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Level, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::config::LogConfig;
use crate::control::events::{Event, Events};

/// The log that was started.
#[derive(Clone, Debug)]
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    /// Where warnings and errors are told as well.
    pub events: Events,
}

/// Why a level is refused.
#[derive(Debug, thiserror::Error)]
pub enum LevelError {
    /// It is none.
    #[error(
        "{0:?} is no log level: off, error, warn, info, debug or trace, or MODULE=LEVEL, joined by commas"
    )]
    Value(String),
    /// The log is gone.
    #[error("the log cannot be changed")]
    Gone(#[from] reload::Error),
}

impl Log {
    /// Starts the process's log.
    ///
    /// # Panics
    /// If one was started before.
    pub fn start(config: &LogConfig) -> Log {
        let (filter, handle) = reload::Layer::new(EnvFilter::new(&config.level));
        let is_read = std::io::stderr().is_terminal();
        let written = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(is_read);
        let events = Events::default();
        let told = Told(events.clone()).with_filter(LevelFilter::WARN);
        let written = if config.json { written.json().boxed() } else { written.boxed() };
        tracing_subscriber::registry().with(written.with_filter(filter)).with(told).init();
        Log { filter: handle, events }
    }

    /// Logs at `level` from now on: a `tracing` filter such as `info` or `vunet::device=debug`.
    ///
    /// # Errors
    /// [`LevelError`]; the level is as before then.
    pub fn set_level(&self, level: &str) -> Result<(), LevelError> {
        check_level(level).map_err(LevelError::Value)?;
        let filter = EnvFilter::try_new(level).map_err(|_| LevelError::Value(level.to_owned()))?;
        Ok(self.filter.reload(filter)?)
    }

    /// The level now.
    pub fn level(&self) -> String {
        self.filter.with_current(ToString::to_string).unwrap_or_default()
    }
}

/// Judges a log filter: levels and `MODULE=LEVEL`, joined by commas. A bare module name, which a filter would read as
/// "everything of that module", is refused: it is nearly always a level mistyped.
///
/// # Errors
/// The part that is wrong.
pub fn check_level(text: &str) -> Result<(), String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let is_level = |level: &str| LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level));
    for part in text.split(',') {
        let holds = match part.rsplit_once('=') {
            Some((module, level)) => !module.is_empty() && is_level(level),
            None => is_level(part),
        };
        if !holds || EnvFilter::try_new(part).is_err() {
            return Err(part.to_owned());
        }
    }
    Ok(())
}

/// Tells warnings and errors as events.
struct Told(Events);

impl<S: Subscriber> Layer<S> for Told {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let level = if *event.metadata().level() == Level::ERROR { "error" } else { "warn" };
        let mut text = Text::default();
        event.record(&mut text);
        self.0.tell(Event::Log { level, message: text.message + &text.fields });
    }
}

/// An event's message, and its fields behind it.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
