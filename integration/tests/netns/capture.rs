//! Captures of a real guest's traffic, read by tshark and tcpdump, in each way a guest is connected.

use std::fs::File;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use vunet_integration::lab::{self, WORLD, vunet_binary};
use vunet_integration::world::ports;

use crate::bench::{Bench, Failure, MIB, Outcome, PATIENCE, Setup, bare, ensure, fail, scenario};

const TOOLS: [&str; 4] = ["tshark", "tcpdump", "ping", "curl"];
/// Directions as tshark shows them.
const INBOUND: u64 = 1;
const OUTBOUND: u64 = 2;
/// An address that is nobody's to send from.
const SPOOFED: &str = "10.99.99.99";

/// A control socket, and a folder for captures.
struct Control {
    dir: TempDir,
}

impl Control {
    fn new() -> Control {
        Control { dir: tempfile::tempdir().expect("a directory") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn setup(&self, setup: Setup) -> Setup {
        setup.tools(&TOOLS).vunet(&["--control", &self.path("ctl").display().to_string()])
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(vunet_binary());
        command.args(["ctl", "--json", "--control"]).arg(self.path("ctl")).args(args);
        command
    }

    fn ctl(&self, args: &[&str]) -> Result<Value, Failure> {
        let output = self.command(args).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "vunet ctl {args:?}: {error}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn start(&self, name: &str, more: &[&str]) -> Result<Value, Failure> {
        let path = self.path(name).display().to_string();
        self.ctl(&[&["capture", "start", &path], more].concat())
    }

    /// Ends the capture, which has lost nothing.
    fn stop(&self) -> Result<Value, Failure> {
        let state = self.ctl(&["capture", "stop"])?;
        ensure!(state["ended"] == "stopped" && state["lost_frames"] == 0, "{state}");
        Ok(state)
    }

    fn dropped(&self, reason: &str) -> Result<u64, Failure> {
        Ok(self.ctl(&["counters"])?["drops"][reason].as_u64().unwrap_or(0))
    }
}

/// What tshark says of one frame.
#[derive(Debug, Default)]
struct Frame {
    direction: u64,
    len: u64,
    captured: u64,
    comment: String,
    interface: String,
    queue: String,
    src: String,
    dst: String,
    icmp: String,
    tcp_len: u64,
}

const FIELDS: [&str; 10] = [
    "frame.packet_flags_direction",
    "frame.len",
    "frame.cap_len",
    "frame.comment",
    "frame.interface_name",
    "frame.interface_queue",
    "ip.src",
    "ip.dst",
    "icmp.type",
    "tcp.len",
];

/// A number of tshark, in either of the ways it writes them.
fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap_or(0),
        None => text.parse().unwrap_or(0),
    }
}

/// All frames of a capture.
fn frames(path: &Path) -> Result<Vec<Frame>, Failure> {
    let path = path.display().to_string();
    let mut words =
        vec!["tshark", "-n", "-r", &path, "-T", "fields", "-E", "separator=|", "-E", "occurrence=f"];
    for field in &FIELDS {
        words.extend(["-e", field]);
    }
    let text = lab::run(&words, PATIENCE)?.stdout;
    let frame = |line: &str| {
        let mut words = line.split('|').map(str::to_owned);
        let mut next = || words.next().unwrap_or_default();
        Frame {
            direction: number(&next()),
            len: number(&next()),
            captured: number(&next()),
            comment: next(),
            interface: next(),
            queue: next(),
            src: next(),
            dst: next(),
            icmp: next(),
            tcp_len: number(&next()),
        }
    };
    Ok(text.lines().map(frame).collect())
}

/// Pings from an address that is not the guest's; nobody answers.
fn spoof(bench: &Bench, to: &str) -> Outcome {
    bench.in_guest(&["ip", "addr", "replace", &format!("{SPOOFED}/32"), "dev", "eth0"])?;
    let words = ["ping", "-n", "-c", "3", "-i", "0.05", "-W", "1", "-I", SPOOFED, to];
    // Fails, as there are no answers.
    let _ = bench.lab.guest.run(&words, PATIENCE);
    bench.in_guest(&["ip", "addr", "del", &format!("{SPOOFED}/32"), "dev", "eth0"]).map(drop)
}

