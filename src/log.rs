//! The log on standard error: its level changes while the process runs, and warnings are events too. `outlet` is the way
//! of its lines, on which no thread waits for a reader.

mod outlet;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal as _};
use std::panic;
use std::thread;
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::config::LogConfig;
use crate::control::events::{Event, Events};
use outlet::Outlet;

/// The process's standard error.
static STANDARD_ERROR: Outlet = Outlet::new();

/// How long the end of the process waits for who reads the log.
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// The log that was started.
#[derive(Clone, Debug)]
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    json: bool,
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
        let is_read = io::stderr().is_terminal();
        let written = tracing_subscriber::fmt::layer().with_writer(&STANDARD_ERROR).with_ansi(is_read);
        let events = Events::default();
        let told = Told(events.clone()).with_filter(LevelFilter::WARN);
        let written = if config.json { written.json().boxed() } else { written.boxed() };
        tracing_subscriber::registry().with(written.with_filter(filter)).with(told).init();
        Log { filter: handle, json: config.json, events }
    }

    /// Has lines written by a thread of their own from now on, so that who logs waits for nobody: until then the process
    /// waits where standard error is not read. Lines beyond a bound are lost and counted. What a panic says goes the same way.
    /// Does nothing the second time.
    ///
    /// # Errors
    /// No descriptor, or no thread.
    pub fn write_apart(&self) -> io::Result<()> {
        STANDARD_ERROR.write_apart(self.json)?;
        let json = self.json;
        panic::set_hook(Box::new(move |panicked| {
            let trace = Backtrace::capture();
            let trace = match trace.status() {
                BacktraceStatus::Captured => format!("\n{trace}"),
                _ => String::new(),
            };
            let name = thread::current().name().unwrap_or("unnamed").to_owned();
            STANDARD_ERROR.say_last(&line("ERROR", &format!("thread '{name}' {panicked}{trace}"), json));
            STANDARD_ERROR.flush(LAST_PATIENCE);
        }));
        Ok(())
    }

    /// Whether it is JSON, an object a line.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Says why the process ends, whatever the level: as an object if the log is JSON, else as a line of text.
    pub fn say_last(&self, why: &str) {
        match self.json {
            true => STANDARD_ERROR.say_last(&line("ERROR", why, true)),
            false => STANDARD_ERROR.say_last(&format!("error: {why}")),
        }
    }

    /// Waits until all that was said is written, for a second at most: standard error may be a pipe that nobody reads.
    pub fn flush(&self) {
        STANDARD_ERROR.flush(LAST_PATIENCE);
    }

    /// Lines lost so far, because standard error was not read in time.
    pub fn lines_lost(&self) -> u64 {
        STANDARD_ERROR.lost()
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

/// A line of the log as its layer would write it, without its end.
fn line(level: &str, says: &str, json: bool) -> String {
    let mut now = String::new();
    // Writing to a string does not fail, and a line without its time is one still.
    let _ = SystemTime.format_time(&mut Writer::new(&mut now));
    if !json {
        return format!("{now} {level:>5} {}: {says}", module_path!());
    }
    let object = serde_json::json!({
        "timestamp": now, "level": level, "fields": { "message": says }, "target": module_path!()
    });
    object.to_string()
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
