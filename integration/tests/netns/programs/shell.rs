//! ssh, and git over it and over HTTP.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use vunet_integration::lab::{self, Process, SHORT, WORLD};
use vunet_integration::world::pattern;

use super::{Dialogue, IDLE};
use crate::bench::{Bench, Failure, MIB, Outcome, PATIENCE, Setup, ensure, scenario};

const SSH_PORT: u16 = 2222;
const GIT_PORT: u16 = 8418;
/// Bytes of an HTTP request's body at most.
const BODY_BYTES_MAX: u64 = 64 * MIB;

/// Starts sshd in the world with keys made for it; the client's command, up to the destination.
fn start_sshd(bench: &Bench) -> Result<(Process, Vec<String>), Failure> {
    let sshd = lab::find_tool("sshd").expect("the scenario needs it").display().to_string();
    let file = |name: &str| bench.lab.dir().join(name).display().to_string();
    for key in ["host-key", "user-key"] {
        lab::run(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", &file(key)], PATIENCE)?;
    }
    // The unprivileged part of sshd goes there, as this user; installing the package would have made both.
    fs::create_dir_all("/run/sshd")?;
    let mut passwd = fs::read_to_string("/etc/passwd")?;
    if !passwd.lines().any(|line| line.starts_with("sshd:")) {
        passwd.push_str("sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n");
    }
    bench.lab.world.set_etc_file("passwd", &passwd)?;
    let port = SSH_PORT.to_string();
    let authorized = format!("AuthorizedKeysFile={}", file("user-key.pub"));
    let mut words = vec!["-D", "-e", "-f", "/dev/null", "-p", &port];
    let (key, listen) = (file("host-key"), format!("ListenAddress={WORLD}"));
    words.extend([
        "-h",
        &key,
        "-o",
        &listen,
        "-o",
        &authorized,
        "-o",
        "StrictModes=no",
        "-o",
        "PidFile=none",
    ]);
    words.extend(["-o", "PermitRootLogin=yes", "-o", "PasswordAuthentication=no"]);
    let server = bench.lab.world.spawn(&[&[&*sshd], &words[..]].concat())?;
    server.wait_error(SHORT, "sshd", |line| line.contains("Server listening"))?;
    let known = format!("UserKnownHostsFile={}", file("known-hosts"));
    let key = file("user-key");
    let client = ["ssh", "-F", "/dev/null", "-i", &key, "-p", &port, "-o", "BatchMode=yes", "-o", &known];
    let more = ["-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=10"];
    Ok((server, client.into_iter().chain(more).map(str::to_owned).collect()))
}

fn words(client: &[String]) -> Vec<&str> {
    client.iter().map(String::as_str).collect()
}

#[test]
fn ssh_answers_after_sitting_idle() {
    scenario(&Setup::new().tools(&["sshd", "ssh", "ssh-keygen"]), |bench| {
        let (_server, client) = start_sshd(bench)?;
        let to = format!("root@{WORLD}");
        let mut session = Dialogue::start(&bench.lab.guest, &[&words(&client)[..], &[&to, "cat"]].concat())?;
        session.say(b"before\n")?;
        session.expect(b"before\n")?;
        thread::sleep(IDLE);
        session.say(b"after\n")?;
        session.expect(b"after\n")?;
        let rest = session.end()?;
        ensure!(rest.is_empty(), "{rest:?} came behind the end");
        Ok(())
    });
}

#[test]
fn ssh_over_a_bad_link_loses_nothing() {
    let faults = "delay=5ms,jitter=2ms,loss=1%,reorder=1%,duplicate=1%,corrupt=0.5%,rate=100mbit";
    let setup = Setup::new().tools(&["sshd", "ssh", "ssh-keygen"]);
    scenario(&setup.over_link(&["--to-a", faults, "--to-b", faults, "--seed", "7"]), |bench| {
        let (_server, client) = start_sshd(bench)?;
        let (to, file) = (format!("root@{WORLD}"), bench.lab.dir().join("payload"));
        let mut payload = Vec::new();
        pattern::send(7, 4 * MIB, &mut payload)?;
        fs::write(&file, payload)?;
        let script = format!("\"$@\" sha256sum <{}", file.display());
        let uploaded =
            bench.in_guest(&[&["sh", "-c", &script, "sh"], &words(&client)[..], &[&to]].concat())?;
        ensure!(uploaded.starts_with(&pattern::sha256(7, 4 * MIB)), "{uploaded}");
        let script = format!("\"$@\" cat {} | sha256sum", file.display());
        let fetched =
            bench.in_guest(&[&["sh", "-c", &script, "sh"], &words(&client)[..], &[&to]].concat())?;
        ensure!(fetched.starts_with(&pattern::sha256(7, 4 * MIB)), "{fetched}");
        Ok(())
    });
}

fn git(dir: &Path, args: &[&str]) -> Result<String, Failure> {
    let dir = dir.display().to_string();
    let mut words = vec!["git", "-C", &dir, "-c", "user.name=Test", "-c", "user.email=test@example.test"];
    words.extend(args);
    Ok(lab::run(&words, PATIENCE)?.stdout)
}

/// Adds a commit with `bytes` nobody can compress.
fn commit_bytes(dir: &Path, name: &str, bytes: u64) -> Outcome {
    let mut content = Vec::new();
    pattern::send(bytes, bytes, &mut content)?;
    fs::write(dir.join(name), content)?;
    git(dir, &["add", name])?;
    git(dir, &["commit", "-q", "-m", name])?;
    Ok(())
}

/// A repository of some commits, which may be pushed to; its directory.
fn make_repository(bench: &Bench) -> Result<std::path::PathBuf, Failure> {
    let (work, bare) = (bench.lab.dir().join("work"), bench.lab.dir().join("served.git"));
    fs::create_dir(&work)?;
    git(&work, &["init", "-q", "-b", "main"])?;
    for (name, bytes) in [("small", 10), ("large", 4 * MIB), ("middle", 100_000)] {
        commit_bytes(&work, name, bytes)?;
    }
    git(&work, &["clone", "-q", "--bare", ".", &bare.display().to_string()])?;
    git(&bare, &["config", "http.receivepack", "true"])?;
    Ok(bare)
}

/// Clones from `url` in the guest, pushes a commit back, and compares.
fn clone_and_push(bench: &Bench, served: &Path, url: &str, ssh: &str) -> Outcome {
    let clone = bench.lab.dir().join("clone");
    let (ssh, target) = (format!("GIT_SSH_COMMAND={ssh}"), clone.display().to_string());
    bench.in_guest(&["env", &ssh, "git", "clone", "-q", url, &target])?;
    git(&clone, &["fsck", "--strict"])?;
    let head = |dir: &Path| git(dir, &["rev-parse", "main"]);
    ensure!(head(&clone)? == head(served)?, "the clone has another commit");
    commit_bytes(&clone, "pushed", 3 * MIB)?;
    // In one piece, which the server below understands, rather than in chunks.
    let buffer = "http.postBuffer=33554432";
    bench.in_guest(&["env", &ssh, "git", "-C", &target, "-c", buffer, "push", "-q", "origin", "main"])?;
    git(served, &["fsck", "--strict"])?;
    ensure!(head(&clone)? == head(served)?, "what was pushed did not arrive");
    Ok(())
}

#[test]
fn git_clones_and_pushes_over_ssh() {
    scenario(&Setup::new().tools(&["sshd", "ssh", "ssh-keygen", "git"]), |bench| {
        let (_server, client) = start_sshd(bench)?;
        let served = make_repository(bench)?;
        let url = format!("ssh://root@{WORLD}:{SSH_PORT}{}", served.display());
        clone_and_push(bench, &served, &url, &client.join(" "))
    });
}

#[test]
fn git_clones_and_pushes_over_http() {
    scenario(&Setup::new().tools(&["git"]), |bench| {
        let served = make_repository(bench)?;
        let listener = bench.lab.world.inside(|| TcpListener::bind((WORLD, GIT_PORT)))?;
        let root = bench.lab.dir().to_owned();
        // It waits for connections until the test's process ends.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let root = root.clone();
                thread::spawn(move || {
                    if let Err(e) = git_backend(stream, &root) {
                        eprintln!("git http-backend: {e}");
                    }
                });
            }
        });
        clone_and_push(bench, &served, &format!("http://{WORLD}:{GIT_PORT}/served.git"), "false")
    });
}

