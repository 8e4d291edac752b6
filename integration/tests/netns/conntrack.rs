//! Linux's conntrack, live, beside what was recorded of it: `tests/packet_nat/conntrack.txt` of the main crate.
//!
//! ```text
//!  guest 10.0.2.2 eth0 --- in0 10.0.2.1 (forwards, masquerades, drops what is invalid) out0 198.18.0.2 --- eth0 198.18.0.1 world
//! ```
//! Each recorded segment is sent by hand from the end it came from, and what the kernel of this machine makes of it, whether it
//! passed and the state of its entry afterwards, has to be what the record says Linux did. The main crate's
//! `tests/packet_nat/conntrack.rs` holds our tracker against the same lines, so neither side can drift from them alone.
//! Where kernels differ from the recorded one is in [`ELSEWHERE`], and nowhere else.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use vunet_integration::lab::frame::{Segment, send_frames, tcp_frame};
use vunet_integration::lab::{self, Netns, SHORT};

use crate::bench::{Failure, Outcome, PATIENCE, ensure, fail, missing, skip};

const RECORDED: &str = include_str!("../../../tests/packet_nat/conntrack.txt");
/// The file of the kernel's that shows its entries.
const ENTRIES: &str = "/proc/net/nf_conntrack";

/// What an older kernel does otherwise, and since when kernels do as recorded.
struct Elsewhere {
    conversation: &'static str,
    /// Its segments, as recorded, up to the verdict.
    segments: &'static [&'static str],
    /// First release that does as recorded.
    since: (u32, u32),
    does: (&'static str, &'static str),
}

/// Every difference that is accepted. A kernel of the named release or a newer one has to do as recorded in these too.
/// None changes what the lines behind it see.
///
/// - Linux 6.2 began to let pass, without effect, what ends further back than a window or acknowledges what is long
///   past, as the tracker does; before, it was invalid.
/// - Linux 5.1 began to close only at a reset with the very number that is expected; before, any reset in the window did.
const ELSEWHERE: [Elsewhere; 3] = [
    Elsewhere {
        conversation: "behind the window",
        segments: &["> A 98000 500001 1", "< A 498000 100001 1"],
        since: (6, 2),
        does: ("drop", "ESTABLISHED"),
    },
    Elsewhere {
        conversation: "acknowledges what is long past",
        segments: &["< A 500001 33000 1"],
        since: (6, 2),
        does: ("drop", "ESTABLISHED"),
    },
    Elsewhere {
        conversation: "reset within the window",
        segments: &["< R 700 0 0"],
        since: (5, 1),
        does: ("pass", "CLOSE"),
    },
];

const RULES: &str = "table ip replay {
    counter passed {}
    counter refused {}
    counter strayed {}
    chain judge { type filter hook prerouting priority -150; meta l4proto tcp ct state invalid counter name refused drop; }
    chain through { type filter hook postrouting priority 300; meta l4proto tcp counter name passed; }
    chain ours { type filter hook input priority 0; meta l4proto tcp counter name strayed drop; }
    chain out { type nat hook postrouting priority srcnat; oifname \"out0\" masquerade; }
}";

const GUEST: (Ipv4Addr, [u8; 6]) = (Ipv4Addr::new(10, 0, 2, 2), [2, 0, 0, 0, 0, 2]);
const INSIDE: (Ipv4Addr, [u8; 6]) = (Ipv4Addr::new(10, 0, 2, 1), [2, 0, 0, 0, 0, 1]);
const OUTSIDE: (Ipv4Addr, [u8; 6]) = (Ipv4Addr::new(198, 18, 0, 2), [2, 0, 0, 0, 1, 2]);
const REMOTE: (Ipv4Addr, [u8; 6]) = (Ipv4Addr::new(198, 18, 0, 1), [2, 0, 0, 0, 1, 1]);
const REMOTE_PORT: u16 = 80;
/// The first conversation's port; the others follow. Masquerading keeps them: each is used once.
const FIRST_PORT: u16 = 20_000;

/// One line of the record.
struct Line {
    from_opener: bool,
    segment: Segment,
    verdict: &'static str,
    state: &'static str,
    /// Up to the verdict, with single blanks.
    text: String,
}

