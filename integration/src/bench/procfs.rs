//! What the kernel counts for a process, a network namespace and the machine (`proc(5)`).
//!
//! Every parser takes the file's text, so that it can be tested; a readers' function beside it opens
//! the file.

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::Serialize;

use crate::sys::process::clock_ticks_per_second;

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("no {what} where proc(5) has it"))
}

/// User and system time of a process in clock ticks, from `/proc/PID/stat`: all its threads, ended
/// ones too.
fn process_ticks(stat: &str) -> Option<u64> {
    // The name in parentheses may hold spaces and parentheses itself; fields count from 3 behind it.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_whitespace().skip(14 - 3);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Time the machine was not idle in clock ticks, from `/proc/stat`; time stolen by other machines
/// is not counted.
fn machine_ticks(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    let [user, nice, system, _, _, irq, softirq, ..] = ticks[..] else {
        return None;
    };
    Some(user + nice + system + irq + softirq)
}

/// CPU seconds process `pid` has used.
///
/// # Errors
/// If the process is gone.
pub(super) fn process_cpu_seconds(pid: u32) -> io::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks = process_ticks(&stat).ok_or_else(|| odd("CPU time of a process"))?;
    Ok(ticks as f64 / clock_ticks_per_second())
}

/// CPU seconds the whole machine has used.
///
/// # Errors
/// If `/proc/stat` is not as `proc(5)` says.
pub(super) fn machine_cpu_seconds() -> io::Result<f64> {
    let ticks =
        machine_ticks(&fs::read_to_string("/proc/stat")?).ok_or_else(|| odd("CPU time of the machine"))?;
    Ok(ticks as f64 / clock_ticks_per_second())
}

/// Process ids of all whose name begins with `name`.
pub(super) fn named(name: &str) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_so = |pid: &u32| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm"));
        comm.is_ok_and(|comm| comm.starts_with(name))
    };
    pids.filter(is_so).collect()
}

/// Resident bytes of the mappings in an `smaps` text that belong to the process: all but those that
/// are shared *and* writable, which is how guest memory is mapped. Program text counts, though other
/// processes may share it.
fn own_resident_bytes(smaps: &str) -> u64 {
    let mut counts = true;
    let mut sum_kib = 0u64;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if first == "Rss:" {
            let kib: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            sum_kib += if counts { kib } else { 0 };
        } else if !first.ends_with(':') {
            // The head of a mapping: ADDRESSES PERMISSIONS ...
            let permissions = words.next().unwrap_or_default();
            counts = !(permissions.contains('w') && permissions.ends_with('s'));
        }
    }
    sum_kib << 10
}

/// Resident bytes of process `pid` without guest memory.
///
/// # Errors
/// If the process is gone.
pub(super) fn resident_bytes(pid: u32) -> io::Result<u64> {
    Ok(own_resident_bytes(&fs::read_to_string(format!("/proc/{pid}/smaps"))?))
}

fn voluntary_switches(status: &str) -> Option<u64> {
    status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?.trim().parse().ok()
}

/// Times the threads of process `pid` have gone to sleep, all together.
///
/// # Errors
/// If the process is gone.
pub(super) fn sleeps(pid: u32) -> io::Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        sum += voluntary_switches(&status).ok_or_else(|| odd("context switches"))?;
    }
    Ok(sum)
}

/// Datagrams that reached UDP sockets, read or not, from `/proc/net/snmp`.
fn udp_arrivals(snmp: &str) -> Option<u64> {
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let names = lines.next()?.split_whitespace();
    let values = lines.next()?.split_whitespace();
    let of = |wanted: &str| {
        let at = names.clone().position(|name| name == wanted)?;
        values.clone().nth(at)?.parse::<u64>().ok()
    };
    Some(of("InDatagrams")? + of("RcvbufErrors")?)
}

/// Datagrams that reached UDP sockets in the calling thread's network namespace, read or not.
///
/// # Errors
/// If `/proc/net/snmp` is not as expected.
pub(super) fn udp_arrived() -> io::Result<u64> {
    udp_arrivals(&fs::read_to_string("/proc/thread-self/net/snmp")?).ok_or_else(|| odd("UDP counters"))
}

/// What came in on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkCounters {
    /// Frames; several segments may be one.
    pub(super) rx_frames: u64,
    /// Their bytes, Ethernet headers included.
    pub(super) rx_bytes: u64,
}

fn received(net_dev: &str, interface: &str) -> Option<LinkCounters> {
    let counters = net_dev.lines().find_map(|line| {
        let (name, counters) = line.split_once(':')?;
        (name.trim() == interface).then_some(counters)
    })?;
    let mut counters = counters.split_whitespace();
    let rx_bytes = counters.next()?.parse().ok()?;
    Some(LinkCounters { rx_frames: counters.next()?.parse().ok()?, rx_bytes })
}

/// What came in on `interface` of the calling thread's network namespace.
///
/// # Errors
/// If there is no such interface.
pub(super) fn link_counters(interface: &str) -> io::Result<LinkCounters> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    received(&text, interface).ok_or_else(|| odd("counters of an interface"))
}

/// The machine a run was made on.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    cpu: String,
    cores: usize,
    kernel: String,
    memory_mib: u64,
    congestion_control: String,
    rmem_max_bytes: u64,
    wmem_max_bytes: u64,
}