/// Traffic of all kinds, captured as it is.
fn is_captured(setup: Setup) {
    let control = Control::new();
    scenario(&control.setup(setup), |bench| {
        let world = WORLD.to_string();
        let before = control.dropped("spoofed_source")?;
        control.start("a", &[])?;
        bench.in_guest(&["ping", "-n", "-c", "5", "-i", "0.05", "-W", "5", &world])?;
        bench.http_both_ways(8 * MIB, 1)?;
        spoof(bench, &world)?;
        let least = control.dropped("spoofed_source")? - before;
        let state = control.stop()?;
        let most = control.dropped("spoofed_source")? - before;
        let all = frames(&control.path("a"))?;
        check(&all, &state, least..=most)?;
        let count = lab::run(&["tcpdump", "-nr", &control.path("a").display().to_string()], PATIENCE)?.stdout;
        ensure!(
            count.lines().count() == all.len(),
            "tcpdump reads {} of {}",
            count.lines().count(),
            all.len()
        );
        let counters = bench.detach()?;
        ensure!(counters.gso_from_guest > 0 && counters.gso_to_guest > 0, "segmentation: {counters:?}");
        Ok(())
    });
}

/// The capture of [`is_captured`].
fn check(all: &[Frame], state: &Value, dropped: RangeInclusive<u64>) -> Outcome {
    let world = WORLD.to_string();
    ensure!(state["frames"] == all.len(), "{} frames of {state}", all.len());
    for frame in all {
        let is_so = frame.captured == frame.len && frame.interface == "vunet" && frame.queue == "0";
        ensure!(is_so, "{frame:?}");
        let is_its = if frame.direction == OUTBOUND { frame.src != world } else { frame.dst != world };
        ensure!(is_its && [INBOUND, OUTBOUND].contains(&frame.direction), "a wrong direction: {frame:?}");
    }
    // Each request stands before its answer.
    let is_echo = |frame: &&Frame| frame.src != SPOOFED && ["0", "8"].contains(&&*frame.icmp);
    let echoes: Vec<(u64, &str)> =
        all.iter().filter(is_echo).map(|frame| (frame.direction, &*frame.icmp)).collect();
    let expected: Vec<(u64, &str)> = [(OUTBOUND, "8"), (INBOUND, "0")].repeat(5);
    ensure!(echoes == expected, "{echoes:?}");
    for direction in [INBOUND, OUTBOUND] {
        let of_it = || all.iter().filter(|frame| frame.direction == direction);
        let largest = of_it().map(|frame| frame.len).max();
        ensure!(largest > Some(1514), "no frame longer than the MTU, direction {direction}: {largest:?}");
        let payload: u64 = of_it().map(|frame| frame.tcp_len).sum();
        ensure!(payload >= 8 * MIB, "{payload} bytes of TCP in direction {direction}");
    }
    let spoofed = all.iter().filter(|frame| frame.src == SPOOFED && frame.icmp == "8").count();
    let said: Vec<&Frame> = all.iter().filter(|frame| !frame.comment.is_empty()).collect();
    let said_so = said.iter().filter(|frame| frame.comment == "dropped: spoofed_source").count() as u64;
    ensure!(spoofed == 3 && *dropped.start() >= 3, "{spoofed} spoofed frames, {dropped:?} dropped");
    ensure!(dropped.contains(&said_so), "{said_so} said to be dropped of {dropped:?}: {said:?}");
    for frame in said {
        ensure!(frame.direction == OUTBOUND, "{frame:?}");
    }
    Ok(())
}

#[test]
fn a_guest_behind_sockets_is_captured_as_it_is() {
    is_captured(Setup::new());
}

#[test]
fn a_guest_whose_packets_are_translated_is_captured_as_it_is() {
    is_captured(Setup::translated());
}

#[test]
fn a_guest_on_a_bridge_is_captured_as_it_is() {
    is_captured(Setup::on_bridge());
}