fn parse(line: &'static str) -> Result<Line, Failure> {
    let linux = line.split_once('|').map_or(line, |(linux, _)| linux);
    let words: Vec<&str> = linux.split_whitespace().collect();
    let [from, letters, seq, ack, len, verdict, state] = words[..] else { fail!("not a line: {line}") };
    let bit = |letter| match letter {
        'F' => 0x01,
        'S' => 0x02,
        'R' => 0x04,
        'P' => 0x08,
        'A' => 0x10,
        'U' => 0x20,
        _ => 0,
    };
    let segment = Segment {
        seq: seq.parse()?,
        ack: ack.parse()?,
        flags: letters.chars().map(bit).sum(),
        window: 1000,
        payload_bytes: len.parse()?,
    };
    Ok(Line { from_opener: from == ">", segment, verdict, state, text: words[..5].join(" ") })
}

/// A host that masquerades, and a namespace at each side of it.
struct Masquerade {
    guest: Netns,
    host: Netns,
    world: Netns,
    /// Segments sent so far.
    sent: u64,
    /// Those that passed.
    passed: u64,
}

impl Masquerade {
    fn new() -> Result<Masquerade, Failure> {
        let new = |label| Netns::create(label);
        let made = Masquerade { guest: new("g")?, host: new("h")?, world: new("w")?, sent: 0, passed: 0 };
        let (guest, host, world) = (&made.guest, &made.host, &made.world);
        for netns in [guest, host, world] {
            netns.sysctl("net.ipv6.conf.all.disable_ipv6", "1")?;
            netns.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        }
        let ip = |netns: &Netns, words: &str| {
            let words: Vec<&str> = words.split(' ').collect();
            lab::run(&[&["ip", "-n", netns.name()], &words[..]].concat(), SHORT).map(drop)
        };
        for (end, link, own, other) in [(guest, "in0", INSIDE, GUEST), (world, "out0", OUTSIDE, REMOTE)] {
            let mac = |mac: [u8; 6]| mac.map(|octet| format!("{octet:02x}")).join(":");
            ip(host, &format!("link add {link} type veth peer name eth0 netns {}", end.name()))?;
            ip(host, &format!("link set {link} address {} up", mac(own.1)))?;
            ip(end, &format!("link set eth0 address {} up", mac(other.1)))?;
            ip(host, &format!("addr add {}/24 dev {link}", own.0))?;
            let neighbour = format!("{} lladdr {} dev {link} nud permanent", other.0, mac(other.1));
            ip(host, &format!("neigh add {neighbour}"))?;
            host.sysctl(&format!("net.ipv4.conf.{link}.rp_filter"), "0")?;
        }
        host.sysctl("net.ipv4.conf.all.rp_filter", "0")?;
        host.sysctl("net.ipv4.ip_forward", "1")?;
        made.load_rules()?;
        Ok(made)
    }

    fn load_rules(&self) -> Outcome {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("rules.nft");
        std::fs::write(&file, RULES)?;
        self.host.run(&["nft", "-f", &file.display().to_string()], SHORT)?;
        // The defaults, whatever this machine's are; but no entry ends while a busy machine thinks.
        for (name, value) in [("loose", "1"), ("be_liberal", "0"), ("timeout_close", "120")] {
            self.host.sysctl(&format!("net.netfilter.nf_conntrack_tcp_{name}"), value)?;
        }
        self.host.sysctl("net.netfilter.nf_conntrack_checksum", "1")?;
        Ok(())
    }

