//! A client of the control API, on its unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::api::error::{ErrorBody, ErrorText};

/// Bytes of an answer, at most.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// How long an answer may take until it begins.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Why there is no answer, or one that says no.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens at the path.
    #[error("--control {path}: cannot reach a vunet there; was it started with --control?", path = .0.display())]
    Connect(PathBuf, #[source] io::Error),
    /// No runtime.
    #[error("cannot start")]
    Start(#[source] io::Error),
    /// The connection broke, or what came is not HTTP.
    #[error("the answer")]
    Http(#[from] hyper::Error),
    /// The answer is too long or broke off.
    #[error("the answer: {0}")]
    Body(String),
    /// Nothing came.
    #[error("no answer within {} s", ANSWER_TIMEOUT.as_secs())]
    TimedOut,
    /// The answer is not what this version expects.
    #[error("the answer is not what this version of vunet knows")]
    Json(#[from] serde_json::Error),
    /// The backend refused.
    #[error("{}", .body.error.message)]
    Refused {
        /// The status of HTTP.
        status: StatusCode,
        /// What it said.
        body: Box<ErrorBody>,
    },
    /// The backend has ended, whoever ended it, while it told of what happens.
    #[error("the backend has ended")]
    Ended,
    /// Of several things to do, one failed.
    #[error("done: {}; then", done.join(", "))]
    Partly {
        /// Those done before, by name.
        done: Vec<String>,
        /// Why that one was not.
        source: Box<ClientError>,
    },
    /// A capture would be written to a terminal.
    #[error(
        "standard output is a terminal: capture to a pipe or a file, such as vunet ctl capture - | tcpdump -nr -"
    )]
    Terminal,
    /// The folder this program was started in is gone.
    #[error("the path")]
    Path(#[source] io::Error),
    /// What was answered could not be written.
    #[error("cannot write")]
    Write(#[source] io::Error),
}

impl ClientError {
    /// The code to end the process with: 3 if no backend could be reached, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            ClientError::Connect(..) => 3,
            ClientError::Partly { source, .. } => source.exit_code(),
            _ => 1,
        }
    }

    /// The same as the API tells of errors: in its own words where it refused, else with `message`.
    pub fn body(&self, message: String) -> ErrorBody {
        let (code, owner) = match self {
            ClientError::Refused { body, .. } => (body.error.code.as_str(), body.error.owner.clone()),
            ClientError::Partly { source, .. } => {
                let ErrorText { code, owner, .. } = source.body(String::new()).error;
                return ErrorBody { error: ErrorText { code, message, owner } };
            }
            ClientError::Connect(..) => ("unreachable", None),
            ClientError::TimedOut => ("too_slow", None),
            ClientError::Ended => ("ended", None),
            ClientError::Http(_) | ClientError::Body(_) | ClientError::Json(_) => ("bad_answer", None),
            ClientError::Terminal => ("terminal", None),
            ClientError::Start(_) | ClientError::Write(_) | ClientError::Path(_) => ("failed", None),
        };
        ErrorBody { error: ErrorText { code: code.to_owned(), message, owner } }
    }
}

/// A client.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    runtime: Runtime,
}