fn value_of(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

impl Machine {
    /// This machine; what cannot be read stays empty.
    pub(super) fn here() -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let number = |path: &str| read(path).parse().unwrap_or(0);
        let memory = value_of(&read("/proc/meminfo"), "MemTotal").unwrap_or_default();
        let memory_kib = memory.split(' ').next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        Machine {
            cpu: value_of(&read("/proc/cpuinfo"), "model name").unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: read("/proc/sys/kernel/osrelease"),
            memory_mib: memory_kib >> 10,
            congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control"),
            rmem_max_bytes: number(RMEM_MAX),
            wmem_max_bytes: number(WMEM_MAX),
        }
    }

    /// One line for people.
    pub(super) fn line(&self) -> String {
        format!(
            "{}, {} cores, {} MiB, Linux {}, {}, rmem_max {}, wmem_max {}",
            self.cpu,
            self.cores,
            self.memory_mib,
            self.kernel,
            self.congestion_control,
            self.rmem_max_bytes,
            self.wmem_max_bytes,
        )
    }
}

/// The load averages over 1, 5 and 15 minutes.
pub(super) fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

const RMEM_MAX: &str = "/proc/sys/net/core/rmem_max";
const WMEM_MAX: &str = "/proc/sys/net/core/wmem_max";

/// Congestion controls a namespace may be given; each namespace has the same.
const ALLOWED_CONGESTION: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";

/// Settings of the machine's kernel, changed for a time and put back when dropped.
#[derive(Debug, Default)]
pub(super) struct KernelSettings {
    before: Vec<(PathBuf, String)>,
}

impl KernelSettings {
    /// Sets the limits on both socket buffers to `bytes`.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(super) fn limit_sockets(&mut self, bytes: u32) -> io::Result<()> {
        self.set(RMEM_MAX, &bytes.to_string())?;
        self.set(WMEM_MAX, &bytes.to_string())
    }

    /// Lets a namespace choose the congestion control `name`.
    ///
    /// # Errors
    /// If the kernel does not know it.
    pub(super) fn allow_congestion(&mut self, name: &str) -> io::Result<()> {
        let allowed = fs::read_to_string(ALLOWED_CONGESTION)?;
        if allowed.split_whitespace().any(|known| known == name) {
            return Ok(());
        }
        self.set(ALLOWED_CONGESTION, &format!("{} {name}", allowed.trim()))
    }

    fn set(&mut self, path: &str, value: &str) -> io::Result<()> {
        self.before.push((path.into(), fs::read_to_string(path)?));
        fs::write(path, value)
    }
}

impl Drop for KernelSettings {
    fn drop(&mut self) {
        for (path, value) in &self.before {
            if let Err(e) = fs::write(path, value) {
                eprintln!("{} stays changed: {e}", path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_a_name_with_spaces_and_parentheses() {
        let stat = "12 (a) b (c) S 1 12 12 0 -1 4194560 100 0 0 0 70 30 5 6 20 0 1 0 99 1000 2 3";
        assert_eq!(process_ticks(stat), Some(100));
        assert_eq!(process_ticks("12 (cut"), None);
    }

    #[test]
    fn idle_waiting_and_stolen_time_is_not_the_machines_work() {
        assert_eq!(machine_ticks("cpu  1 2 4 1000 2000 8 16 4000 0 0\ncpu0 1 1 1 1 1 1 1\n"), Some(31));
        assert_eq!(machine_ticks("cpu  1 2\n"), None);
    }

    #[test]
    fn guest_memory_is_left_out_of_resident_bytes() {
        let smaps = "\
55d0-55d1 r-xp 00000000 08:01 11 /usr/bin/x\n\
Size: 8 kB\n\
Rss: 8 kB\n\
7f00-7f80 rw-s 00000000 00:01 12 /memfd:guest (deleted)\n\
Rss: 4096 kB\n\
VmFlags: rd wr sh\n\
7f90-7f91 rw-p 00000000 00:00 0\n\
Rss: 4 kB\n";
        assert_eq!(own_resident_bytes(smaps), 12 << 10);
    }

    #[test]
    fn sleeps_and_datagrams_are_found_by_name() {
        assert_eq!(voluntary_switches("Name: x\nvoluntary_ctxt_switches:\t42\n"), Some(42));
        let snmp = "Ip: A B\nIp: 1 2\nUdp: InDatagrams NoPorts InErrors RcvbufErrors\nUdp: 5 1 9 7\n";
        assert_eq!(udp_arrivals(snmp), Some(12));
        assert_eq!(udp_arrivals("Udp: InDatagrams\n"), None);
    }

    #[test]
    fn counters_of_an_interface_are_found_by_its_name() {
        let text =
            "Inter-|   Receive\n face |bytes packets errs\n  lo: 1 2 0\n  e0: 4242 42 0 0 0 0 0 0 7 1\n";
        assert_eq!(received(text, "e0"), Some(LinkCounters { rx_frames: 42, rx_bytes: 4242 }));
        assert_eq!(received(text, "e"), None);
        assert_eq!(received("e0: 1", "e0"), None);
    }

    #[test]
    fn this_process_has_figures() {
        let pid = std::process::id();
        assert!(process_cpu_seconds(pid).unwrap() >= 0.0);
        assert!(machine_cpu_seconds().unwrap() > 0.0);
        assert!(resident_bytes(pid).unwrap() > 100_000);
        assert!(sleeps(pid).is_ok());
    }
}
