//! `vunet top`: a backend that runs, live in a terminal.
//!
//! `sample` asks the control API and makes rates of two answers, `view` draws them; both know no terminal. Here is
//! the loop between keys and time.
//!
//! May touch: `control::client`, the terminal.

mod sample;
mod view;

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use thiserror::Error;

use crate::control::client::{Client, ClientError};
use sample::{Sampler, Shown};

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

impl Top {
    /// Draws until the user ends it, or the backend does.
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
        let mut shown = sampler.next(&client)?;
        let mut terminal = ratatui::try_init()?;
        let outcome = self.draw(&mut terminal, &client, &mut sampler, &mut shown);
        ratatui::try_restore()?;
        outcome
    }

    fn draw(
        &self,
        terminal: &mut ratatui::DefaultTerminal,
        client: &Client,
        sampler: &mut Sampler,
        shown: &mut Shown,
    ) -> Result<(), TopError> {
        let (mut scrolled, mut halted) = (0usize, false);
        let mut due = Instant::now() + self.interval;
        loop {
            scrolled = scrolled.min(shown.flows.len().saturating_sub(1));
            terminal.draw(|frame| view::draw(frame, shown, scrolled, halted))?;
            if event::poll(due.saturating_duration_since(Instant::now()))? {
                match wish(&event::read()?) {
                    Wish::End => return Ok(()),
                    Wish::Halt => halted = !halted,
                    Wish::Sort => {
                        sampler.order = sampler.order.next();
                        shown.sort(sampler.order);
                    }
                    Wish::Up(by) => scrolled = scrolled.saturating_sub(by),
                    Wish::Down(by) => scrolled = scrolled.saturating_add(by),
                    Wish::Nothing => {}
                }
                continue;
            }
            due = Instant::now() + self.interval;
            if !halted {
                *shown = sampler.next(client)?;
            }
        }
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