impl Client {
    /// One for the socket at `path`.
    ///
    /// # Errors
    /// No runtime.
    pub fn new(path: &Path) -> Result<Client, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Client { path: path.to_owned(), runtime: runtime.map_err(ClientError::Start)? })
    }

    /// What a resource answers, as JSON has it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn get<T: DeserializeOwned>(&self, resource: &str) -> Result<T, ClientError> {
        Ok(serde_json::from_slice(&self.ask(Method::GET, resource, None)?)?)
    }

    /// Carries out a method on a resource; its answer as it came, nothing if there is none.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn call(
        &self,
        method: Method,
        resource: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Vec<u8>, ClientError> {
        let body = body.map(serde_json::to_vec).transpose()?;
        self.ask(method, resource, body)
    }

    fn ask(&self, method: Method, resource: &str, body: Option<Vec<u8>>) -> Result<Vec<u8>, ClientError> {
        self.runtime.block_on(async {
            let answer = tokio::time::timeout(ANSWER_TIMEOUT, self.send(method, resource, body)).await;
            let answer = answer.map_err(|_| ClientError::TimedOut)??;
            whole(answer).await
        })
    }

    /// Hands each event of a stream to `each`, its name and its data, until `each` says false.
    ///
    /// # Errors
    /// [`ClientError`]; at the backend's end [`ClientError::Ended`].
    pub fn follow(
        &self,
        resource: &str,
        mut each: impl FnMut(&str, &str) -> Result<bool, ClientError>,
    ) -> Result<(), ClientError> {
        self.runtime.block_on(async {
            let mut answer = self.send(Method::GET, resource, None).await?;
            if !answer.status().is_success() {
                return whole(answer).await.map(|_| ());
            }
            let mut lines = Lines::default();
            while let Some(frame) = answer.frame().await {
                // A backend that ends breaks the stream off, whether it was killed or told to.
                let Ok(frame) = frame else { break };
                let Ok(data) = frame.into_data() else { continue };
                lines.rest.extend_from_slice(&data);
                if lines.rest.len() > ANSWER_BYTES_MAX {
                    return Err(ClientError::Body("an event is too long".to_owned()));
                }
                while let Some((name, data)) = lines.next_event() {
                    if !each(&name, &data)? {
                        return Ok(());
                    }
                }
            }
            Err(ClientError::Ended)
        })
    }

    /// Hands what a resource streams to `each`, in pieces, until the backend ends it or `each` says false.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn stream(
        &self,
        resource: &str,
        mut each: impl FnMut(&[u8]) -> Result<bool, ClientError>,
    ) -> Result<(), ClientError> {
        self.runtime.block_on(async {
            let mut answer = self.send(Method::GET, resource, None).await?;
            if !answer.status().is_success() {
                return whole(answer).await.map(|_| ());
            }
            while let Some(frame) = answer.frame().await {
                if let Ok(data) = frame?.into_data()
                    && !each(&data)?
                {
                    break;
                }
            }
            Ok(())
        })
    }

    async fn send(
        &self,
        method: Method,
        resource: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Response<Incoming>, ClientError> {
        let failed = |error| ClientError::Connect(self.path.clone(), error);
        let stream = UnixStream::connect(&self.path).await.map_err(failed)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(resource).header("host", "vunet");
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let request = request.body(Full::new(Bytes::from(body.unwrap_or_default())));
        let request = request.map_err(|error| ClientError::Body(error.to_string()))?;
        Ok(sender.send_request(request).await?)
    }
}

/// All of an answer, or what it refuses.
async fn whole(answer: Response<Incoming>) -> Result<Vec<u8>, ClientError> {
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| ClientError::Body(error.to_string()))?.to_bytes().to_vec();
    if status.is_success() {
        return Ok(body);
    }
    let body = serde_json::from_slice::<ErrorBody>(&body).unwrap_or_else(|_| {
        let message = format!("refused: {status}");
        ErrorBody { error: ErrorText { code: "refused".to_owned(), message, owner: None } }
    });
    Err(ClientError::Refused { status, body: Box::new(body) })
}

/// Events of a stream (HTML, server-sent events), as they come in pieces.
#[derive(Debug, Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// The next whole event that has data.
    fn next_event(&mut self) -> Option<(String, String)> {
        loop {
            let end = self.rest.windows(2).position(|two| two == b"\n\n")?;
            let block: Vec<u8> = self.rest.drain(..end + 2).collect();
            let text = String::from_utf8_lossy(&block);
            let field = |name: &str| {
                text.lines()
                    .find_map(|line| line.strip_prefix(name))
                    .map(|value| value.trim_start().to_owned())
            };
            if let Some(data) = field("data:") {
                return Some((field("event:").unwrap_or_default(), data));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_whole_however_they_come() {
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        for byte in b": hello\n\nevent: attached\ndata: {\"a\":1}\n\ndata: x\n\nevent: z\n" {
            lines.rest.push(*byte);
            seen.extend(lines.next_event());
        }
        let owned = |name: &str, data: &str| (name.to_owned(), data.to_owned());
        assert_eq!(seen, [owned("attached", "{\"a\":1}"), owned("", "x")]);
    }
}
