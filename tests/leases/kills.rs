//! Processes that die at any instruction. The processes are this test program, started anew.
//!
//! Each appends what it was given and what it gives back to one file, in the order things happened: an address
//! is written down after it was bound, and crossed out before it is released. So whoever replays the file and
//! finds an address bound to a second client before the first crossed it out, has found a duplicate.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant as Wall};

use rusqlite::Connection;
use vunet::network::allocator::{IpAllocator, Refusal};
use vunet::network::clock::SystemClock;
use vunet::network::store::keeper::Keeper;
use vunet::network::store::{FILE_NAME, LeaseStore, Pool, StoreError};

use crate::{at, client, ip, lease};

/// Processes at one time, with [`CLIENTS`] each: more than the pool has addresses.
const PROCESSES: u32 = 8;
const CLIENTS: u32 = 3;

/// xorshift64*, for what is random and must be repeatable in no more than its rate.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}

fn small_pool() -> Pool {
    Pool::new("10.0.2.0/28".parse().unwrap(), ip(1))
}

fn open(folder: &Path, holder: u64) -> Result<LeaseStore, StoreError> {
    LeaseStore::open(folder, small_pool(), Arc::new(SystemClock::new().unwrap()), holder)
}

/// Starts the ignored test `name` of this program as a process of its own.
fn start(name: &str, folder: &Path, number: u32) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env("VUNET_TEST_FOLDER", folder)
        .env("VUNET_TEST_NUMBER", number.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// What [`start`] gave this process; none if somebody runs all ignored tests.
fn given() -> Option<(PathBuf, u32)> {
    let folder = std::env::var_os("VUNET_TEST_FOLDER")?;
    let number = std::env::var("VUNET_TEST_NUMBER").unwrap();
    Some((folder.into(), number.parse().unwrap()))
}

#[test]
#[ignore = "started by the tests of this file, which kill it"]
fn cycles() {
    let Some((folder, number)) = given() else { return };
    let mut events = File::options().append(true).open(folder.join("events")).unwrap();
    let mut tell = |text: String| events.write_all(text.as_bytes()).unwrap();
    let mut random = Random(u64::from(std::process::id()) << 8 | u64::from(number) | 1);
    let mut store = open(&folder, random.below(u64::MAX)).unwrap();
    // Whoever kills it may itself be killed.
    let parent = std::os::unix::process::parent_id();
    while std::os::unix::process::parent_id() == parent {
        let n = number * CLIENTS + random.below(CLIENTS.into()) as u32;
        let who = client(n);
        // As a client that is new, that would like an address, and that believes to have one (INIT-REBOOT).
        let liked = ip(2 + random.below(13) as u8);
        let offered = match random.below(3) {
            0 => Ok(liked),
            1 => store.offer(at(0), &who, Some(liked)).map(|offer| offer.ip),
            _ => store.offer(at(0), &who, None).map(|offer| offer.ip),
        };
        let outcome = offered.and_then(|offered| store.bind(at(0), &who, offered));
        let ip = match outcome {
            Ok((_, grant)) => grant.ip,
            Err(Refusal::Exhausted | Refusal::NotBound(_) | Refusal::Store(StoreError::Locked(_))) => {
                continue;
            }
            Err(refusal) => {
                tell(format!("error {refusal:?}\n"));
                return;
            }
        };
        tell(format!("bound {ip} {n}\n"));
        if random.below(4) == 0 {
            continue;
        }
        tell(format!("free {ip} {n}\n"));
        while matches!(store.release(at(0), who.mac, ip), Err(StoreError::Locked(_))) {}
    }
}

/// What the file of events tells.
#[derive(Default)]
struct Story {
    /// Bytes that were read.
    read_bytes: u64,
    cycles: usize,
    kept: HashMap<String, String>,
}

impl Story {
    /// Reads on.
    fn go_on(&mut self, folder: &Path) {
        let mut file = File::open(folder.join("events")).unwrap();
        file.seek(SeekFrom::Start(self.read_bytes)).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        // A line that is being written is for the next time.
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        self.read_bytes += whole.len() as u64;
        for line in whole.lines() {
            self.hear(line);
        }
    }

    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["bound", ip, n] => {
                let before = self.kept.insert(ip.to_owned(), n.to_owned());
                assert!(before.as_deref().is_none_or(|before| before == n), "{ip}: {before:?} and {n}");
                let mine = self.kept.values().filter(|other| *other == n).count();
                assert_eq!(mine, 1, "client {n} has two addresses: {:?}", self.kept);
            }
            ["free", ip, _] => {
                self.kept.remove(ip);
                self.cycles += 1;
            }
            _ => panic!("{line}"),
        }
    }
}

