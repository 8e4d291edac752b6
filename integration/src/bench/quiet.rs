//! What a back-end does while nothing can get ahead: memory, wake-ups, CPU time.

use std::net::TcpStream;
use std::time::Instant;

use super::load;
use super::measure::{SETTLE, Sample, Sampler};
use super::procfs;
use super::scenario::{self as m, Quiet, Scenario};
use super::site::{Backend, BenchError, Site, during};

/// Frames the guest takes before it starves or falls silent: a lease and a connection come before.
const FRAMES: u64 = 1000;

impl Sampler<'_> {
    /// Brings the guest to rest, then watches the back-end.
    pub(super) fn quiet(
        &self,
        site: &mut Site,
        backend: &Backend,
        scenario: Scenario,
        quiet: Quiet,
    ) -> Result<Sample, BenchError> {
        let wish = match quiet {
            Quiet::Idle => None,
            Quiet::Starved => Some(format!("starve:{FRAMES}")),
            Quiet::Unacked => Some(format!("deaf:{FRAMES}")),
        };
        let args = wish.as_ref().map(|wish| ["--misbehave", wish]);
        site.ready(backend, scenario, args.as_ref().map_or(&[], |args| &args[..]))?;
        // Open as long as the back-end is watched.
        let _flow = if quiet == Quiet::Idle { None } else { Some(fall_silent(site)?) };
        std::thread::sleep(SETTLE);
        self.watch(site)
    }

    fn watch(&self, site: &Site) -> Result<Sample, BenchError> {
        let Some(pid) = site.backend_pid() else {
            return Err(BenchError::NotApplicable);
        };
        let sleeps = || procfs::sleeps(pid).map_err(during("context switches of the back-end"));
        let (mark, before, started) = (self.mark(site)?, sleeps()?, Instant::now());
        std::thread::sleep(self.duration());
        let (wakes, seconds) = ((sleeps()? - before) as f64, started.elapsed().as_secs_f64());
        let (cpu, _) = mark.since()?;
        let resident = procfs::resident_bytes(pid).map_err(during("memory of the back-end"))?;
        let mut sample = vec![(m::WAKES, wakes / seconds)];
        sample.extend(cpu.map(|cpu| (m::BUSY, cpu / seconds * 100.0)));
        sample.push((m::RESIDENT, resident as f64 / f64::from(1 << 20)));
        Ok(sample)
    }
}

/// Downloads without end until the guest gets nothing any more, and sees to it that this is the
/// guest's doing.
fn fall_silent(site: &Site) -> Result<TcpStream, BenchError> {
    let flow = site.lab.guest.inside(load::download_until_silence).map_err(during("a download"))?;
    let counters = site.guest_counters()?;
    let frames = counters.frames_to_guest + counters.dropped_on_request;
    if frames < FRAMES {
        return Err(BenchError::Result(format!("the download stopped after {frames} frames by itself")));
    }
    Ok(flow)
}