#[test]
fn frames_of_all_queues_are_captured() {
    let control = Control::new();
    let setup = control.setup(Setup::new().vunet(&["--queues", "2"]).guest(&["--queues", "2"]));
    scenario(&setup, |bench| {
        control.start("a", &["--protocol", "tcp", "--port", "80"])?;
        for seed in 0..4 {
            bench.http_both_ways(MIB, seed)?;
        }
        let state = control.stop()?;
        let all = frames(&control.path("a"))?;
        ensure!(state["frames"] == all.len(), "{} frames of {state}", all.len());
        for direction in [INBOUND, OUTBOUND] {
            let payload: u64 =
                all.iter().filter(|frame| frame.direction == direction).map(|frame| frame.tcp_len).sum();
            ensure!(payload >= 4 * MIB, "{payload} bytes of TCP in direction {direction}");
        }
        Ok(())
    });
}

#[test]
fn a_start_with_pcap_has_the_guests_first_frames() {
    let control = Control::new();
    let path = control.path("vm.pcapng").display().to_string();
    let setup = control.setup(Setup::new().vunet(&["--pcap", &path]));
    scenario(&setup, |bench| {
        bench.vunet.process.stop();
        let text = lab::run(&["tcpdump", "-nr", &path, "udp port 67 and udp port 68"], PATIENCE)?.stdout;
        let (asked, answered) = (text.matches("Request from").count(), text.matches("Reply").count());
        ensure!(asked >= 2 && answered >= 2, "{text}");
        // What it had of the guest is gone.
        bench.guest = None;
        bench.vunet = bench.lab.vunet(&setup.vunet)?;
        Ok(())
    });
}