/// Kills `kills` processes and more at random until there were `cycles`.
fn no_duplicate_in(cycles: usize, kills: usize) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = folder.path();
    File::create(folder.join("events")).unwrap();
    drop(open(folder, 0).unwrap());
    let mut keeper = Keeper::open(folder).unwrap();
    let seed = u64::from(std::process::id()) | 1 << 32;
    eprintln!("seed {seed}");
    let mut random = Random(seed);
    let mut processes: Vec<Child> = (0..PROCESSES).map(|n| start("kills::cycles", folder, n)).collect();
    let (begin, mut killed, mut story) = (Wall::now(), 0, Story::default());
    while (story.cycles < cycles || killed < kills) && begin.elapsed() < Duration::from_secs(600) {
        thread::sleep(Duration::from_millis(1 + random.below(20)));
        // Now and then all at once, so that the next finds a log nobody tends.
        let all = random.below(16) == 0;
        let victim = random.below(PROCESSES.into()) as usize;
        for (n, process) in (0..).zip(&mut processes).filter(|&(n, _)| all || n == victim) {
            process.kill().unwrap();
            process.wait().unwrap();
            killed += 1;
            if !all {
                *process = start("kills::cycles", folder, n as u32);
            }
        }
        if all {
            drop(keeper);
            let numbers = 0..PROCESSES;
            processes = numbers.map(|n| start("kills::cycles", folder, n)).collect();
            keeper = Keeper::open(folder).unwrap();
        }
        keeper.write_back().or_else(locked).unwrap();
        story.go_on(folder);
    }
    for process in &mut processes {
        process.kill().unwrap();
        process.wait().unwrap();
    }
    story.go_on(folder);
    eprintln!("{} cycles, {killed} killed in {:?}", story.cycles, begin.elapsed());
    assert!(story.cycles >= cycles && killed >= kills, "{} cycles, {killed} killed", story.cycles);
    // What was written down as bound is bound, whoever died.
    let mut store = open(folder, 0).unwrap();
    for (ip, n) in &story.kept {
        let known = store.get(at(0), client(n.parse().unwrap()).mac).unwrap().unwrap();
        assert_eq!((known.ip.to_string(), known.is_active(at(0))), (ip.clone(), true), "client {n}");
    }
}

fn locked(error: StoreError) -> Result<(), StoreError> {
    if matches!(error, StoreError::Locked(_)) { Ok(()) } else { Err(error) }
}

#[test]
fn processes_killed_at_any_instruction_leave_no_address_with_two_holders() {
    no_duplicate_in(500, 100);
}

#[test]
#[ignore = "long: ten thousand cycles"]
fn ten_thousand_cycles_under_random_kills_leave_no_address_with_two_holders() {
    no_duplicate_in(10_000, 1_000);
}

#[test]
#[ignore = "started by the tests of this file, which kill it"]
fn half_a_transaction() {
    let Some((folder, _)) = given() else { return };
    let file = Connection::open(folder.join(FILE_NAME)).unwrap();
    let half = "BEGIN IMMEDIATE; DELETE FROM lease; \
                INSERT INTO lease(ip, mac, holder, until_us) VALUES(167772680, x'020000000009', 1, 1 << 60)";
    file.execute_batch(half).unwrap();
    // Into the log, where a reader that believed it would find it.
    file.cache_flush().unwrap();
    fs::write(folder.join("half"), "").unwrap();
    thread::sleep(Duration::from_secs(60));
}

#[test]
fn half_a_transaction_of_a_dead_process_never_was_and_a_stopped_one_is_waited_for_once() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = folder.path();
    let mut store = open(folder, 1).unwrap();
    assert_eq!(lease(&mut store, at(0), &client(1)).ip, ip(2));
    let mut process = start("kills::half_a_transaction", folder, 0);
    let begin = Wall::now();
    while !folder.join("half").exists() {
        assert!(begin.elapsed() < Duration::from_secs(30), "the other process did not come so far");
        thread::sleep(Duration::from_millis(1));
    }
    let mut waits = [Duration::ZERO; 3];
    for wait in &mut waits {
        let begin = Wall::now();
        let outcome = store.offer(at(0), &client(2), None);
        assert!(matches!(outcome, Err(Refusal::Store(StoreError::Locked(_)))), "{outcome:?}");
        *wait = begin.elapsed();
    }
    assert!(waits[0] >= vunet::limits::STORE_WAIT, "{waits:?}");
    assert!(waits[1].max(waits[2]) < vunet::limits::STORE_WAIT, "{waits:?}");
    assert_eq!(store.leases(at(0)).unwrap().len(), 1, "who reads sees what was");
    process.kill().unwrap();
    process.wait().unwrap();
    assert_eq!(lease(&mut store, at(0), &client(2)).ip, ip(3));
    drop(store);
    let known = open(folder, 1).unwrap().leases(at(0)).unwrap();
    assert_eq!(known.iter().map(|lease| lease.ip).collect::<Vec<_>>(), [ip(2), ip(3)]);
}

#[test]
fn the_log_is_written_back_once_it_is_worth_it_and_no_longer_grows() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = folder.path();
    let mut store = open(folder, 1).unwrap();
    let mut keeper = Keeper::open(folder).unwrap();
    let log_bytes = || fs::metadata(folder.join(format!("{FILE_NAME}-wal"))).unwrap().len();
    let churn = |store: &mut LeaseStore, times: u32| {
        for n in 0..times {
            let grant = lease(store, at(0), &client(n % 5));
            store.release(at(0), client(n % 5).mac, grant.ip).unwrap();
        }
    };
    churn(&mut store, 1);
    keeper.write_back().unwrap();
    let file_bytes = fs::metadata(folder.join(FILE_NAME)).unwrap().len();
    assert!(log_bytes() < vunet::limits::STORE_LOG_BYTES);
    let mut most = 0;
    for _ in 0..10 {
        churn(&mut store, 40);
        keeper.write_back().unwrap();
        most = log_bytes().max(most);
    }
    assert!(most >= vunet::limits::STORE_LOG_BYTES, "{most}: nothing was to be written back");
    assert!(most < 4 << 20, "{most}");
    churn(&mut store, 400);
    assert!(log_bytes() > most, "without the keeper it grows");
    assert!(fs::metadata(folder.join(FILE_NAME)).unwrap().len() >= file_bytes);
}
