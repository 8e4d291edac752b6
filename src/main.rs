//! The program `vunet`: command line, log, exit code. All else is the library's.

use std::error::Error;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use vunet::cli::ctl::Ctl;
use vunet::cli::network::NetworkCommand;
use vunet::cli::{self, Args, Command, DoctorArgs};
use vunet::config::LogConfig;
use vunet::log::Log;
use vunet::top::Top;
use vunet::uplink::sys::routes;

fn main() -> ExitCode {
    let outcome = cli::parse(std::env::args_os()).and_then(|command| match command {
        Command::PrintCapabilities => Ok(print_capabilities()),
        Command::Run(args) => run(*args),
        Command::Ctl(ctl) => Ok(ask(&ctl)),
        Command::Top(top) => Ok(watch(&top)),
        Command::Network(command, state_dir) => Ok(network(command, state_dir.as_deref())),
        Command::Man(words, dir) => Ok(man(&words, dir.as_deref())),
        Command::Completions(shell) => Ok(written(cli::completions(shell, &mut std::io::stdout()))),
        Command::Doctor(args) => doctor(*args),
    });
    outcome.unwrap_or_else(|error| {
        // Nobody is left to tell if standard error is gone too; the exit code still says it.
        let _ = error.print();
        ExitCode::from(error.exit_code())
    })
}

fn print_capabilities() -> ExitCode {
    match writeln!(std::io::stdout(), "{}", cli::CAPABILITIES) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn ask(ctl: &Ctl) -> ExitCode {
    match ctl.run(&mut std::io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if ctl.is_json() => {
            let body = serde_json::to_string(&error.body(chain(&error)));
            // Texts and numbers are JSON always.
            let _ = writeln!(std::io::stderr(), "{}", body.unwrap_or_default());
            ExitCode::from(error.exit_code())
        }
        Err(error) => failed(&error, error.exit_code()),
    }
}

fn watch(top: &Top) -> ExitCode {
    match top.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, error.exit_code()),
    }
}

fn man(words: &[String], dir: Option<&Path>) -> ExitCode {
    match dir {
        Some(dir) => written(cli::man_all(dir).map(|_| ())),
        None => written(cli::man(words, &mut std::io::stdout())),
    }
}

fn written(outcome: Result<(), cli::PageError>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, error.exit_code()),
    }
}

fn network(command: NetworkCommand, state_dir: Option<&Path>) -> ExitCode {
    // Who holds a network is a daemon; the others print their answer.
    let level = if matches!(command, NetworkCommand::Hold { .. }) { "info" } else { "warn" };
    let log = Log::start(&LogConfig { level: level.to_owned(), json: false });
    let code = match command.run(state_dir, &log, routes::host_routes()) {
        Ok(text) => match write!(std::io::stdout(), "{text}") {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => {
            log.say_last(&chain(&error));
            ExitCode::from(error.exit_code())
        }
    };
    log.flush();
    code
}

fn doctor(args: DoctorArgs) -> Result<ExitCode, cli::Error> {
    Log::start(&LogConfig { level: "error".to_owned(), json: false });
    let is_json = args.is_json();
    let report = args.examine(routes::host_routes())?;
    let text = if is_json { report.json() } else { report.text() };
    Ok(match write!(std::io::stdout(), "{text}") {
        Ok(()) if report.is_ready() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn run(args: Args) -> Result<ExitCode, cli::Error> {
    let log = Log::start(&args.log());
    match serve(args, &log) {
        Err(error) if log.is_json() => {
            log.say_last(&error.to_string());
            Ok(ExitCode::from(error.exit_code()))
        }
        outcome => outcome,
    }
}

fn serve(mut args: Args, log: &Log) -> Result<ExitCode, cli::Error> {
    args.take_passed()?;
    let file = args.take_file();
    let (config, notices) = args.into_config(routes::host_routes()).map_err(|source| match &file {
        Some(file) => cli::Error::UsageOfFile { path: file.path().to_owned(), source: Box::new(source) },
        None => source.into(),
    })?;
    for notice in &notices {
        notice.log();
    }
    let reloader = file.map(|file| file.reloader(&config));
    let code = match vunet::app::run(config, log, reloader) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.say_last(&chain(&error));
            ExitCode::FAILURE
        }
    };
    log.flush();
    Ok(code)
}

/// Says on standard error why the process ends.
fn failed(error: &dyn Error, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {}", chain(error));
    ExitCode::from(code)
}

/// Why the process ends, in one line: the outermost error first.
fn chain(error: &dyn Error) -> String {
    let mut chain = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        chain.push_str(": ");
        chain.push_str(&cause.to_string());
        next = cause.source();
    }
    chain
}
