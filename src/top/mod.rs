//! `vunet top`: a backend that runs, live in a terminal.
//!
//! `sample` asks the control API and makes rates of two answers, `view` draws them; both know no terminal. `asker` asks on a
//! thread of its own, so that keys count while a backend does not answer. `ending` gives the terminal back at signals. Here is the
//! loop between keys and time.
//!
//! May touch: `control::client`, the terminal.

mod asker;
mod ending;
mod sample;
mod view;

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use thiserror::Error;

use crate::control::client::{Client, ClientError};
use asker::Asker;
use ending::Ending;
use sample::{Order, Sampler, Shown};

/// Longest wait for keys before answers and signals are looked for.
const SLICE: Duration = Duration::from_millis(100);
/// The same while an answer is awaited.
const ANSWER_SLICE: Duration = Duration::from_millis(20);
/// From when on the picture says that it is old.
const LATE: Duration = Duration::from_secs(2);

/// Watch a backend that runs: rates, queues, drops and flows, live in the terminal
///
/// Keys: up, down, PageUp and PageDown move through flows, s sorts them by use or by bytes each way, p halts the picture, q
/// ends.
#[derive(Clone, Debug, Args)]
pub struct Top {
    /// Socket of the backend, as it was given with --control
    #[arg(long, value_name = "PATH", env = "VUNET_CONTROL")]
    pub control: Option<PathBuf>,
    /// Seconds from one picture to the next, 0.1 to 60
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub interval: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.1..=60.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "0.1 to 60 seconds".to_owned())
}

/// Why there is no picture, or no more.
#[derive(Debug, Error)]
pub enum TopError {
    /// There is nothing to draw on.
    #[error(
        "vunet top draws in a terminal, and standard output is none: `vunet ctl --json status` is for programs"
    )]
    NoTerminal,
    /// The backend does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The terminal failed.
    #[error("the terminal")]
    Terminal(#[from] io::Error),
}

impl TopError {
    /// The code to end the process with: 3 if no backend could be reached, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            TopError::Client(error) => error.exit_code(),
            TopError::NoTerminal | TopError::Terminal(_) => 1,
        }
    }
}

impl Top {
    /// Draws until the user or a signal ends it, or the backend does.
    ///
    /// # Errors
    /// [`TopError`]; the terminal is as it was before.
    pub fn run(&self) -> Result<(), TopError> {
        if !io::stdout().is_terminal() {
            return Err(TopError::NoTerminal);
        }
        let client = Client::new(self.control.as_deref().unwrap_or(std::path::Path::new("")))?;
        let mut sampler = Sampler::new();
        // Before the screen is taken, so that who cannot be reached is said in plain text.
        let shown = sampler.next(&client)?;
        let asker = Asker::start(client, sampler)?;
        let ending = Ending::watch()?;
        let mut terminal = ratatui::try_init()?;
        let outcome = self.draw(&mut terminal, &asker, &ending, shown);
        let restored = ratatui::try_restore();
        if ending.is_asked() {
            // Its cause may be that the terminal is gone, which is no error then.
            return Ok(());
        }
        restored?;
        outcome
    }

    fn draw(
        &self,
        terminal: &mut ratatui::DefaultTerminal,
        asker: &Asker,
        ending: &Ending,
        mut shown: Shown,
    ) -> Result<(), TopError> {
        let mut state = State::default();
        let mut drawn = None;
        let mut due = Instant::now() + self.interval;
        let mut asked: Option<Instant> = None;
        while !ending.is_asked() {
            state.scrolled = state.scrolled.min(shown.flows.len().saturating_sub(1));
            let late = asked.map(|asked| asked.elapsed()).filter(|late| *late >= LATE);
            state.late_seconds = late.map(|late| late.as_secs());
            if drawn != Some(state) {
                terminal.draw(|frame| view::draw(frame, &shown, &state))?;
                drawn = Some(state);
            }
            let wait = match asked {
                Some(_) => ANSWER_SLICE,
                None if state.halted => SLICE,
                None => due.saturating_duration_since(Instant::now()).min(SLICE),
            };
            if event::poll(wait)? {
                let event = event::read()?;
                if matches!(event, Event::Resize(..)) {
                    drawn = None;
                }
                if state.is_ended_by(&event) {
                    return Ok(());
                }
                shown.sort(state.order);
            } else if let Some(answer) = asker.answer() {
                let answer = answer?;
                asked = None;
                if !state.halted {
                    (shown, drawn) = (answer, None);
                    shown.sort(state.order);
                }
            } else if asked.is_none() && !state.halted && Instant::now() >= due {
                asker.ask();
                asked = Some(Instant::now());
                due = Instant::now() + self.interval;
            }
        }
        Ok(())
    }
}

/// What keys and time made of the picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    /// The first flow in sight.
    scrolled: usize,
    /// Whether the picture stays as it is.
    halted: bool,
    /// Which flows come first.
    order: Order,
    /// How long the backend has not answered, if that is long.
    late_seconds: Option<u64>,
}

impl State {
    /// Does what a key asks for; whether that is the end.
    fn is_ended_by(&mut self, event: &Event) -> bool {
        match wish(event) {
            Wish::End => return true,
            Wish::Halt => self.halted = !self.halted,
            Wish::Sort => self.order = self.order.next(),
            Wish::Up(by) => self.scrolled = self.scrolled.saturating_sub(by),
            Wish::Down(by) => self.scrolled = self.scrolled.saturating_add(by),
            Wish::Nothing => {}
        }
        false
    }
}

/// What a key asks for.
enum Wish {
    End,
    Halt,
    Sort,
    Up(usize),
    Down(usize),
    Nothing,
}

/// Flows a page of keys moves by.
const PAGE: usize = 10;

fn wish(event: &Event) -> Wish {
    let Event::Key(key) = event else { return Wish::Nothing };
    if key.kind == KeyEventKind::Release {
        return Wish::Nothing;
    }
    match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Wish::End,
        KeyCode::Char('q') | KeyCode::Esc => Wish::End,
        KeyCode::Char('p' | ' ') => Wish::Halt,
        KeyCode::Char('s') => Wish::Sort,
        KeyCode::Up | KeyCode::Char('k') => Wish::Up(1),
        KeyCode::Down | KeyCode::Char('j') => Wish::Down(1),
        KeyCode::PageUp => Wish::Up(PAGE),
        KeyCode::PageDown => Wish::Down(PAGE),
        KeyCode::Home => Wish::Up(usize::MAX),
        _ => Wish::Nothing,
    }
}
