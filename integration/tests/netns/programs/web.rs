//! HTTP/2 and WebSocket.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::thread;

use tungstenite::Message;
use vunet_integration::lab::{Process, SHORT, WORLD};
use vunet_integration::world::pattern;

use super::IDLE;
use crate::bench::{Bench, Failure, MIB, PATIENCE, Setup, ensure, scenario};

const HTTP2_PORT: u16 = 8080;
const WEBSOCKET_PORT: u16 = 8081;
/// Files there are to fetch.
const FILES: u64 = 40;

/// Starts nghttpd in the world with files of 25,000 bytes and more, named by their numbers.
fn start_nghttpd(bench: &Bench) -> Result<Process, Failure> {
    let root = bench.lab.dir().join("htdocs");
    fs::create_dir(&root)?;
    for index in 1..=FILES {
        let mut content = Vec::new();
        pattern::send(index, file_bytes(index), &mut content)?;
        fs::write(root.join(index.to_string()), content)?;
    }
    let (port, address, docs) = (HTTP2_PORT.to_string(), WORLD.to_string(), root.display().to_string());
    let words = ["nghttpd", "--no-tls", "--echo-upload", "-v", "-a", &address, "-d", &docs, &port];
    let server = bench.lab.world.spawn(&words)?;
    server.wait_line(SHORT, "nghttpd", |line| line.contains("listen"))?;
    Ok(server)
}

fn file_bytes(index: u64) -> u64 {
    index * 25_000
}

#[test]
fn http2_carries_a_file_and_an_upload_back() {
    scenario(&Setup::new().tools(&["curl", "nghttpd"]), |bench| {
        let _server = start_nghttpd(bench)?;
        // One file a call: Debian 12's curl cannot use such a connection twice.
        let target = bench.lab.dir().join("got").display().to_string();
        let url = format!("http://{WORLD}:{HTTP2_PORT}/{FILES}");
        let base = ["curl", "-sS", "--fail", "-m", "30", "--http2-prior-knowledge"];
        let said = bench.in_guest(&[&base[..], &["-w", "%{http_version}", "-o", &target, &url]].concat())?;
        ensure!(said == "2", "HTTP version {said}");
        let got = fs::read(&target)?;
        ensure!(got.len() as u64 == file_bytes(FILES), "the file has {} bytes", got.len());
        pattern::expect(FILES, file_bytes(FILES), &mut &got[..])?;
        let mut upload = Vec::new();
        pattern::send(99, 4 * MIB, &mut upload)?;
        let (sent, back) = (bench.lab.dir().join("sent"), bench.lab.dir().join("back"));
        fs::write(&sent, &upload)?;
        let (data, back_text) = (format!("@{}", sent.display()), back.display().to_string());
        let url = format!("http://{WORLD}:{HTTP2_PORT}/echo");
        bench.in_guest(
            &[&base[..], &["-H", "Expect:", "--data-binary", &data, "-o", &back_text, &url]].concat(),
        )?;
        ensure!(fs::read(&back)? == upload, "what was uploaded did not come back");
        Ok(())
    });
}

#[test]
fn http2_streams_of_several_connections_all_end() {
    scenario(&Setup::new().tools(&["nghttpd", "h2load"]), |bench| {
        let _server = start_nghttpd(bench)?;
        let urls: Vec<String> =
            (1..=FILES).map(|index| format!("http://{WORLD}:{HTTP2_PORT}/{index}")).collect();
        let words = ["h2load", "-p", "h2c", "-n", "200", "-c", "5", "-m", "20", "-T", "15"];
        let urls = urls.iter().map(String::as_str);
        let said = bench.in_guest(&words.into_iter().chain(urls).collect::<Vec<_>>())?;
        let sums = said.lines().find(|line| line.starts_with("requests:")).unwrap_or(&said);
        ensure!(sums.contains("200 succeeded, 0 failed, 0 errored, 0 timeout"), "{said}");
        Ok(())
    });
}

#[test]
fn a_websocket_left_idle_carries_messages_both_ways_again() {
    scenario(&Setup::new(), |bench| {
        let listener = bench.lab.world.inside(|| TcpListener::bind((WORLD, WEBSOCKET_PORT)))?;
        let server = thread::spawn(move || serve_websocket(&listener));
        let stream = bench.connect_world(WEBSOCKET_PORT)?;
        let (mut socket, _) = tungstenite::client(format!("ws://{WORLD}:{WEBSOCKET_PORT}/"), stream)
            .map_err(|e| Failure(format!("the handshake: {e}")))?;
        let large = "x".repeat(300_000);
        for text in ["before", &large] {
            socket.send(Message::text(text))?;
            let answer = socket.read()?;
            ensure!(answer == Message::text(text), "an echo of {} bytes", answer.len());
        }
        // After the pause the server speaks first.
        socket.send(Message::text("wait"))?;
        let pushed = socket.read()?;
        ensure!(pushed == Message::text("after"), "{pushed}");
        thread::sleep(IDLE);
        // And now the client.
        socket.send(Message::Ping(vec![1, 2, 3].into()))?;
        let pong = socket.read()?;
        ensure!(pong == Message::Pong(vec![1, 2, 3].into()), "{pong}");
        socket.close(None)?;
        while socket.read().is_ok() {}
        let messages = server.join().map_err(|_| Failure("the server panicked".into()))??;
        ensure!(messages == 3, "the server heard {messages} messages");
        Ok(())
    });
}

/// Echoes texts of one client, `after` a pause for `wait`, until it closes in order; how many there were.
fn serve_websocket(listener: &TcpListener) -> Result<u32, Failure> {
    let (stream, _) = listener.accept()?;
    TcpStream::set_read_timeout(&stream, Some(PATIENCE))?;
    let mut socket = tungstenite::accept(stream).map_err(|e| Failure(format!("the handshake: {e}")))?;
    let mut messages = 0;
    loop {
        match socket.read() {
            Ok(Message::Text(text)) => {
                messages += 1;
                let is_wait = text.as_str() == "wait";
                if is_wait {
                    thread::sleep(IDLE);
                }
                socket.send(if is_wait { Message::text("after") } else { Message::Text(text) })?;
            }
            Ok(_) => {}
            Err(tungstenite::Error::ConnectionClosed) => return Ok(messages),
            Err(e) => return Err(e.into()),
        }
    }
}