/// Answers one HTTP request with `git http-backend` (RFC 3875), and closes.
fn git_backend(mut stream: TcpStream, root: &Path) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut command = Command::new("git");
    command.arg("http-backend").env("GIT_PROJECT_ROOT", root).env("GIT_HTTP_EXPORT_ALL", "1");
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut parts = line.split_whitespace();
    let (method, target) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    command.env("REQUEST_METHOD", method).env("PATH_INFO", path).env("QUERY_STRING", query);
    let mut body_bytes = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => body_bytes = value.parse::<u64>().unwrap_or(0).min(BODY_BYTES_MAX),
            "content-type" => drop(command.env("CONTENT_TYPE", value)),
            "content-encoding" => drop(command.env("HTTP_CONTENT_ENCODING", value)),
            "git-protocol" => drop(command.env("GIT_PROTOCOL", value)),
            "expect" => stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?,
            _ => {}
        }
    }
    command.env("CONTENT_LENGTH", body_bytes.to_string());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        io::copy(&mut reader.take(body_bytes), &mut stdin)?;
    }
    let mut answer = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_end(&mut answer)?;
    }
    child.wait()?;
    let head = String::from_utf8_lossy(&answer[..answer.len().min(20)]).into_owned();
    let status = head.strip_prefix("Status: ").map_or("200", |rest| rest.get(..3).unwrap_or("500"));
    stream.write_all(format!("HTTP/1.1 {status} .\r\nConnection: close\r\n").as_bytes())?;
    stream.write_all(&answer)?;
    stream.shutdown(std::net::Shutdown::Write)
}