#[test]
fn tcpdump_reads_a_capture_as_it_is_made() {
    let control = Control::new();
    scenario(&control.setup(Setup::new()), |bench| {
        let mut capture =
            control.command(&["capture", "-", "--protocol", "icmp"]).stdout(Stdio::piped()).spawn()?;
        let pipe = capture.stdout.take().expect("a pipe");
        let tcpdump = Command::new("tcpdump")
            .args(["-nlr", "-", "-c", "4"])
            .stdin(pipe)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let deadline = Instant::now() + PATIENCE;
        while control.ctl(&["capture", "status"])?["state"] != "running" {
            ensure!(Instant::now() < deadline, "no capture began");
            std::thread::sleep(Duration::from_millis(20));
        }
        bench.in_guest(&["ping", "-n", "-c", "10", "-i", "0.2", "-W", "5", &WORLD.to_string()])?;
        let seen = String::from_utf8_lossy(&tcpdump.wait_with_output()?.stdout).into_owned();
        ensure!(seen.matches("ICMP echo").count() == 4, "{seen}");
        // tcpdump has left, so the capture ends with the next frames.
        let ended = capture.wait()?;
        ensure!(ended.success(), "the client ended with {ended}");
        while control.ctl(&["capture", "status"])?["ended"] != "reader_left" {
            ensure!(Instant::now() < deadline, "the capture goes on");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    });
}

#[test]
fn frames_the_device_can_make_nothing_of_are_captured_with_the_reason() {
    let control = Control::new();
    let mut setup = control.setup(Setup::new());
    setup.faults_allowed = true;
    bare(&setup, |bench| {
        control.start("a", &[])?;
        bench.attach(&["--misbehave", "bad-header:5"])?;
        bench.lease()?;
        bench.http_both_ways(MIB, 3)?;
        control.stop()?;
        let metrics = Command::new("curl")
            .args(["-sS", "--unix-socket"])
            .arg(control.path("ctl"))
            .arg("http://vunet/metrics")
            .output()?;
        let metrics = String::from_utf8_lossy(&metrics.stdout).into_owned();
        let all = frames(&control.path("a"))?;
        let mut said = 0;
        for kind in ["bad_header", "not_negotiated", "bad_length"] {
            let name = format!("vunet_virtqueue_errors_total{{worker=\"0\",kind=\"{kind}\"}} ");
            let counted = metrics.lines().find_map(|line| line.strip_prefix(&name)).map(number);
            let comment = format!("dropped: {kind}");
            let commented = all.iter().filter(|frame| frame.comment == comment).count() as u64;
            ensure!(counted == Some(commented), "{kind}: {counted:?} counted, {commented} captured");
            said += commented;
        }
        ensure!(said > 10, "only {said} frames were nonsense");
        Ok(())
    });
}

/// A small filesystem, until it is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(path: PathBuf) -> Result<SmallDisk, Failure> {
        std::fs::create_dir(&path)?;
        lab::run(&["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", &path.display().to_string()], PATIENCE)?;
        Ok(SmallDisk(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = lab::run(&["umount", "-l", &self.0.display().to_string()], PATIENCE);
    }
}

#[test]
fn a_full_disk_ends_the_capture_and_nothing_else() {
    let control = Control::new();
    let disk = match SmallDisk::new(control.path("disk")) {
        Ok(disk) => disk,
        Err(why) => return crate::bench::skip(&format!("needs a small filesystem: {why:?}")),
    };
    scenario(&control.setup(Setup::new()), |bench| {
        control.start("disk/a", &[])?;
        bench.http_both_ways(16 * MIB, 4)?;
        let state = control.ctl(&["capture", "status"])?;
        ensure!(state["ended"] == "write_failed", "{state}");
        ensure!(state["error"].as_str().is_some_and(|error| error.contains("No space left")), "{state}");
        let all = frames(&disk.0.join("a"))?;
        let payload: u64 = all.iter().map(|frame| frame.tcp_len).sum();
        ensure!(all.len() > 10 && payload > MIB / 2, "{} frames, {payload} bytes of TCP", all.len());
        let _ = bench.connect_world(ports::ECHO)?;
        control.start("b", &[]).map(drop)
    });
}

#[test]
fn a_client_that_never_reads_holds_no_traffic() {
    let control = Control::new();
    scenario(&control.setup(Setup::new()), |bench| {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair()?;
        let mut capture =
            control.command(&["capture", "-"]).stdout(std::os::fd::OwnedFd::from(ours)).spawn()?;
        let deadline = Instant::now() + PATIENCE;
        while control.ctl(&["capture", "status"])?["state"] != "running" {
            ensure!(Instant::now() < deadline, "no capture began");
            std::thread::sleep(Duration::from_millis(20));
        }
        bench.http_both_ways(32 * MIB, 5)?;
        // It may have been let go of by now.
        let _ = control.command(&["capture", "stop"]).output()?;
        let state = control.ctl(&["capture", "status"])?;
        let _ = capture.kill();
        let _ = capture.wait();
        ensure!(state["state"] == "ended", "{state}");
        ensure!(state["lost_frames"].as_u64() > Some(100), "nothing was lost: {state}");
        Ok(())
    });
}

#[test]
fn a_fifo_shows_the_guest_to_who_reads_it() {
    let control = Control::new();
    let fifo = control.path("fifo");
    lab::run(&["mkfifo", &fifo.display().to_string()], PATIENCE).expect("a FIFO");
    let setup = control.setup(Setup::new().vunet(&["--pcap", &fifo.display().to_string()]));
    scenario(&setup, |bench| {
        ensure!(control.ctl(&["capture", "status"])?["state"] == "waiting", "nobody is waited for");
        let reader = std::thread::spawn(move || -> std::io::Result<Vec<u8>> {
            let mut all = Vec::new();
            std::io::Read::read_to_end(&mut File::open(fifo)?, &mut all)?;
            Ok(all)
        });
        bench.in_guest(&["ping", "-n", "-c", "3", "-i", "0.05", "-W", "5", &WORLD.to_string()])?;
        let state = control.stop()?;
        let Ok(bytes) = reader.join() else { fail!("the reader panicked") };
        std::fs::write(control.path("read"), bytes?)?;
        let all = frames(&control.path("read"))?;
        ensure!(state["frames"] == all.len(), "{} frames of {state}", all.len());
        let echoes = all.iter().filter(|frame| ["0", "8"].contains(&&*frame.icmp)).count();
        ensure!(echoes == 6, "{echoes} echoes");
        let leases = all.iter().filter(|frame| frame.src == "0.0.0.0").count();
        ensure!(leases > 0, "what came before the reader is missing");
        Ok(())
    });
}
