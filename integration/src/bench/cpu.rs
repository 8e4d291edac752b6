//! CPU time of a whole run, whatever else the machine does meanwhile.
//!
//! What runs beside a benchmark takes the time it leaves idle and would be counted with it. Where a control group (cgroups,
//! version 2) can be made, the run is one: programs at both ends, front-end, back-end and all the kernel does on their account. Beside it
//! count the kernel's threads that go on with what has come in (`ksoftirqd`); interrupts that others happen to
//! bear do not. Where there is none, the machine's own count is taken.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::procfs;

/// What the CPU time of a run is read from. Dropping it puts this process back where it was.
#[derive(Debug)]
pub(super) enum RunCpu {
    /// A control group of the run's own.
    Group {
        /// Where its files are.
        dir: PathBuf,
        /// Process ids of the kernel's threads that count with it.
        softirq: Vec<u32>,
    },
    /// All that the machine does.
    Machine,
}

/// Where control groups of version 2 are, from `/proc/self/mounts`.
fn mount_of(mounts: &str) -> Option<&Path> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then_some(Path::new(place))
    })
}

/// The group of a process below there, from `/proc/self/cgroup`.
fn path_of(cgroup: &str) -> Option<&str> {
    cgroup.lines().find_map(|line| line.strip_prefix("0::/"))
}

/// Microseconds a group has used, from `cpu.stat`.
fn usage_micros(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?.parse().ok()
}

fn make_group() -> io::Result<PathBuf> {
    let odd = || io::Error::from(io::ErrorKind::NotFound);
    let (mounts, own) = (fs::read_to_string("/proc/self/mounts")?, fs::read_to_string("/proc/self/cgroup")?);
    let parent = mount_of(&mounts).ok_or_else(odd)?.join(path_of(&own).ok_or_else(odd)?);
    let dir = parent.join(format!("vunet-bench-{}", std::process::id()));
    fs::create_dir(&dir)?;
    let entered = fs::write(dir.join("cgroup.procs"), "0").and_then(|()| read_usage(&dir));
    if let Err(error) = entered {
        leave(&dir);
        return Err(error);
    }
    Ok(dir)
}

fn read_usage(dir: &Path) -> io::Result<u64> {
    let stat = fs::read_to_string(dir.join("cpu.stat"))?;
    usage_micros(&stat).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no usage in cpu.stat"))
}

/// Best effort: a group that stays is empty once this process has ended.
fn leave(dir: &Path) {
    if let Some(parent) = dir.parent() {
        let _ = fs::write(parent.join("cgroup.procs"), "0");
    }
    let _ = fs::remove_dir(dir);
}

impl RunCpu {
    /// Makes this process, with all it starts from now on, a group of its own.
    pub(super) fn begin() -> RunCpu {
        match make_group() {
            Ok(dir) => RunCpu::Group { dir, softirq: procfs::named("ksoftirqd/") },
            Err(error) => {
                eprintln!("no control group for this run ({error}): the machine's whole CPU time counts");
                RunCpu::Machine
            }
        }
    }

    /// CPU seconds used so far.
    ///
    /// # Errors
    /// If what is read is not as `proc(5)` and the kernel's `cgroup-v2` say.
    pub(super) fn seconds(&self) -> io::Result<f64> {
        let RunCpu::Group { dir, softirq } = self else { return procfs::machine_cpu_seconds() };
        let threads: io::Result<f64> = softirq.iter().map(|&pid| procfs::process_cpu_seconds(pid)).sum();
        Ok(read_usage(dir)? as f64 / 1e6 + threads?)
    }

    /// For people, what is counted.
    pub(super) fn what(&self) -> &'static str {
        match self {
            RunCpu::Group { .. } => "all processes of the run and the kernel's threads for softirqs",
            RunCpu::Machine => "all the machine did",
        }
    }
}

impl Drop for RunCpu {
    fn drop(&mut self) {
        if let RunCpu::Group { dir, .. } = self {
            leave(dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_of_version_2_is_found_among_others() {
        let mounts =
            "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_of(mounts), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(mount_of("tmpfs /cgroup2 tmpfs rw 0 0\n"), None);
        assert_eq!(path_of("4:memory:/a\n0::/user.slice/b\n"), Some("user.slice/b"));
        assert_eq!(path_of("0::/\n"), Some(""));
        assert_eq!(path_of("4:memory:/a\n"), None);
    }

    #[test]
    fn usage_is_found_by_name() {
        assert_eq!(usage_micros("user_usec 1\nusage_usec 340615\n"), Some(340_615));
        assert_eq!(usage_micros("user_usec 1\n"), None);
    }

    #[test]
    fn the_machine_itself_can_be_asked() {
        let before = RunCpu::Machine.seconds().unwrap();
        assert!(before > 0.0 && RunCpu::Machine.seconds().unwrap() >= before);
    }
}
