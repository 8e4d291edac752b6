//! The program `vunet`: command line, log, exit code. All else is the library's.

use std::error::Error;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use vunet::cli::network::NetworkCommand;
use vunet::cli::{self, Args, Command, DoctorArgs};
use vunet::config::LogConfig;
use vunet::uplink::sys::routes;

fn main() -> ExitCode {
    let outcome = cli::parse(std::env::args_os()).and_then(|command| match command {
        Command::PrintCapabilities => Ok(print_capabilities()),
        Command::Run(args) => run(*args),
        Command::Network(command, state_dir) => Ok(network(command, state_dir.as_deref())),
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

fn network(command: NetworkCommand, state_dir: Option<&Path>) -> ExitCode {
    // Who holds a network is a daemon; the others print their answer.
    let level = if matches!(command, NetworkCommand::Hold { .. }) { "info" } else { "warn" };
    start_log(&LogConfig { level: level.to_owned(), json: false });
    match command.run(state_dir, routes::host_routes()) {
        Ok(text) => match write!(std::io::stdout(), "{text}") {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => {
            report(&error, false);
            ExitCode::from(error.exit_code())
        }
    }
}

fn doctor(args: DoctorArgs) -> Result<ExitCode, cli::Error> {
    start_log(&LogConfig { level: "error".to_owned(), json: false });
    let is_json = args.is_json();
    let report = args.examine(routes::host_routes())?;
    let text = if is_json { report.json() } else { report.text() };
    Ok(match write!(std::io::stdout(), "{text}") {
        Ok(()) if report.is_ready() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn run(args: Args) -> Result<ExitCode, cli::Error> {
    let (config, notices) = args.into_config(routes::host_routes())?;
    let json = config.log.json;
    start_log(&config.log);
    for notice in &notices {
        notice.log();
    }
    match vunet::app::run(config) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            report(&error, json);
            Ok(ExitCode::FAILURE)
        }
    }
}

fn start_log(log: &LogConfig) {
    let filter = EnvFilter::new(&log.level);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if log.json { builder.json().init() } else { builder.init() }
}

/// Says why the process ends: one line, the outermost error first. A reader of JSON gets JSON.
fn report(error: &dyn Error, json: bool) {
    let mut chain = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        chain.push_str(": ");
        chain.push_str(&cause.to_string());
        next = cause.source();
    }
    if json {
        tracing::error!("{chain}");
    } else {
        let _ = writeln!(std::io::stderr(), "error: {chain}");
    }
}