    /// Packets counted so far: passed, refused and strayed.
    fn counts(&self) -> Result<[u64; 3], Failure> {
        let text = self.host.run(&["nft", "-j", "list", "counters", "table", "ip", "replay"], SHORT)?.stdout;
        let shown: serde_json::Value = serde_json::from_str(&text)?;
        let all = shown["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
        let of = |name: &str| {
            let counter = all.iter().map(|one| &one["counter"]).find(|counter| counter["name"] == name);
            counter.and_then(|counter| counter["packets"].as_u64())
        };
        match [of("passed"), of("refused"), of("strayed")] {
            [Some(passed), Some(refused), Some(strayed)] => Ok([passed, refused, strayed]),
            _ => fail!("no counters in {text}"),
        }
    }

    /// Sends one segment of the conversation of `port`; whether it passed.
    fn send(&mut self, port: u16, line: &Line) -> Result<&'static str, Failure> {
        let remote = |addr| SocketAddrV4::new(addr, REMOTE_PORT);
        let (end, from, to) = if line.from_opener {
            let from = (GUEST.1, SocketAddrV4::new(GUEST.0, port));
            (&self.guest, from, (INSIDE.1, remote(REMOTE.0)))
        } else {
            let to = (OUTSIDE.1, SocketAddrV4::new(OUTSIDE.0, port));
            (&self.world, (REMOTE.1, remote(REMOTE.0)), to)
        };
        send_frames(end, &[tcp_frame(from, to, &line.segment)])?;
        self.sent += 1;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let [passed, refused, strayed] = self.counts()?;
            ensure!(strayed == 0, "{} came to the host itself: it has no entry", line.text);
            if passed + refused == self.sent {
                let verdict = if passed > self.passed { "pass" } else { "drop" };
                self.passed = passed;
                return Ok(verdict);
            }
            ensure!(Instant::now() < deadline, "{} was neither passed nor refused", line.text);
        }
    }

    /// The state of the entry of `port`, `-` if there is none.
    fn state(&self, port: u16) -> Result<String, Failure> {
        let entries = self.host.run(&["cat", ENTRIES], SHORT)?.stdout;
        let tuple = format!("src={} dst={} sport={port} dport={REMOTE_PORT} ", GUEST.0, REMOTE.0);
        // ipv4 2 tcp 6 SECONDS STATE src=.. for the opener's direction, then the other's
        let entry = entries.lines().find(|entry| entry.contains(&tuple));
        let state = entry.and_then(|entry| entry.split_whitespace().nth(5));
        Ok(state.unwrap_or("-").to_owned())
    }

    /// The same, looked at again for a moment if it is not `expected`: segments are counted before their entry stands.
    fn settled(&self, port: u16, expected: &str) -> Result<String, Failure> {
        let deadline = Instant::now() + Duration::from_millis(500);
        loop {
            let state = self.state(port)?;
            if state == expected || Instant::now() > deadline {
                return Ok(state);
            }
        }
    }
}

/// This kernel's release, as far as two numbers say it.
fn release() -> Result<(u32, u32), Failure> {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = text.trim().split(['.', '-']).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => fail!("no release in {text}"),
    }
}

/// Whether a kernel of this release may do `got` in place of what is recorded.
fn is_known(release: (u32, u32), conversation: &str, line: &Line, got: (&str, &str)) -> bool {
    ELSEWHERE.iter().any(|known| {
        release < known.since
            && known.conversation == conversation
            && known.segments.contains(&&*line.text)
            && known.does == got
    })
}

fn replay() -> Outcome {
    let release = release()?;
    let mut host = Masquerade::new()?;
    let (mut conversation, mut port, mut count, mut wrong) = ("", FIRST_PORT, 0, Vec::new());
    for line in RECORDED.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(title) = line.strip_prefix("= ") {
            (conversation, port) = (title, port + 1);
            continue;
        }
        let line = parse(line)?;
        let verdict = host.send(port, &line)?;
        let state = host.settled(port, line.state)?;
        let got = (verdict, &*state);
        count += 1;
        if got != (line.verdict, line.state) && !is_known(release, conversation, &line, got) {
            let recorded = (line.verdict, line.state);
            wrong.push(format!("{conversation}: {}: recorded {recorded:?}, here {got:?}", line.text));
        }
    }
    ensure!(wrong.is_empty(), "Linux {release:?} does otherwise than recorded:\n{}", wrong.join("\n"));
    ensure!(count > 100, "{count} segments replayed");
    Ok(())
}

#[test]
fn this_kernels_conntrack_judges_segments_as_recorded() {
    let lacks = missing(&["nft"]).or_else(|| {
        let there = std::path::Path::new(ENTRIES).exists();
        (!there).then(|| format!("needs a kernel that shows {ENTRIES} (CONFIG_NF_CONNTRACK_PROCFS)"))
    });
    if let Some(reason) = lacks {
        return skip(&reason);
    }
    if let Err(failure) = replay() {
        panic!("{failure:?}");
    }
}

#[test]
fn accepted_differences_are_of_lines_that_are_recorded_and_of_older_kernels_only() {
    let mut conversation = "";
    let mut known = Vec::new();
    for line in RECORDED.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match line.strip_prefix("= ") {
            Some(title) => conversation = title,
            None => known.push((conversation, parse(line).expect("a line"))),
        }
    }
    for other in &ELSEWHERE {
        for segment in other.segments {
            let found =
                known.iter().find(|(title, line)| *title == other.conversation && line.text == *segment);
            let (title, line) = found.expect("a recorded line");
            assert_ne!((line.verdict, line.state), other.does, "{segment} is no difference");
            let (major, minor) = other.since;
            assert!(!is_known(other.since, title, line, other.does));
            assert!(is_known((major - 1, minor), title, line, other.does));
        }
    }
}
